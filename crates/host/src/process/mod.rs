//! Processes: the one place where they are spawned.
//!
//! - [`Spawn`] what a child is to be; it enters cgroup, netns, directory and user before it runs a line of its program
//! - [`Child`] a process of ours, waited for by pidfd; nobody's SIGCHLD is touched
//! - [`Tool`] a short-lived helper such as `nft`: bounded input, output and time
//! - [`Identity`] which process was meant, proven after a restart of the daemon

mod child;
mod enter;
mod identity;
mod spawn;
mod tool;

use std::ffi::OsStr;
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use clawpot_types::{Error, Kind, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

pub use child::{Child, Exit};
pub use identity::{Identity, Proof, user_of};
pub use spawn::{Output, Rlimits, Spawn, User};
pub use tool::{Finished, Tool};

pub(crate) use identity::{cgroup_of, is_kernel_thread};

/// Whether the process still runs; a zombie does not. A descriptor never comes to mean another process.
pub fn is_alive(pidfd: &impl AsFd) -> Result<bool, Errno> {
    let mut fds = [PollFd::new(pidfd, PollFlags::IN)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    loop {
        match poll(&mut fds, Some(&now)) {
            Ok(ready) => return Ok(ready == 0),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
}

/// Lets this process have as many descriptors open as it ever may: the 1024 that a service gets by default are for programs
/// that use `select`, and a machine takes about eight. Children are given theirs by [`Rlimits`]. Gives the number.
pub fn raise_open_files() -> Result<u64> {
    let resource = rustix::process::Resource::Nofile;
    let limit = rustix::process::getrlimit(resource);
    let raised = rustix::process::Rlimit { current: limit.maximum, ..limit };
    rustix::process::setrlimit(resource, raised)
        .map_err(|errno| crate::failed("raising the limit of open files", errno))?;
    Ok(limit.maximum.unwrap_or(u64::MAX))
}

/// Returns once the process behind `pidfd` has ended; at once if it has. Needs not be a child. Cancellation is harmless.
pub async fn ended(pidfd: &impl AsFd) -> Result<()> {
    let failed = |error| Error::io("waiting for a process to end", error);
    let own = pidfd.as_fd().try_clone_to_owned().map_err(failed)?;
    let watched = crate::watch(own, tokio::io::Interest::READABLE).map_err(failed)?;
    watched.readable().await.map(drop).map_err(failed)
}

/// Where `name` is: an absolute path is taken as it is, else the first executable of that name in `path` (as `$PATH`),
/// then in the system's own directories for administrators.
pub fn find_program(name: &str, path: Option<&OsStr>) -> Result<PathBuf> {
    let is_program = |file: &Path| {
        std::fs::metadata(file).is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
    };
    let missing =
        |what: String| Error::new(Kind::NotFound, what).hint(format!("install {name}, or configure its path"));
    if name.contains('/') {
        let file = PathBuf::from(name);
        return match is_program(&file) && file.is_absolute() {
            true => Ok(file),
            false => Err(missing(format!("the program {name} is not the absolute path of an executable file"))),
        };
    }
    let places: Vec<PathBuf> = path.map(|path| std::env::split_paths(path).collect()).unwrap_or_default();
    let system = ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"].map(PathBuf::from);
    places
        .into_iter()
        .filter(|dir| dir.is_absolute())
        .chain(system)
        .map(|dir| dir.join(name))
        .find(|file| is_program(file))
        .ok_or_else(|| missing(format!("the program {name} is in no directory of PATH")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_descriptors_may_be_used() {
        let most = raise_open_files().unwrap();
        let now = rustix::process::getrlimit(rustix::process::Resource::Nofile);
        assert_eq!((now.current, now.maximum.unwrap_or(u64::MAX)), (now.maximum, most));
    }

    #[test]
    fn programs_are_found_or_named() {
        assert!(find_program("sh", None).unwrap().is_absolute());
        assert!(find_program("/bin/sh", None).is_ok());
        for bad in ["no-such-program", "/etc/passwd", "./sh", "/nonexistent"] {
            let error = find_program(bad, None).unwrap_err();
            assert_eq!(error.kind(), Kind::NotFound, "{bad}");
            assert!(error.next_step().is_some());
        }
    }
}
