//! What a build says, in bounds: the beginning as it comes, to the host and into a file, and at the end the end.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

use clawpot_common::builder::MAX_LOG_LINE;

/// Passed on as it comes, bytes; what follows is only counted.
pub const HEAD: u64 = 16 << 20;
/// Kept of the rest, bytes: the last words tell why a build failed.
pub const TAIL: usize = 64 << 10;

/// A build's log.
#[derive(Debug)]
pub struct Log {
    /// `None`: there is none, or it could not be written any more.
    file: Option<File>,
    /// The error that ended it.
    broken: Option<io::Error>,
    head_limit: u64,
    /// Bytes in all, and those passed on.
    total: u64,
    passed: u64,
    tail: VecDeque<u8>,
    /// A line whose end has not come yet.
    part: Vec<u8>,
}

impl Log {
    /// Into a new file.
    pub fn create(path: &Path) -> io::Result<Self> {
        Ok(Self::new(Some(File::create(path)?), HEAD))
    }

    fn new(file: Option<File>, head_limit: u64) -> Self {
        let (tail, part) = (VecDeque::with_capacity(TAIL), Vec::with_capacity(MAX_LOG_LINE));
        Self { file, broken: None, head_limit, total: 0, passed: 0, tail, part }
    }

    /// Takes what the build wrote; gives the lines that the host is to hear now.
    pub fn push(&mut self, bytes: &[u8]) -> Vec<String> {
        self.total += wide(bytes.len());
        let fits = usize::try_from(self.head_limit - self.passed).unwrap_or(usize::MAX).min(bytes.len());
        let head = bytes.get(..fits).unwrap_or_default();
        self.passed += wide(head.len());
        self.write(head);
        let last = bytes.get(bytes.len().saturating_sub(TAIL)..).unwrap_or_default();
        let over = (self.tail.len() + last.len()).saturating_sub(TAIL);
        self.tail.drain(..over);
        self.tail.extend(last);
        self.lines(head)
    }

    /// The end: what was left out is counted, the last of it kept. The file is on the disk when this returns.
    pub fn finish(&mut self) -> Vec<String> {
        let mut lines = Vec::new();
        self.end_line(&mut lines);
        let rest = self.total - self.passed;
        let kept = usize::try_from(rest).unwrap_or(usize::MAX).min(self.tail.len());
        if rest > 0 {
            let last: Vec<u8> = self.tail.iter().skip(self.tail.len() - kept).copied().collect();
            let note = format!("[{} bytes of output left out here]", rest - wide(kept));
            self.write(format!("\n{note}\n").as_bytes());
            self.write(&last);
            lines.push(note);
            lines.extend(self.lines(&last));
            self.end_line(&mut lines);
        }
        if let Some(file) = &self.file
            && let Err(error) = file.sync_all()
        {
            self.broken = Some(error);
        }
        lines
    }

    /// Why the file does not have all that it should.
    pub fn broken(&self) -> Option<&io::Error> {
        self.broken.as_ref()
    }

    /// For a message: the last error that nix told of, or else the last lines.
    pub fn last_words(&self) -> String {
        const MOST: usize = 2 << 10;
        let bytes: Vec<u8> = self.tail.iter().copied().collect();
        let text = String::from_utf8_lossy(&bytes);
        let lines: Vec<&str> = text.lines().map(str::trim_end).filter(|line| !line.is_empty()).collect();
        let error = lines.iter().rposition(|line| line.starts_with("error:"));
        let from = error.unwrap_or_else(|| lines.len().saturating_sub(3));
        let words = lines.get(from..).unwrap_or_default().join("\n");
        match words.char_indices().nth(MOST) {
            Some((end, _)) => format!("{}…", words.get(..end).unwrap_or_default()),
            None => words,
        }
    }

    fn write(&mut self, bytes: &[u8]) {
        let Some(file) = &mut self.file else { return };
        if let Err(error) = file.write_all(bytes) {
            self.broken = Some(error);
            self.file = None;
        }
    }

