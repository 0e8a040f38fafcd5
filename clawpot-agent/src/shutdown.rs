//! From a request to stop to the end of the machine.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::mount::{MountFlags, mount_remount};
use rustix::system::{RebootCommand, reboot};

use crate::boot::Volume;
use crate::console::say;
use crate::exec::Shared;

/// The longest that processes get, whatever is asked for.
const MAX_GRACE: Duration = Duration::from_secs(300);

/// How long the kernel may take to end processes that were killed.
const KILL: Duration = Duration::from_secs(2);

/// How long the answer to the request has to leave the machine.
const ANSWER: Duration = Duration::from_millis(10);

/// How long the execs that ended have to say so to whoever is attached.
const LAST_WORDS: Duration = Duration::from_millis(100);

/// A request to stop.
#[derive(Clone, Copy, Debug)]
pub struct Stop {
    grace: Duration,
}

impl Stop {
    #[must_use]
    pub fn after(grace_ms: u64) -> Self {
        Self { grace: Duration::from_millis(grace_ms).min(MAX_GRACE) }
    }
}

/// Ends all processes in order, makes the disks clean and stops the machine. Only as PID 1.
///
/// The caller keeps serving meanwhile: output of the last moments still leaves. `disk` is the root of the VM's disk.
pub async fn run(stop: Stop, execs: &Shared, volumes: &[Volume], disk: &OwnedFd) -> io::Error {
    tokio::time::sleep(ANSWER).await;
    let busy = !matches!(execs.cgroups.is_empty(), Ok(true));
    // Everyone but us. Whoever is stopped must run to hear it.
    signal_everyone(libc::SIGTERM);
    signal_everyone(libc::SIGCONT);
    if !wait_empty(execs, stop.grace).await {
        if let Err(error) = execs.cgroups.kill_all() {
            say(format_args!("stopping: killing what ignores SIGTERM: {error}"));
        }
        if !wait_empty(execs, KILL).await {
            say("stopping: some processes do not end although killed; their last writes may be lost");
        }
    }
    if busy {
        tokio::time::sleep(LAST_WORDS).await;
    }
    finish(volumes, disk)
}

/// Makes the disks clean and stops the machine. Comes back only with why it could not.
pub fn finish(volumes: &[Volume], disk: &OwnedFd) -> io::Error {
    rustix::fs::sync();
    // The overlay first: it writes to the disk.
    let held = |root: &OwnedFd| format!("/proc/self/fd/{}", root.as_raw_fd());
    let volumes = volumes.iter().map(|volume| (volume.path.as_str(), held(&volume.root)));
    for (what, path) in volumes.chain([("root", "/".to_owned()), ("disk", held(disk))]) {
        if let Err(errno) = mount_remount(&path, MountFlags::RDONLY, "") {
            say(format_args!("stopping: making {what} read-only: {errno}; its journal is replayed at the next start"));
        }
    }
    end()
}

/// The VMMs end on a reset: QEMU runs with -no-reboot, and Firecracker knows no other way out.
pub fn end() -> io::Error {
    match reboot(RebootCommand::Restart) {
        Ok(()) => io::Error::other("the kernel did not restart"),
        Err(errno) => errno.into(),
    }
}

fn signal_everyone(number: i32) {
    // SAFETY: kill takes two integers; -1 is everyone but the caller. That nobody is there is no failure.
    unsafe { libc::kill(-1, number) };
}

/// Looks every few milliseconds without blocking the thread: it still serves and reaps.
async fn wait_empty(execs: &Shared, limit: Duration) -> bool {
    let deadline = Instant::now() + limit;
    let mut pause = Duration::from_millis(1);
    loop {
        match execs.cgroups.is_empty() {
            Ok(true) => return true,
            Ok(false) if Instant::now() >= deadline => return false,
            Ok(false) => tokio::time::sleep(pause).await,
            Err(error) => {
                say(format_args!("stopping: looking for processes: {error}"));
                return false;
            }
        }
        pause = (pause * 2).min(Duration::from_millis(50));
    }
}
