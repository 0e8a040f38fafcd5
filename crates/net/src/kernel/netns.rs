//! Network namespaces that live by a name: a mount of the namespace over an empty file, as `ip netns` does it.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use clawpot_types::{Error, Kind, Result};
use rustix::fs::{FlockOperation, Mode, OFlags, flock};
use rustix::io::Errno;
use rustix::mount::{MountPropagationFlags, UnmountFlags, mount_bind, mount_bind_recursive, mount_change, unmount};
use rustix::thread::{UnshareFlags, unshare_unsafe};

/// Where `ip netns` looks for names.
pub const NETNS_DIR: &str = "/run/netns";

const NSFS_MAGIC: u64 = 0x6e73_6673;

/// How long another is waited for that makes the directory a mount: some milliseconds, where it is one.
const PATIENCE: Duration = Duration::from_secs(5);

/// Makes the directory of names a mount that other mount namespaces follow, so that a namespace removed here is gone there
/// too. Again is fine.
pub(crate) fn prepare_dir(dir: &Path) -> Result<()> {
    let what = || format!("making {} a directory of network namespaces", dir.display());
    std::fs::create_dir_all(dir).map_err(|error| Error::io(what(), error))?;
    let share = || mount_change(dir, MountPropagationFlags::SHARED | MountPropagationFlags::REC);
    let mount = || {
        // `ip netns` takes the same lock for the same reason: two bind mounts over each other would hide names.
        let _lock = lock(dir)?;
        match share() {
            Err(Errno::INVAL) => mount_bind_recursive(dir, dir).and_then(|()| share()),
            done => done,
        }
    };
    let done = match share() {
        // Not a mount yet.
        Err(Errno::INVAL) => mount(),
        done => done,
    };
    done.map_err(|errno| Error::io(what(), errno.into()).hint("run the server as root, with CAP_SYS_ADMIN"))
}

/// Any user of the host can open the directory and hold the lock for ever: after a while it is gone on without.
fn lock(dir: &Path) -> Result<OwnedFd, Errno> {
    let fd = rustix::fs::open(dir, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let deadline = Instant::now() + PATIENCE;
    loop {
        match flock(&fd, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(10)),
            Err(Errno::WOULDBLOCK) => {
                tracing::warn!(dir = %dir.display(), "somebody has locked it for {} s: not waited for", PATIENCE.as_secs());
                return Ok(fd);
            }
            done => return done.map(|()| fd),
        }
    }
}

/// The file that a namespace is mounted over. `AlreadyExists`: something of that name is there.
pub(crate) fn create_name(path: &Path) -> Result<()> {
    File::options()
        .write(true)
        .create_new(true)
        .mode(0o000)
        .open(path)
        .map(drop)
        .map_err(|error| Error::io(format!("making {}", path.display()), error))
}

/// Moves the calling thread into a new namespace and gives that the name. The thread must end soon.
pub(crate) fn unshare_named(path: &Path) -> Result<()> {
    let what = || format!("making the network namespace {}", path.display());
    // SAFETY: only the network namespace of this thread changes; no memory, descriptor table or file-system state is unshared.
    unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.map_err(|errno| Error::io(what(), errno.into()))?;
    mount_bind("/proc/thread-self/ns/net", path).map_err(|errno| Error::io(what(), errno.into()))
}

/// Whether a namespace is mounted there. Cheap.
pub(crate) fn is_mounted(path: &Path) -> Result<bool> {
    match rustix::fs::statfs(path) {
        Ok(stat) => Ok(u64::try_from(stat.f_type).is_ok_and(|kind| kind == NSFS_MAGIC)),
        Err(Errno::NOENT) => Ok(false),
        Err(errno) => Err(Error::io(format!("looking at {}", path.display()), errno.into())),
    }
}

/// Takes the name away; the namespace goes, with its links, when nobody is in it. Gone already is fine.
pub(crate) fn remove(path: &Path) -> Result<()> {
    let what = || format!("removing the network namespace {}", path.display());
    // Somebody may have mounted over it twice.
    for _ in 0..10 {
        match unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
            Ok(()) => {}
            Err(Errno::INVAL | Errno::NOENT) => return clawpot_host::fs::remove_file_if_exists(path),
            Err(errno) => return Err(Error::io(what(), errno.into())),
        }
    }
    Err(Error::new(Kind::Internal, format!("{}: mounted over again and again", what())))
}
