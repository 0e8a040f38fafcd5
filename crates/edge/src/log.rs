//! The log of a process that nobody may be there to read: standard error, a file that starts anew when it is full.

use std::io::{self, Write};
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes after which the file starts anew: some ten thousand lines.
const LIMIT: u64 = 1 << 20;

/// Standard error, as a file opened for appending. On anything else (a terminal, a pipe) it grows as that does.
#[derive(Debug)]
pub struct BoundedStderr {
    written: &'static AtomicU64,
}

static WRITTEN: AtomicU64 = AtomicU64::new(0);

impl BoundedStderr {
    #[must_use]
    pub fn new() -> Self {
        Self { written: &WRITTEN }
    }
}

impl Default for BoundedStderr {
    fn default() -> Self {
        Self::new()
    }
}

impl Write for BoundedStderr {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let length = u64::try_from(bytes.len()).unwrap_or(LIMIT);
        if self.written.fetch_add(length, Ordering::Relaxed) + length > LIMIT {
            self.written.store(length, Ordering::Relaxed);
            // What is no file cannot be cut short; then there is nothing to bound.
            rustix::fs::ftruncate(io::stderr(), 0).unwrap_or_default();
        }
        io::stderr().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

/// To standard error from now on: warnings of libraries, and what we tell.
pub fn start() {
    let filter = tracing_subscriber::EnvFilter::new("warn,clawpot_edge=info");
    tracing_subscriber::fmt().with_env_filter(filter).with_ansi(false).with_writer(BoundedStderr::new).init();
}
