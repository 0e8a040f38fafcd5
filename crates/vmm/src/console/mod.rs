//! Consoles: what VMMs and their guests print.
//!
//! A VMM's standard output is a FIFO that it and the daemon hold open for reading and writing, so it never sees EPIPE and
//! never blocks: while no daemon reads, 64 KiB are kept and the rest is dropped by the VMM. The daemon drains it into
//! `STATE/logs/<vm>/console.log`, which becomes `console.log.1` when it is full. What is kept of a VM spans its boots.
//!
//! - [`log`] the two files
//! - [`drain`] from a FIFO into them
//! - here: who drains what, and the [`Console`] port

mod drain;
mod log;

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use bytes::Bytes;
use clawpot_core::ports::{BoxStream, Console};
use clawpot_core::{LastWords, MachineId};
use clawpot_failpoint::{self as failpoint, Point};
use clawpot_types::{Error, Kind, Result, VmId};

use tokio::sync::watch;

use drain::Drain;
use log::Log;

/// All consoles of one state directory. Cheap to clone; clones share.
#[derive(Clone, Debug)]
pub struct Consoles {
    /// `STATE/logs`.
    base: PathBuf,
    shared: Arc<Mutex<Shared>>,
}

#[derive(Debug, Default)]
struct Shared {
    logs: BTreeMap<VmId, Arc<Log>>,
    drains: BTreeMap<MachineId, Drain>,
}

/// The VMM's end of its console, and ours: whoever holds it keeps the FIFO from closing.
pub(crate) fn open(fifo: &Path) -> Result<OwnedFd> {
    use rustix::fs::{Mode, OFlags};
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    rustix::fs::open(fifo, flags, Mode::empty())
        .map_err(|errno| Error::io(format!("opening the console {}", fifo.display()), errno.into()))
}

impl Consoles {
    #[must_use]
    pub fn new(state: &Path) -> Self {
        Self { base: state.join("logs"), shared: Arc::default() }
    }

    /// Marks the start of a boot in the log.
    pub(crate) fn begin(&self, id: &MachineId) -> Result<()> {
        self.log(&id.vm).append(format!("{}{} ---\n", LastWords::BOOT, id.incarnation).as_bytes())
    }

    /// Drains `fifo` into the log of the machine's VM until [`Self::finish`]. Again is fine. To be called inside a runtime.
    pub(crate) fn drain(&self, id: &MachineId, fifo: &Path) -> Result<()> {
        let log = self.log(&id.vm);
        let mut shared = self.shared();
        if !shared.drains.contains_key(id) {
            shared.drains.insert(id.clone(), Drain::start(open(fifo)?, log)?);
        }
        Ok(())
    }

    pub(crate) fn is_drained(&self, id: &MachineId) -> bool {
        self.shared().drains.contains_key(id)
    }

    /// Takes what is still in the FIFO and ends the draining.
    pub(crate) async fn finish(&self, id: &MachineId) {
        let drain = self.shared().drains.remove(id);
        if let Some(drain) = drain {
            drain.finish().await;
        }
    }

    /// Takes what waits in the VM's FIFOs now.
    async fn pump(&self, vm: &VmId) {
        let pumps: Vec<_> = {
            let shared = self.shared();
            shared.drains.iter().filter(|(id, _)| id.vm == *vm).map(|(_, drain)| drain.pump()).collect()
        };
        for pump in pumps {
            pump.run().await;
        }
    }

    /// Tells of everything that is written to the VM's log.
    pub(crate) fn written(&self, vm: &VmId) -> watch::Receiver<u64> {
        self.log(vm).watch()
    }

    /// What the end of the log says of its guest's end. Unlike [`Console::tail`] it reads a few KiB, whatever was printed.
    pub(crate) async fn last_words(&self, vm: &VmId) -> Result<LastWords> {
        let log = self.log(vm);
        blocking(vm, move || log.ending()).await.map(|lines| LastWords::of(&lines))
    }

    fn log(&self, vm: &VmId) -> Arc<Log> {
        let new = || Arc::new(Log::new(self.dir(vm)));
        self.shared().logs.entry(vm.clone()).or_insert_with(new).clone()
    }

    fn dir(&self, vm: &VmId) -> PathBuf {
        self.base.join(vm.as_str())
    }

    fn shared(&self) -> MutexGuard<'_, Shared> {
        // Whatever panicked, the maps stay whole.
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait]
impl Console for Consoles {
    async fn tail(&self, vm: &VmId, lines: usize) -> Result<Vec<String>> {
        self.pump(vm).await;
        let log = self.log(vm);
        blocking(vm, move || log.tail(lines)).await
    }

    async fn read(&self, vm: &VmId, lines: usize, follow: bool) -> Result<BoxStream<Result<Bytes>>> {
        self.pump(vm).await;
        let log = self.log(vm);
        let start = {
            let log = log.clone();
            blocking(vm, move || log.start_of_last(lines)).await?
        };
        let reader = Reader { vm: vm.clone(), written: log.watch(), log, at: start, follow };
        Ok(Box::pin(futures_util::stream::unfold(Some(reader), |reader| async move {
            let mut reader = reader?;
            match reader.next().await {
                Ok(Some(bytes)) => Some((Ok(bytes), Some(reader))),
                Ok(None) => None,
                Err(error) => Some((Err(error), None)),
            }
        })))
    }

    async fn look(&self, vm: &VmId) -> Result<Option<()>> {
        let dir = self.dir(vm);
        match dir.try_exists() {
            Ok(exists) => Ok(exists.then_some(())),
            Err(error) => Err(Error::io(format!("VM {vm}: looking for its console log in {}", dir.display()), error)),
        }
    }

    async fn erase(&self, vm: &VmId) -> Result<()> {
        let log = {
            let mut shared = self.shared();
            shared.drains.retain(|id, _| id.vm != *vm);
            shared.logs.remove(vm)
        };
        if let Some(log) = log {
            log.close();
        }
        let dir = self.dir(vm);
        blocking(vm, move || clawpot_host::fs::remove_tree_if_exists(&dir)).await?;
        failpoint::reached(Point::LogsGone);
        Ok(())
    }
}

/// One reader's place in a log.
struct Reader {
    vm: VmId,
    log: Arc<Log>,
    written: watch::Receiver<u64>,
    at: u64,
    follow: bool,
}

impl Reader {
    /// The next piece; `None` at the end, which a follower reaches when the log is erased.
    async fn next(&mut self) -> Result<Option<Bytes>> {
        loop {
            // Seen before reading: what is written after is told again.
            self.written.mark_unchanged();
            let (log, at) = (self.log.clone(), self.at);
            let (bytes, next) = blocking(&self.vm, move || log.read(at)).await?;
            self.at = next;
            if !bytes.is_empty() {
                return Ok(Some(bytes.into()));
            }
            if !self.follow || self.log.is_closed() || self.written.changed().await.is_err() {
                return Ok(None);
            }
        }
    }
}

async fn blocking<T: Send + 'static>(vm: &VmId, work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|error| Err(Error::new(Kind::Internal, "it panicked").because(error)))
        .map_err(|error| error.context(format!("VM {vm}: its console log")))
}
