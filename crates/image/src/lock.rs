//! Locks between processes: `flock` on a file, let go by the kernel when its holder dies. Whoever can open the file, if only to read,
//! can hold the lock for ever: so nobody but its owner can.

use std::fs::{File, Permissions};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clawpot_types::{Error, Kind, Result};
use rustix::fs::FlockOperation;
use rustix::io::Errno;

/// Held until dropped.
#[derive(Debug)]
pub struct Lock {
    file: File,
}

impl Lock {
    /// `None`: somebody else has it. Blocks for no longer than a system call.
    pub fn try_exclusive(path: &Path) -> Result<Option<Self>> {
        Self::take(path, FlockOperation::NonBlockingLockExclusive)
    }

    /// Waits for it. Blocks.
    pub fn exclusive(path: &Path) -> Result<Self> {
        loop {
            if let Some(lock) = Self::take(path, FlockOperation::LockExclusive)? {
                return Ok(lock);
            }
        }
    }

    /// Waits for at most `patience`; `who` else may have it is told. Blocks.
    pub fn exclusive_within(path: &Path, patience: Duration, who: &str) -> Result<Self> {
        Self::within(patience, (path, who), || Self::try_exclusive(path))
    }

    /// The same for a lock that scripts take, which any user may run.
    pub fn public_within(path: &Path, patience: Duration, who: &str) -> Result<Self> {
        Self::within(patience, (path, who), || Self::open(path, 0o644, FlockOperation::NonBlockingLockExclusive))
    }

    fn within(
        patience: Duration,
        (path, who): (&Path, &str),
        attempt: impl Fn() -> Result<Option<Self>>,
    ) -> Result<Self> {
        let until = Instant::now() + patience;
        loop {
            if let Some(lock) = attempt()? {
                return Ok(lock);
            }
            if Instant::now() >= until {
                let what = format!("{}: locked by {who} for over {} s", path.display(), patience.as_secs());
                return Err(Error::new(Kind::Unavailable, what).hint("try again when it is done"));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn take(path: &Path, how: FlockOperation) -> Result<Option<Self>> {
        Self::open(path, 0o600, how)
    }

    fn open(path: &Path, mode: u32, how: FlockOperation) -> Result<Option<Self>> {
        let what = || format!("locking {}", path.display());
        loop {
            let file = File::options().read(true).write(true).create(true).truncate(false).mode(mode).open(path);
            let file = file.map_err(|error| Error::io(what(), error))?;
            let ours = file.metadata().map_err(|error| Error::io(what(), error))?;
            // Those of earlier versions all could read. What nobody writes to any more is a download that is done, and no lock.
            if ours.mode() & 0o777 & !mode != 0 && ours.mode() & 0o200 != 0 {
                file.set_permissions(Permissions::from_mode(mode)).map_err(|error| Error::io(what(), error))?;
            }
            match rustix::fs::flock(&file, how) {
                Ok(()) => {}
                Err(Errno::WOULDBLOCK) => return Ok(None),
                Err(Errno::INTR) => continue,
                Err(errno) => return Err(Error::io(what(), errno.into())),
            }
            // Its last holder may have removed the file while this one waited: a lock on it locks nobody out.
            if std::fs::metadata(path).is_ok_and(|now| (now.dev(), now.ino()) == (ours.dev(), ours.ino())) {
                return Ok(Some(Self { file }));
            }
        }
    }

    #[must_use]
    pub const fn file(&self) -> &File {
        &self.file
    }
}

/// A lock whose file goes with it.
#[derive(Debug)]
pub struct Lease {
    path: PathBuf,
    lock: Lock,
}

impl Lease {
    #[must_use]
    pub const fn new(path: PathBuf, lock: Lock) -> Self {
        Self { path, lock }
    }

    #[must_use]
    pub const fn file(&self) -> &File {
        self.lock.file()
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        // While it is still locked, so that nobody else's is removed.
        if let Err(error) = clawpot_host::fs::remove_file_if_exists(&self.path) {
            tracing::warn!(error = error.chain(), "a lease stays; the next `image gc` removes it");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_else_can_hold_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let mode = || std::fs::metadata(&path).unwrap().mode() & 0o777;
        drop(Lock::try_exclusive(&path).unwrap().unwrap());
        assert_eq!(mode(), 0o600);
        // An earlier version's, which somebody holds who need not even be able to write.
        std::fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
        let reader = File::open(&path).unwrap();
        rustix::fs::flock(&reader, FlockOperation::LockShared).unwrap();
        assert!(Lock::try_exclusive(&path).unwrap().is_none());
        assert_eq!(mode(), 0o600, "he is the last");
        drop(reader);
        assert!(Lock::try_exclusive(&path).unwrap().is_some());
        let scripts = dir.path().join("scripts");
        drop(Lock::public_within(&scripts, Duration::ZERO, "a script").unwrap());
        assert_eq!(std::fs::metadata(&scripts).unwrap().mode() & 0o777, 0o644);
    }
}
