//! Users of the host that nobody else has, for helpers that work on what others made.

use std::fs::File;
use std::io::Write as _;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use clawpot_types::{Error, Kind, Result};

use crate::lock::Lock;

/// Owners on the host: 64 ranges of 65,536 above those of machines (1,900,000,000 and up) and below 2³¹.
const OWNERS_FROM: u32 = 2_000_000_000;
const OWNERS: u32 = 65_536;
const RANGES: u32 = 64;
/// Which range is whose, for all servers of the host.
const RANGES_DIR: &str = "/run/clawpot/unpack";

/// A range of owners that no other helper of this host has.
#[derive(Clone, Debug)]
pub struct Owners {
    pub from: u32,
    held: Arc<Lock>,
}

impl Owners {
    pub fn claim() -> Result<Self> {
        Self::claim_in(Path::new(RANGES_DIR))
    }

    fn claim_in(dir: &Path) -> Result<Self> {
        if let Some(above) = dir.parent() {
            std::fs::create_dir_all(above)
                .map_err(|error| Error::io(format!("making the directory {}", above.display()), error))?;
        }
        clawpot_host::fs::ensure_dir(dir, 0o700)?;
        for number in 0..RANGES {
            if let Some(held) = Lock::try_exclusive(&dir.join(number.to_string()))? {
                return Ok(Self { from: OWNERS_FROM + number * OWNERS, held: Arc::new(held) });
            }
        }
        let what = format!("working on what others made: all {RANGES} ranges of owners are in use");
        Err(Error::new(Kind::Exhausted, what).hint("wait until other pulls, imports and checks are done"))
    }

    /// For a process that has these owners: they are taken as long as it lives, also when this server does not any more.
    pub fn lock(&self) -> Result<OwnedFd> {
        let file = self.held.file().try_clone();
        file.map(OwnedFd::from).map_err(|error| Error::io("keeping the owners of a helper", error))
    }

    /// Gives them to the user namespace of the process `pid`, a child of ours that waits for it.
    pub fn map(&self, pid: u32) -> Result<()> {
        for kind in ["uid_map", "gid_map"] {
            let path = format!("/proc/{pid}/{kind}");
            let line = format!("0 {} {OWNERS}\n", self.from);
            File::options()
                .write(true)
                .open(&path)
                .and_then(|mut file| file.write_all(line.as_bytes()))
                .map_err(|error| Error::io(format!("writing {path}"), error))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use clawpot_host::process::Spawn;

    use super::*;

    #[tokio::test]
    async fn a_range_is_taken_as_long_as_a_helper_lives() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("ranges");
        let (first, second) = (Owners::claim_in(&dir).unwrap(), Owners::claim_in(&dir).unwrap());
        assert_eq!((first.from, second.from), (OWNERS_FROM, OWNERS_FROM + OWNERS));
        let helper = Spawn::new("/bin/sleep").args(["600"]).fd(first.lock().unwrap(), 4).spawn().unwrap();
        // As if this server had died.
        drop(first);
        assert_eq!(Owners::claim_in(&dir).unwrap().from, OWNERS_FROM + 2 * OWNERS);
        helper.kill().unwrap();
        helper.wait().await.unwrap();
        assert_eq!(Owners::claim_in(&dir).unwrap().from, OWNERS_FROM);
        let mode = std::fs::metadata(&dir).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700, "whoever can open a lock can hold it");
    }
}
