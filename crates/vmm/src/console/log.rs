//! One VM's console log: `console.log` and the one before it, `console.log.1`.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use clawpot_types::{Error, Result};
use tokio::sync::watch;

/// Size at which a file becomes the older one: a boot prints 60 KiB at most, so some boots are kept.
const FILE_LIMIT: u64 = 1 << 20;
/// Most that is read at once.
const CHUNK: usize = 64 << 10;
/// Longest line of a tail, characters.
const LINE_LIMIT: usize = 500;
/// Most that a tail looks at, bytes: hostile lines may be as long as the log.
const TAIL_LIMIT: u64 = 256 << 10;
/// A kernel's last line, and what its VMM says after it, bytes.
const ENDING: u64 = 4 << 10;

/// Offsets count from the start of what was kept when the daemon first looked, and go on through rotations.
#[derive(Debug)]
pub(super) struct Log {
    dir: PathBuf,
    files: Mutex<Option<Files>>,
    /// Offset of the end; `u64::MAX`: closed.
    written: watch::Sender<u64>,
}

#[derive(Debug)]
struct Files {
    older: Option<File>,
    older_len: u64,
    current: File,
    current_len: u64,
    /// Offset of the first byte of `current`.
    base: u64,
}

impl Log {
    pub(super) fn new(dir: PathBuf) -> Self {
        Self { dir, files: Mutex::new(None), written: watch::Sender::new(0) }
    }

    /// Tells of everything appended, and of the close.
    pub(super) fn watch(&self) -> watch::Receiver<u64> {
        self.written.subscribe()
    }

    pub(super) fn is_closed(&self) -> bool {
        *self.written.borrow() == u64::MAX
    }

    /// Nothing is written any more; followers end.
    pub(super) fn close(&self) {
        let files = self.files();
        self.written.send_replace(u64::MAX);
        drop(files);
    }

    /// Makes the files when they are not there.
    pub(super) fn append(&self, bytes: &[u8]) -> Result<()> {
        let mut files = self.files();
        if self.is_closed() {
            return Ok(());
        }
        let what = |error| Error::io(format!("writing {}", self.dir.join(CURRENT).display()), error);
        let open = match &mut *files {
            Some(open) => open,
            none => none.insert(Files::open(&self.dir, true).map_err(what)?),
        };
        open.append(&self.dir, bytes).map_err(what)?;
        self.written.send_replace(open.base + open.current_len);
        Ok(())
    }

    /// What is kept from `at` on, at most a chunk, and where to read next. What was rotated away is skipped.
    pub(super) fn read(&self, at: u64) -> Result<(Vec<u8>, u64)> {
        self.with_files((Vec::new(), at), |files| {
            let at = at.clamp(files.start(), files.end());
            let bytes = files.read(at, CHUNK)?;
            let next = at + bytes.len() as u64;
            Ok((bytes, next))
        })
    }

    /// Where the last `lines` lines begin; 0: where all that is kept begins.
    pub(super) fn start_of_last(&self, lines: usize) -> Result<u64> {
        self.with_files(0, |files| {
            let mut at = files.end();
            if lines == 0 {
                return Ok(files.start());
            }
            let mut wanted = lines;
            while at > files.start() {
                let from = at.saturating_sub(CHUNK as u64).max(files.start());
                let bytes = files.read_exactly(from, at)?;
                for (index, byte) in bytes.iter().enumerate().rev() {
                    let here = from + index as u64;
                    // The newline that ends the last line begins none.
                    if *byte == b'\n' && here + 1 < files.end() {
                        wanted -= 1;
                        if wanted == 0 {
                            return Ok(here + 1);
                        }
                    }
                }
                at = from;
            }
            Ok(files.start())
        })
    }

    pub(super) fn tail(&self, lines: usize) -> Result<Vec<String>> {
        let mut all = self.last(TAIL_LIMIT)?;
        Ok(all.split_off(all.len().saturating_sub(lines)))
    }

    /// The lines of the last few KiB.
    pub(super) fn ending(&self) -> Result<Vec<String>> {
        self.last(ENDING)
    }

    fn last(&self, most: u64) -> Result<Vec<String>> {
        let bytes = self.with_files(Vec::new(), |files| {
            let from = files.end().saturating_sub(most).max(files.start());
            files.read_exactly(from, files.end())
        })?;
        Ok(String::from_utf8_lossy(&bytes).lines().map(legible).collect())
    }

    /// `nothing` when there is no log.
    fn with_files<T>(&self, nothing: T, work: impl FnOnce(&Files) -> io::Result<T>) -> Result<T> {
        let what = |error| Error::io(format!("reading {}", self.dir.join(CURRENT).display()), error);
        let mut files = self.files();
        if self.is_closed() {
            return Ok(nothing);
        }
        if files.is_none() {
            match Files::open(&self.dir, false) {
                Ok(open) => *files = Some(open),
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(nothing),
                Err(error) => return Err(what(error)),
            }
        }
        files.as_ref().map_or(Ok(nothing), |files| work(files).map_err(what))
    }

