//! Waiting for a device node.

use std::mem::MaybeUninit;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::inotify;
use rustix::io::Errno;

use super::{BootError, Doing};

/// Virtio disks are there as soon as their driver is; a host that gave none is told so after this.
const LIMIT: Duration = Duration::from_secs(10);

/// Returns once `device` exists.
pub fn wait_for(device: &str) -> Result<(), BootError> {
    let path = Path::new(device);
    if path.exists() {
        return Ok(());
    }
    let doing = || format!("waiting for {device} (does the VMM have that disk, the initramfs its driver?)");
    let events = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK).doing(doing())?;
    let parent = path.parent().unwrap_or(Path::new("/dev"));
    inotify::add_watch(&events, parent, inotify::WatchFlags::CREATE).doing(doing())?;
    let deadline = Instant::now() + LIMIT;
    loop {
        // After the watch: what comes from now on is an event.
        if path.exists() {
            return Ok(());
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(std::io::Error::from(std::io::ErrorKind::TimedOut)).doing(doing());
        }
        let timeout = Timespec::try_from(left).map_err(std::io::Error::other).doing(doing())?;
        match poll(&mut [PollFd::new(&events, PollFlags::IN)], Some(&timeout)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(errno).doing(doing()),
        }
        // Which node it was does not matter.
        let mut buffer = [MaybeUninit::uninit(); 4096];
        match rustix::io::read(&events, &mut buffer[..]) {
            Ok(_) | Err(Errno::AGAIN) => {}
            Err(errno) => return Err(errno).doing(doing()),
        }
    }
}
