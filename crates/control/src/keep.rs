//! Housekeeping: what has no owner goes, after a grace time; what is old is forgotten.
//!
//! A machine or a slot that bears this instance's name and no record knows was left by a store that was restored from a
//! backup, or by a defect. For the grace time it is only told, so that an operator who restored the wrong file can still stop the
//! server. Its slot is given to nobody meanwhile.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use clawpot_core::ports::{Durability, Expect, Guard, Op, Txn, Vmm};
use clawpot_core::{Fact, MachineId, VmmFact};
use clawpot_types::{Error, Kind, Result, Slot};
use tracing::{info, warn};

use crate::records::Row;
use crate::service::Service;
use crate::service::create::Request;

/// How often old requests are forgotten and the host is looked over.
const EVERY: Duration = Duration::from_secs(3600);

/// A killed process that has not gone by then is stuck in the kernel.
const DEATH: Duration = Duration::from_secs(5);

/// Slots of which something is on the host though no VM has them.
pub(crate) async fn stray_slots(service: &Service) -> BTreeSet<Slot> {
    let taken = service.records.slots_taken();
    match service.deps.net.list().await {
        Ok(found) => found.into_iter().filter(|slot| !taken.contains(slot)).collect(),
        Err(error) => {
            warn!(error = error.chain(), "looking for slots left behind");
            BTreeSet::new()
        }
    }
}

/// For as long as the server lives: first what was found at its start, after the grace time, then every hour.
pub(crate) async fn keep(service: Service, slots: BTreeSet<Slot>) {
    let found = stray_machines(&service).await;
    for (_, machine) in &found {
        warn!(%machine, grace = ?service.deps.settings.stray_grace, "a machine that no record knows; it will be ended");
    }
    tokio::time::sleep(service.deps.settings.stray_grace).await;
    // Only what was there at the start *and* still is: nothing that came meanwhile is taken for a stray.
    let first: BTreeSet<MachineId> = found.into_iter().map(|(_, machine)| machine).collect();
    for (vmm, machine) in stray_machines(&service).await.into_iter().filter(|(_, machine)| first.contains(machine)) {
        match end(&*vmm, &machine).await {
            Ok(()) => info!(%machine, "a machine that no record knew is gone"),
            Err(error) => warn!(%machine, error = error.chain(), "ending a machine that no record knows"),
        }
    }
    for slot in slots {
        if let Err(error) = service.deps.net.remove(slot).await {
            warn!(%slot, error = error.chain(), "removing a slot that no VM has");
        } else {
            service.unblock(slot);
        }
    }
    loop {
        if let Err(error) = forget_old_requests(&service).await {
            warn!(error = error.chain(), "forgetting old requests");
        }
        tokio::time::sleep(EVERY).await;
    }
}

/// Machines of VMs that no row of the store knows, readable or not, and of other incarnations than a VM has: a later one is there
/// where a backup was restored.
async fn stray_machines(service: &Service) -> Vec<(Arc<dyn Vmm>, MachineId)> {
    let mut strays = Vec::new();
    for vmm in service.deps.vmms.iter() {
        match vmm.list().await {
            Ok(machines) => {
                let strange = machines.into_iter().filter(|machine| is_stray(service, machine));
                strays.extend(strange.map(|machine| (vmm.clone(), machine)));
            }
            Err(error) => warn!(error = error.chain(), "looking for machines left behind"),
        }
    }
    strays
}

fn is_stray(service: &Service, machine: &MachineId) -> bool {
    match service.records.get(&machine.vm) {
        Some(Row::Known { record, .. }) => machine.incarnation != record.incarnation,
        Some(Row::Unreadable { .. }) => false,
        None => true,
    }
}

async fn end(vmm: &dyn Vmm, machine: &MachineId) -> Result<()> {
    if let Fact::Present(VmmFact::Unproven { why }) = vmm.inspect(machine).await {
        let hint = "put its cgroup in order: others' processes out of it, its own back; after the next start of the server it goes";
        return Err(Error::new(Kind::FailedPrecondition, why).hint(hint));
    }
    vmm.stop(machine).await?;
    if tokio::time::timeout(DEATH, vmm.exited(machine)).await.is_err() {
        warn!(%machine, "its processes do not die");
    }
    vmm.destroy(machine).await
}

async fn forget_old_requests(service: &Service) -> Result<()> {
    let now = service.deps.clock.now();
    let store = service.records.store();
    for entry in store.list("requests/").await?.entries {
        let old = match Request::decode(&entry.value) {
            Ok(request) => now.since(request.at) > service.deps.settings.request_memory,
            // What cannot be read cannot make a create idempotent either; a newer server's is its own.
            Err(error) => error.kind() != Kind::Unsupported,
        };
        if old {
            let guards = vec![Guard { key: entry.key.clone(), expect: Expect::Revision(entry.revision) }];
            let ops = vec![Op::Delete { key: entry.key }];
            store.txn(Txn { guards, ops, events: Vec::new(), durability: Durability::Normal }).await?;
        }
    }
    Ok(())
}
