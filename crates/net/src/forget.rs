//! Forgets connections for all slots that are removed at the same time by one look. The kernel has one table of connections
//! for all namespaces, and a look costs by its buckets, whatever is in it and whatever is asked for: 8 ms of CPU where it
//! has 262,144. Neither a filter nor a flush by zone or mark walks less of it.
//!
//! Waiting for each other pays a second time: nobody takes a namespace away before all are marked and silenced, and while
//! the kernel takes namespaces apart nobody else gets its lock on links, which a mark needs.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use clawpot_types::{Error, Kind, Result};
use tokio::sync::{OwnedRwLockReadGuard, RwLock, oneshot};

use crate::kernel::conntrack;

#[derive(Debug, Default)]
pub(crate) struct Forgetting {
    asked: Mutex<Vec<(Ipv4Addr, oneshot::Sender<()>)>>,
    /// Read by those on their way to ask, written by who looks. It is fair: a look waits for those who were on their way when
    /// it was wanted, and who comes later waits for the look.
    look: Arc<RwLock<()>>,
    looks: AtomicU64,
}

/// Held by somebody who will ask in a moment, or fail.
pub(crate) type OnTheWay = OwnedRwLockReadGuard<()>;

impl Forgetting {
    pub(crate) async fn on_the_way(&self) -> OnTheWay {
        Arc::clone(&self.look).read_owned().await
    }

    /// When it returns, the calling process's namespace knows no connection of the address.
    pub(crate) async fn connections_of(&self, address: Ipv4Addr, on_the_way: OnTheWay) -> Result<()> {
        let (tell, mut told) = oneshot::channel();
        self.asked().push((address, tell));
        drop(on_the_way);
        let _look = self.look.write().await;
        // Whoever looked before may have looked for us too.
        if told.try_recv().is_ok() {
            return Ok(());
        }
        self.looks.fetch_add(1, Ordering::Relaxed);
        let asked = std::mem::take(&mut *self.asked());
        // Without ours if a look for it failed.
        let addresses: BTreeSet<Ipv4Addr> = asked.iter().map(|(one, _)| *one).chain([address]).collect();
        let count = addresses.len();
        let forgotten = tokio::task::spawn_blocking(move || conntrack::forget(&addresses))
            .await
            .unwrap_or_else(|error| Err(Error::new(Kind::Internal, "forgetting connections").because(error)))?;
        tracing::debug!(forgotten, addresses = count, "connections of network slots deleted");
        for (_, tell) in asked {
            // Nobody there any more is nobody to tell.
            tell.send(()).unwrap_or_default();
        }
        Ok(())
    }

    /// How often the table was read so far.
    #[cfg(test)]
    pub(crate) fn looks(&self) -> u64 {
        self.looks.load(Ordering::Relaxed)
    }

    fn asked(&self) -> MutexGuard<'_, Vec<(Ipv4Addr, oneshot::Sender<()>)>> {
        // One push or one take at a time.
        self.asked.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
