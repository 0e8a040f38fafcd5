//! Machines that bear this instance's name and that no record knows, from the server's start until they are gone.
//!
//! Whose disks they write to nobody can say: the store that knew is not this one. So no VM gets a volume while there is one, no VM a
//! second machine beside a stray one of its own, and none gives up its slot, whose uid a stray one of its own runs under.

use std::collections::BTreeSet;
use std::sync::{Mutex, MutexGuard, PoisonError};

use clawpot_core::MachineId;
use tokio::sync::Notify;

#[derive(Debug, Default)]
pub(crate) struct Strays {
    /// `None`: nobody could look yet, and what is not known is not absent.
    found: Mutex<Option<BTreeSet<MachineId>>>,
    fewer: Notify,
}

impl Strays {
    fn lock(&self) -> MutexGuard<'_, Option<BTreeSet<MachineId>>> {
        // Every change is one assignment: a panic elsewhere leaves it whole.
        self.found.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All that there are. None is added later: what comes then has a record.
    pub(crate) fn found(&self, machines: BTreeSet<MachineId>) {
        *self.lock() = Some(machines);
        self.fewer.notify_waiters();
    }

    pub(crate) fn gone(&self, machine: &MachineId) {
        if let Some(found) = self.lock().as_mut() {
            found.remove(machine);
        }
        self.fewer.notify_waiters();
    }

    /// `None`: nobody could look yet.
    pub(crate) fn left(&self) -> Option<BTreeSet<MachineId>> {
        self.lock().clone()
    }

    /// What may write to a volume though no record says so.
    pub(crate) fn at_volumes(&self) -> Option<String> {
        self.first(|_| true)
    }

    /// When nothing is left that may write to what `own` is given: its VM's disk, and its volumes if it has any.
    pub(crate) async fn out_of_the_way(&self, own: &MachineId, volumes: bool, mut tell: impl FnMut(&str) + Send) {
        let in_the_way = |machine: &MachineId| machine != own && (volumes || machine.vm == own.vm);
        loop {
            let mut fewer = std::pin::pin!(self.fewer.notified());
            // From now on, so that nothing between the look and the wait is missed.
            fewer.as_mut().enable();
            match self.first(in_the_way) {
                None => return,
                Some(why) => tell(&why),
            }
            fewer.await;
        }
    }

    fn first(&self, in_the_way: impl Fn(&MachineId) -> bool) -> Option<String> {
        match &*self.lock() {
            None => Some("which machines there are is not known yet".to_owned()),
            Some(found) => {
                let machine = found.iter().find(|machine| in_the_way(machine))?;
                Some(format!(
                    "machine {machine}, which no record knows, may still run in its slot, and write to its disks"
                ))
            }
        }
    }
}