    /// Whole lines of `bytes` behind what is left of the last; a long one in pieces.
    fn lines(&mut self, bytes: &[u8]) -> Vec<String> {
        let mut lines = Vec::new();
        for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
            let (text, ended) = match piece.strip_suffix(b"\n") {
                Some(text) => (text, true),
                None => (piece, false),
            };
            let mut text = text;
            while self.part.len() + text.len() > MAX_LOG_LINE {
                let (now, later) = text.split_at(MAX_LOG_LINE - self.part.len());
                self.part.extend_from_slice(now);
                text = later;
                self.end_line(&mut lines);
            }
            self.part.extend_from_slice(text);
            if ended {
                let line = std::mem::take(&mut self.part);
                lines.push(spoken(&line));
            }
        }
        lines
    }

    fn end_line(&mut self, lines: &mut Vec<String>) {
        if !self.part.is_empty() {
            lines.push(spoken(&std::mem::take(&mut self.part)));
        }
    }
}

/// A terminal's way to begin a line anew says nothing in a log.
fn spoken(line: &[u8]) -> String {
    String::from_utf8_lossy(line).trim_end_matches('\r').to_owned()
}

fn wide(size: usize) -> u64 {
    u64::try_from(size).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use proptest::prelude::*;

    use super::*;

    fn log(head: u64) -> (Log, tempfile::NamedTempFile) {
        let file = tempfile::NamedTempFile::new().unwrap();
        (Log::new(Some(file.reopen().unwrap()), head), file)
    }

    fn content(file: &tempfile::NamedTempFile) -> Vec<u8> {
        let mut bytes = Vec::new();
        file.reopen().unwrap().read_to_end(&mut bytes).unwrap();
        bytes
    }

    #[test]
    fn a_flood_keeps_its_beginning_and_its_end() {
        let (mut log, file) = log(1000);
        let mut heard = Vec::new();
        for number in 0..100_000 {
            heard.extend(log.push(format!("line {number}\n").as_bytes()));
            assert!(log.tail.len() <= TAIL && log.part.len() <= MAX_LOG_LINE);
        }
        heard.extend(log.finish());
        assert_eq!(heard[0], "line 0");
        assert_eq!(heard.last().unwrap(), "line 99999");
        let size: usize = heard.iter().map(String::len).sum();
        assert!(size < 1000 + TAIL + 100, "{size}");
        let file = String::from_utf8(content(&file)).unwrap();
        assert!(file.starts_with("line 0\nline 1\n") && file.ends_with("\nline 99999\n"));
        let note = file.lines().find(|line| line.ends_with("bytes of output left out here]")).unwrap();
        let left_out: usize = note.trim_start_matches('[').split(' ').next().unwrap().parse().unwrap();
        let all: usize = (0..100_000).map(|number| format!("line {number}\n").len()).sum();
        // The note stands between two newlines of its own.
        assert_eq!(file.len() - (note.len() + 2) + left_out, all);
    }

    #[test]
    fn the_last_error_is_the_reason() {
        let (mut log, _file) = log(HEAD);
        log.push(b"error: old\nbuilding\nerror: flake has no such thing\n       Did you mean x?\n");
        assert_eq!(log.last_words(), "error: flake has no such thing\n       Did you mean x?");
        let (mut log, _file) = self::log(HEAD);
        log.push(b"1\n2\n\n3\n4");
        assert_eq!(log.last_words(), "2\n3\n4");
        log.push("ä".repeat(TAIL).as_bytes());
        assert!(log.last_words().len() <= 3 * (2 << 10));
    }

    #[test]
    fn a_full_disk_stops_the_file_and_not_the_build() {
        let mut log = Log::new(Some(File::options().write(true).open("/dev/full").unwrap()), HEAD);
        assert_eq!(log.push(b"a\nb"), ["a"]);
        assert_eq!(log.finish(), ["b"]);
        assert_eq!(log.broken().unwrap().kind(), io::ErrorKind::StorageFull);
    }

    proptest! {
        #[test]
        fn lines_are_what_was_written(
            text in "[a-z\n]{0,200}", long in 0_usize..3 * MAX_LOG_LINE, pieces in proptest::collection::vec(1_usize..5000, 1..5)
        ) {
            let text = format!("{text}{}\nlast", "x".repeat(long));
            let (mut log, file) = log(HEAD);
            let (mut heard, mut rest) = (Vec::new(), text.as_bytes());
            for size in pieces.iter().cycle() {
                let (now, later) = rest.split_at((*size).min(rest.len()));
                heard.extend(log.push(now));
                rest = later;
                if rest.is_empty() {
                    break;
                }
            }
            heard.extend(log.finish());
            prop_assert!(heard.iter().all(|line| line.len() <= MAX_LOG_LINE));
            prop_assert_eq!(heard.concat(), text.replace('\n', ""));
            prop_assert_eq!(content(&file), text.into_bytes());
        }
    }
}
