//! What builds said, in a file each. Bounded: each of them, how many, and all together; the oldest go first.

use std::fs::{File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

use bytes::Bytes;
use clawpot_core::ports::BoxStream;
use clawpot_host::fs;
use clawpot_types::{Error, Kind, Result, VmId};

/// Of one, bytes: the 16 MiB and the end that a builder's agent lets through, twice, as not all builders are ours.
const LARGEST: u64 = 32 << 20;
/// How many there are.
const MOST: usize = 64;
/// Of all together, bytes.
const ALL: u64 = 256 << 20;
/// Read at once, bytes.
const PIECE: usize = 64 << 10;
const ENDING: &str = ".log";

#[derive(Debug)]
pub struct Logs {
    dir: PathBuf,
    /// Held while one is written to or others are removed.
    writing: Mutex<()>,
}

impl Logs {
    /// Below the state directory.
    pub fn open(state: &Path) -> Result<Self> {
        let dir = state.join("build-logs");
        fs::ensure_dir(&dir, 0o700)?;
        Ok(Self { dir, writing: Mutex::new(()) })
    }

    fn path(&self, build: &VmId) -> PathBuf {
        self.dir.join(format!("{build}{ENDING}"))
    }

    /// Not synced: what a crash takes of it is a line or two.
    pub fn add(&self, build: &VmId, text: &str) -> Result<()> {
        let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let path = self.path(build);
        let failed = |error| Error::io(format!("writing the build's log {}", path.display()), error);
        if !path.exists() {
            self.make_room()?;
        }
        let mut file = OpenOptions::new().append(true).create(true).mode(0o600).open(&path).map_err(failed)?;
        let size = file.metadata().map_err(failed)?.len();
        if size >= LARGEST {
            return Ok(());
        }
        let note = "\n[the log is full: what follows is not kept]\n";
        let fits = usize::try_from(LARGEST - size).unwrap_or(usize::MAX);
        match text.as_bytes().get(..fits) {
            Some(head) if head.len() < text.len() => {
                file.write_all(head).and_then(|()| file.write_all(note.as_bytes()))
            }
            _ => file.write_all(text.as_bytes()),
        }
        .map_err(failed)
    }

    /// For one more.
    fn make_room(&self) -> Result<()> {
        let failed = |error| Error::io(format!("listing {}", self.dir.display()), error);
        let mut logs: Vec<(SystemTime, u64, PathBuf)> = Vec::new();
        for entry in std::fs::read_dir(&self.dir).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let meta = entry.metadata().map_err(failed)?;
            if meta.is_file() && entry.file_name().to_string_lossy().ends_with(ENDING) {
                logs.push((meta.modified().map_err(failed)?, meta.len(), entry.path()));
            }
        }
        // Those that are being written to are the newest.
        logs.sort_by(|one, other| other.cmp(one));
        let mut all = LARGEST;
        for (kept, (_, size, path)) in logs.into_iter().enumerate() {
            all = all.saturating_add(size);
            if kept + 1 >= MOST || all > ALL {
                fs::remove_file_if_exists(&path)?;
            }
        }
        Ok(())
    }

    pub fn open_one(&self, build: &VmId) -> Result<File> {
        let path = self.path(build);
        File::open(&path).map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => {
                let what = format!("build-{build}: there is no log of it here");
                Error::new(Kind::NotFound, what)
                    .hint(format!("the last {MOST} are kept on the host that built; `clawpot events` names builds"))
            }
            _ => Error::io(format!("opening the build's log {}", path.display()), error),
        })
    }
}

/// As far as it goes when the end of it is reached.
pub fn stream(file: File) -> BoxStream<Result<Bytes>> {
    let pieces = futures_util::stream::try_unfold(file, |mut file| async move {
        crate::build::blocking(move || {
            let mut piece = vec![0; PIECE];
            let read = file.read(&mut piece).map_err(|error| Error::io("reading a build's log", error))?;
            piece.truncate(read);
            Ok((read > 0).then(|| (Bytes::from(piece), file)))
        })
        .await
    });
    Box::pin(pieces)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Its letters are few.
    fn id(n: u8) -> VmId {
        let mut random = [n % 32; VmId::LEN];
        random[0] = n / 32;
        VmId::from_random(random)
    }

    fn text(logs: &Logs, build: &VmId) -> String {
        std::io::read_to_string(logs.open_one(build).unwrap()).unwrap()
    }

    #[test]
    fn logs_are_bounded_each_and_together() {
        let dir = tempfile::tempdir().unwrap();
        let logs = Logs::open(dir.path()).unwrap();
        assert_eq!(logs.open_one(&id(1)).unwrap_err().kind(), Kind::NotFound);
        logs.add(&id(1), "a\n").unwrap();
        logs.add(&id(1), "b\n").unwrap();
        assert_eq!(text(&logs, &id(1)), "a\nb\n");
        // Nothing is cut that fits, and no more is written behind what did not.
        let half = "ä".repeat(usize::try_from(LARGEST / 4).unwrap());
        for _ in 0..4 {
            logs.add(&id(2), &half).unwrap();
        }
        let all = std::fs::read(logs.path(&id(2))).unwrap();
        assert!(all.len() < usize::try_from(LARGEST).unwrap() + 100, "{}", all.len());
        logs.add(&id(3), "x").unwrap();
        logs.add(&id(3), &half).unwrap();
        logs.add(&id(3), &half).unwrap();
        let all = std::fs::read(logs.path(&id(3))).unwrap();
        assert!(all.ends_with(b"what follows is not kept]\n"), "{:?}", &all[all.len() - 60..]);
        for n in 4..100 {
            logs.add(&id(n), "x").unwrap();
            // The clock of a file system is coarse.
            let then = SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(n.into());
            File::options().write(true).open(logs.path(&id(n))).unwrap().set_modified(then).unwrap();
        }
        assert_eq!(std::fs::read_dir(&logs.dir).unwrap().count(), MOST);
        text(&logs, &id(99));
        // What was written last stays, and that is those that bear today's date.
        text(&logs, &id(2));
        logs.open_one(&id(4)).unwrap_err();
    }
}
