//! From a FIFO into a log.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

use clawpot_types::{Error, Result};
use rustix::io::Errno;
use tokio::io::Interest;
use tokio::task::JoinHandle;

use super::log::Log;

/// Most that is moved before others get their turn, bytes.
const TURN: usize = 256 << 10;

/// Drains one FIFO for as long as it lives.
#[derive(Debug)]
pub(super) struct Drain {
    source: Arc<Source>,
    task: JoinHandle<()>,
}

#[derive(Debug)]
struct Source {
    fifo: OwnedFd,
    log: Arc<Log>,
    /// Held from read to write, so that two who pump keep the order.
    pumping: Mutex<()>,
}

/// One [`Source::pump`] to be run.
pub(super) struct Pump(Arc<Source>);

impl Pump {
    pub(super) async fn run(self) {
        report(tokio::task::spawn_blocking(move || self.0.pump()).await.map_err(io::Error::other));
    }
}

fn report(pumped: io::Result<Result<bool>>) -> bool {
    match pumped.map_err(|error| Error::io("draining a console", error)).flatten() {
        Ok(more) => more,
        Err(error) => {
            tracing::warn!(error = error.chain(), "console output is lost");
            false
        }
    }
}

impl Drain {
    pub(super) fn start(fifo: OwnedFd, log: Arc<Log>) -> Result<Self> {
        let failed = |error| Error::io("watching a console", error);
        if was_full(&fifo) {
            log.append(b"\n--- the console was full while no server read it; what followed was dropped ---\n")?;
        }
        let watched =
            fifo.try_clone().and_then(|fifo| clawpot_host::watch(fifo, Interest::READABLE)).map_err(failed)?;
        let source = Arc::new(Source { fifo, log, pumping: Mutex::new(()) });
        let pumped = source.clone();
        let task = tokio::spawn(async move {
            loop {
                let Ok(mut guard) = watched.readable().await else { return };
                let pumped = pumped.clone();
                let more = tokio::task::spawn_blocking(move || pumped.pump()).await.map_err(io::Error::other);
                if !report(more) {
                    guard.clear_ready();
                }
            }
        });
        Ok(Self { source, task })
    }

    pub(super) fn pump(&self) -> Pump {
        Pump(self.source.clone())
    }

    /// The last of it.
    pub(super) async fn finish(self) {
        self.pump().run().await;
    }
}

impl Drop for Drain {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Source {
    /// Moves what waits. `true`: there may be more.
    fn pump(&self) -> Result<bool> {
        let _order = self.pumping.lock().unwrap_or_else(PoisonError::into_inner);
        let mut buffer = vec![0; 64 << 10];
        let mut moved = 0;
        while moved < TURN {
            match rustix::io::read(&self.fifo, &mut buffer[..]) {
                Ok(0) | Err(Errno::AGAIN) => return Ok(false),
                Ok(read) => {
                    self.log.append(&buffer[..read])?;
                    moved += read;
                }
                Err(Errno::INTR) => {}
                Err(errno) => return Err(Error::io("reading a console", errno.into())),
            }
        }
        Ok(true)
    }
}

/// Whether a VMM may have found no room: less than a page is free.
fn was_full(fifo: &impl AsFd) -> bool {
    let (Ok(waiting), Ok(room)) = (rustix::io::ioctl_fionread(fifo), rustix::pipe::fcntl_getpipe_size(fifo)) else {
        return false;
    };
    waiting.saturating_add(4096) > room as u64
}