    fn files(&self) -> MutexGuard<'_, Option<Files>> {
        // A panic half-way through an append loses console output, no more.
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A guest may print what it likes: a terminal is not to obey it.
fn legible(line: &str) -> String {
    let line = line.trim_end_matches('\r');
    line.chars().take(LINE_LIMIT).map(|c| if c.is_control() && c != '\t' { '\u{fffd}' } else { c }).collect()
}

const CURRENT: &str = "console.log";
const OLDER: &str = "console.log.1";

impl Files {
    fn open(dir: &Path, make: bool) -> io::Result<Self> {
        if make {
            std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        }
        let current = Self::open_current(dir, make)?;
        let older = match File::open(dir.join(OLDER)) {
            Ok(older) => Some(older),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(error),
        };
        let older_len = older.as_ref().map_or(Ok(0), |older| older.metadata().map(|meta| meta.len()))?;
        let current_len = current.metadata()?.len();
        Ok(Self { older, older_len, current, current_len, base: older_len })
    }

    fn open_current(dir: &Path, make: bool) -> io::Result<File> {
        File::options().read(true).append(true).create(make).mode(0o600).open(dir.join(CURRENT))
    }

    fn append(&mut self, dir: &Path, bytes: &[u8]) -> io::Result<()> {
        if self.current_len > 0 && self.current_len + bytes.len() as u64 > FILE_LIMIT {
            std::fs::rename(dir.join(CURRENT), dir.join(OLDER))?;
            let new = Self::open_current(dir, true)?;
            self.base += self.current_len;
            self.older_len = self.current_len;
            self.older = Some(std::mem::replace(&mut self.current, new));
            self.current_len = 0;
        }
        self.current.write_all(bytes)?;
        self.current_len += bytes.len() as u64;
        Ok(())
    }

    fn start(&self) -> u64 {
        self.base - self.older_len
    }

    fn end(&self) -> u64 {
        self.base + self.current_len
    }

    /// At most `most` bytes from `at` on, of one file; none at the end.
    fn read(&self, at: u64, most: usize) -> io::Result<Vec<u8>> {
        let (file, from, len) = match &self.older {
            Some(older) if at < self.base => (older, at - self.start(), self.older_len),
            _ => (&self.current, at - self.base, self.current_len),
        };
        let left = usize::try_from(len.saturating_sub(from)).unwrap_or(usize::MAX);
        let mut bytes = vec![0; left.min(most)];
        file.read_exact_at(&mut bytes, from)?;
        Ok(bytes)
    }

    fn read_exactly(&self, from: u64, to: u64) -> io::Result<Vec<u8>> {
        let mut all = Vec::new();
        let mut at = from;
        while at < to {
            let bytes = self.read(at, usize::try_from(to - at).unwrap_or(usize::MAX))?;
            at += bytes.len() as u64;
            all.extend_from_slice(&bytes);
        }
        Ok(all)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log() -> (tempfile::TempDir, Log) {
        let dir = tempfile::tempdir().unwrap();
        let log = Log::new(dir.path().join("vm"));
        (dir, log)
    }

    fn all(log: &Log, mut at: u64) -> Vec<u8> {
        let mut all = Vec::new();
        loop {
            let (bytes, next) = log.read(at).unwrap();
            if bytes.is_empty() {
                return all;
            }
            all.extend(bytes);
            at = next;
        }
    }

    #[test]
    fn nothing_is_read_of_nothing() {
        let (dir, log) = log();
        assert!(all(&log, 0).is_empty());
        assert!(log.tail(5).unwrap().is_empty());
        assert_eq!(log.start_of_last(5).unwrap(), 0);
        assert!(!dir.path().join("vm").exists(), "reading made something");
    }

    #[test]
    fn the_last_lines() {
        let (_dir, log) = log();
        log.append(b"one\ntwo\r\nthree\x1b[2J\nfo").unwrap();
        log.append(b"ur").unwrap();
        assert_eq!(log.tail(2).unwrap(), ["three\u{fffd}[2J", "four"]);
        assert_eq!(log.tail(9).unwrap()[1], "two");
        assert_eq!(all(&log, log.start_of_last(1).unwrap()), b"four");
        assert_eq!(all(&log, log.start_of_last(3).unwrap()), b"two\r\nthree\x1b[2J\nfour");
        log.append(b"\n").unwrap();
        assert_eq!(all(&log, log.start_of_last(1).unwrap()), b"four\n");
        assert_eq!(all(&log, log.start_of_last(0).unwrap()), all(&log, 0));
        log.append("x".repeat(2000).as_bytes()).unwrap();
        assert_eq!(log.tail(1).unwrap()[0].len(), LINE_LIMIT);
    }

    #[test]
    fn two_files_of_bounded_size_read_as_one() {
        let (dir, log) = log();
        let line = |n: u32| format!("{n:07}\n");
        for n in 0..400_000 {
            log.append(line(n).as_bytes()).unwrap();
        }
        let kept: u64 =
            std::fs::read_dir(dir.path().join("vm")).unwrap().map(|e| e.unwrap().metadata().unwrap().len()).sum();
        assert!(kept <= 2 * FILE_LIMIT && kept > FILE_LIMIT, "{kept}");
        let text = String::from_utf8(all(&log, 0)).unwrap();
        assert_eq!(text.len() as u64, kept);
        let numbers: Vec<u32> = text.lines().map(|line| line.parse().unwrap()).collect();
        assert!(numbers.windows(2).all(|pair| pair[0] + 1 == pair[1]) && numbers.last() == Some(&399_999));
        let last = all(&log, log.start_of_last(130_000).unwrap());
        assert_eq!(last, (270_000..400_000).map(line).collect::<String>().into_bytes());
        // Another daemon sees the same.
        let again = Log::new(dir.path().join("vm"));
        assert_eq!(all(&again, 0), text.into_bytes());
        assert_eq!(again.tail(1).unwrap(), ["0399999"]);
    }
}
