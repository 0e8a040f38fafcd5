//! Room held back so that a full disk can still be cleaned up (DESIGN §10).

use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use clawpot_types::{Error, Result};
use rustix::fs::FallocateFlags;

#[derive(Debug)]
pub(crate) struct Ballast {
    path: PathBuf,
    bytes: u64,
}

impl Ballast {
    pub(crate) fn new(dir: &Path, bytes: u64) -> Self {
        Self { path: dir.join("ballast"), bytes }
    }

    /// Takes the room. `Exhausted` where there is none; nothing is taken then.
    pub(crate) fn take(&self) -> Result<()> {
        if std::fs::metadata(&self.path).is_ok_and(|meta| meta.len() == self.bytes) {
            return Ok(());
        }
        let what = || format!("holding back {} bytes in {}", self.bytes, self.path.display());
        self.fill().map_err(|error| {
            let failed = Error::io(what(), error);
            match self.free() {
                Ok(()) => failed,
                Err(cleanup) => failed.and_cleanup(cleanup),
            }
        })
    }

    fn fill(&self) -> std::io::Result<()> {
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&self.path)?;
        match rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, self.bytes) {
            Ok(()) => Ok(()),
            Err(rustix::io::Errno::OPNOTSUPP) => self.write_out(&mut file),
            Err(errno) => Err(errno.into()),
        }
    }

    fn write_out(&self, file: &mut File) -> std::io::Result<()> {
        let block = [0u8; 4096];
        let mut left = self.bytes;
        while left > 0 {
            let length = usize::try_from(left).unwrap_or(block.len()).min(block.len());
            file.write_all(&block[..length])?;
            left -= u64::try_from(length).unwrap_or(left);
        }
        file.sync_all()
    }

    /// Whether there is room to take it and as much again, so that it is not taken and freed in turns.
    pub(crate) fn has_room(&self) -> bool {
        let Some(dir) = self.path.parent() else { return false };
        rustix::fs::statvfs(dir)
            .is_ok_and(|stat| stat.f_bavail.saturating_mul(stat.f_frsize) >= self.bytes.saturating_mul(2))
    }

    /// Gives the room up; also when it was not taken.
    pub(crate) fn free(&self) -> Result<()> {
        match std::fs::remove_file(&self.path) {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(Error::io(format!("removing {}", self.path.display()), error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;

    use super::*;

    #[test]
    fn it_really_occupies_blocks_and_goes() {
        let dir = tempfile::tempdir().unwrap();
        let ballast = Ballast::new(dir.path(), 1 << 20);
        ballast.take().unwrap();
        ballast.take().unwrap();
        let blocks = std::fs::metadata(dir.path().join("ballast")).unwrap().blocks();
        assert!(blocks * 512 >= 1 << 20, "{blocks} blocks of 512 bytes");
        ballast.free().unwrap();
        ballast.free().unwrap();
        assert!(!dir.path().join("ballast").exists());
    }

    #[test]
    fn the_way_without_fallocate_writes_all_of_it() {
        let dir = tempfile::tempdir().unwrap();
        let ballast = Ballast::new(dir.path(), 10_000);
        let mut file = File::create(dir.path().join("ballast")).unwrap();
        ballast.write_out(&mut file).unwrap();
        assert_eq!(std::fs::metadata(dir.path().join("ballast")).unwrap().len(), 10_000);
    }
}
