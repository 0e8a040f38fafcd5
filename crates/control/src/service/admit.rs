//! Admission: what VMs hold and what those that are being taken in will. The decision is [`clawpot_core::admission`]'s.
//!
//! Between the decision and the commit lies the store. What was promised meanwhile is kept in a ledger, so that two who ask
//! at the same moment cannot both have the last of something.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use clawpot_core::admission::{Budgets, Claim, Room, may_have_machine};
use clawpot_core::{Phase, VmRecord};
use clawpot_failpoint::{self as failpoint, Point};
use clawpot_types::{MiB, Result, VmId, VolumeId};

use super::Service;
use crate::records::Row;

/// Promised and not yet written down. What is in the records counts there.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    promised: Mutex<BTreeMap<VmId, Claim>>,
}

/// Holds what was promised until it is dropped: when the record is written, or will not be.
#[derive(Debug)]
pub(crate) struct Promise {
    ledger: Arc<Ledger>,
    id: VmId,
}

impl Promise {
    /// It turned out to be no more than this, of disk alone.
    pub(crate) fn only(&self, disk: MiB) {
        let claim = Claim { disk: disk.0, ..Claim::default() };
        self.ledger.promised.lock().unwrap_or_else(PoisonError::into_inner).insert(self.id.clone(), claim);
    }
}

impl Drop for Promise {
    fn drop(&mut self) {
        self.ledger.promised.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.id);
    }
}

impl Service {
    /// What there is for VMs, and what they hold.
    pub async fn budgets(&self) -> Result<Budgets> {
        let room = self.deps.room.look().await?;
        let promised = self.shared.ledger.promised.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(self.weigh(&room, &promised, None))
    }

    /// Promises the machine of `record` what it will hold, if there is what it `asked` for beyond what it holds already.
    /// `Exhausted` names what there is too little of.
    pub(super) async fn admit(&self, record: &VmRecord, asked: Claim, doing: &str) -> Result<Promise> {
        let room = self.deps.room.look().await?;
        let ledger = &self.shared.ledger;
        let mut promised = ledger.promised.lock().unwrap_or_else(PoisonError::into_inner);
        // What the VM itself holds already, it holds in any case.
        self.weigh(&room, &promised, Some(&record.id)).admit(asked).map_err(|short| short.error(doing))?;
        promised.insert(record.id.clone(), Claim::whole(&record.spec, self.deps.vmms.footprint(record)));
        failpoint::reached(Point::Admitted);
        Ok(Promise { ledger: ledger.clone(), id: record.id.clone() })
    }

    /// [`Self::admit`] for a VM that has no machine and is asked to have one again.
    pub(super) async fn admit_start(&self, record: &VmRecord) -> Result<Option<Promise>> {
        if may_have_machine(record) {
            return Ok(None);
        }
        // Its disk and its slot it has.
        let asked = Claim { disk: 0, slots: 0, ..Claim::whole(&record.spec, self.deps.vmms.footprint(record)) };
        self.admit(record, asked, &format!("VM {}: start", record.name)).await.map(Some)
    }

    /// Promises `size` of disk for files that no record tells of, for as long as what it gives is held. `id`: no VM's.
    pub(crate) async fn promise_disk(&self, id: &VmId, size: MiB, what: &str) -> Result<Promise> {
        let room = self.deps.room.look().await?;
        let ledger = &self.shared.ledger;
        let mut promised = ledger.promised.lock().unwrap_or_else(PoisonError::into_inner);
        let held = self.held(&promised, None);
        let budgets = Budgets::new(&self.deps.settings.admission, &room, self.deps.net.slots(), held);
        let asked = Claim { disk: size.0, ..Claim::default() };
        budgets.admit(asked).map_err(|short| short.error(what))?;
        promised.insert(id.clone(), asked);
        Ok(Promise { ledger: ledger.clone(), id: id.clone() })
    }

    /// Counts `size` for the volume from now on, if there is room for what it has more than before.
    pub(super) async fn promise_volume(&self, id: &VolumeId, size: MiB, what: &str) -> Result<()> {
        let room = self.deps.room.look().await?;
        // Held until it counts: two who ask at the same moment cannot both have the last of something.
        let promised = self.shared.ledger.promised.lock().unwrap_or_else(PoisonError::into_inner);
        let before = self.volumes().get(id).copied().unwrap_or_default();
        let asked = Claim { disk: size.0.saturating_sub(before), ..Claim::default() };
        self.weigh(&room, &promised, None).admit(asked).map_err(|short| short.error(what))?;
        self.volumes().insert(id.clone(), size.0);
        Ok(())
    }

    fn weigh(&self, room: &Room, promised: &BTreeMap<VmId, Claim>, except: Option<&VmId>) -> Budgets {
        Budgets::new(&self.deps.settings.admission, room, self.deps.net.slots(), self.held(promised, except))
    }

    /// By everyone but `except`.
    fn held(&self, promised: &BTreeMap<VmId, Claim>, except: Option<&VmId>) -> Claim {
        let disk = self.volumes().values().fold(0u64, |sum, mib| sum.saturating_add(*mib));
        let mut held = Claim { disk, ..Claim::default() };
        // Those of which there is no row yet, by the same look: a row that appears meanwhile counts as promised.
        let mut unseen = promised.clone();
        for (id, row) in self.records.rows_after(None) {
            let promised = unseen.remove(&id);
            if except == Some(&id) {
                continue;
            }
            held = held.and(match (promised, &row) {
                (Some(promised), _) => promised,
                // A failed one holds its memory until its machine is taken down.
                (None, Row::Known { record, .. }) if record.phase == Phase::Failed && !self.lives.is_bare(&id) => {
                    Claim::whole(&record.spec, self.deps.vmms.footprint(record))
                }
                (None, Row::Known { record, .. }) => Claim::of(record, self.deps.vmms.footprint(record)),
                (None, Row::Unreadable { .. }) => Claim { slots: 1, ..Claim::default() },
            });
        }
        unseen.iter().filter(|(id, _)| except != Some(id)).fold(held, |held, (_, claim)| held.and(*claim))
    }
}
