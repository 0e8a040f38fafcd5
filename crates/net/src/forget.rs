//! Forgets connections for all who ask at the same time by one look. The kernel has one table of connections for all
//! namespaces, and reading it costs by its buckets, not by what is in it: 8 ms of CPU where it has 262,144.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::sync::{Mutex, MutexGuard, PoisonError};

use clawpot_types::{Error, Kind, Result};
use tokio::sync::oneshot;

use crate::kernel::conntrack;

#[derive(Debug, Default)]
pub(crate) struct Forgetting {
    asked: Mutex<Vec<(Ipv4Addr, oneshot::Sender<()>)>>,
    look: tokio::sync::Mutex<()>,
}

impl Forgetting {
    /// When it returns, the calling process's namespace knows no connection of the address.
    pub(crate) async fn connections_of(&self, address: Ipv4Addr) -> Result<()> {
        let (tell, mut told) = oneshot::channel();
        self.asked().push((address, tell));
        let _look = self.look.lock().await;
        // Whoever looked before may have looked for us too.
        if told.try_recv().is_ok() {
            return Ok(());
        }
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

    fn asked(&self) -> MutexGuard<'_, Vec<(Ipv4Addr, oneshot::Sender<()>)>> {
        // One push or one take at a time.
        self.asked.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
