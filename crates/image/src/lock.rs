//! Locks between processes: `flock` on a file, let go by the kernel when its holder dies.

use std::fs::File;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
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
        let until = Instant::now() + patience;
        loop {
            if let Some(lock) = Self::try_exclusive(path)? {
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
        let what = || format!("locking {}", path.display());
        loop {
            let file = File::options().read(true).write(true).create(true).truncate(false).mode(0o644).open(path);
            let file = file.map_err(|error| Error::io(what(), error))?;
            match rustix::fs::flock(&file, how) {
                Ok(()) => {}
                Err(Errno::WOULDBLOCK) => return Ok(None),
                Err(Errno::INTR) => continue,
                Err(errno) => return Err(Error::io(what(), errno.into())),
            }
            // Its last holder may have removed the file while this one waited: a lock on it locks nobody out.
            let ours = file.metadata().map_err(|error| Error::io(what(), error))?;
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
