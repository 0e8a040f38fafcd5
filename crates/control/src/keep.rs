//! Housekeeping: what has no owner goes, after a grace time; what is old is forgotten.
//!
//! A machine or a slot that bears this instance's name and no record knows was left by a store that was restored from a
//! backup, or by a defect. For the grace time it is only told, so that an operator who restored the wrong file can still stop the
//! server. Its slot is given to nobody meanwhile, and no volume to anybody ([`crate::strays`]).

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

/// How often old requests are forgotten.
const EVERY: Duration = Duration::from_secs(3600);

/// Before what could not be removed is tried again.
const AGAIN: Duration = Duration::from_secs(30);

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

/// First before any runner and any caller, so that what is found is all that there is.
pub(crate) async fn look_for_strays(service: &Service) {
    match stray_machines(service).await {
        Ok(found) => {
            for (_, machine) in &found {
                let grace = service.deps.settings.stray_grace;
                warn!(%machine, ?grace, "a machine that no record knows; it will be ended");
            }
            service.strays.found(found.into_iter().map(|(_, machine)| machine).collect());
        }
        Err(error) => warn!(error = error.chain(), "looking for machines left behind: tried again"),
    }
}

/// What was found at the server's start, after the grace time: machines first, then the slots, as one may be a machine's.
pub(crate) async fn end_strays(service: Service, mut slots: BTreeSet<Slot>) {
    while service.strays.left().is_none() {
        tokio::time::sleep(service.deps.settings.limits.retry).await;
        look_for_strays(&service).await;
    }
    tokio::time::sleep(service.deps.settings.stray_grace).await;
    let mut told = BTreeSet::new();
    loop {
        let mut failed = end_machines(&service).await;
        if failed.is_empty() {
            failed = remove_slots(&service, &mut slots).await;
        }
        if failed.is_empty() {
            return;
        }
        for (doing, error) in failed {
            // Once for each reason: it may stay for days.
            if told.insert((doing.clone(), error.chain())) {
                warn!(error = error.chain(), hint = error.next_step(), "{doing}: tried again");
            }
        }
        tokio::time::sleep(AGAIN).await;
    }
}

type Failed = Vec<(String, Error)>;

async fn end_machines(service: &Service) -> Failed {
    let now = match stray_machines(service).await {
        Ok(now) => now,
        Err(error) => return vec![("looking for machines left behind".to_owned(), error)],
    };
    // Only what was there at the start *and* still is: nothing that came meanwhile is taken for a stray.
    let found = service.strays.left().unwrap_or_default();
    let mut stay = BTreeSet::new();
    let mut failed = Vec::new();
    for (vmm, machine) in now.into_iter().filter(|(_, machine)| found.contains(machine)) {
        match end(&*vmm, &machine).await {
            Ok(()) => info!(%machine, "a machine that no record knew is gone"),
            Err(error) => {
                failed.push((format!("ending machine {machine}, which no record knows"), error));
                stay.insert(machine);
            }
        }
    }
    let over: Vec<&MachineId> = found.difference(&stay).collect();
    if over.is_empty() {
        return failed;
    }
    // None of them unmounted what it wrote to.
    match service.look_volumes_over().await {
        Ok(()) => over.into_iter().for_each(|machine| service.strays.gone(machine)),
        Err(error) => failed.push(("looking at volumes after machines that no record knew".to_owned(), error)),
    }
    failed
}

async fn remove_slots(service: &Service, slots: &mut BTreeSet<Slot>) -> Failed {
    let mut failed = Vec::new();
    for slot in std::mem::take(slots) {
        match service.deps.net.remove(slot).await {
            Ok(()) => service.unblock(slot),
            Err(error) => {
                slots.insert(slot);
                failed.push((format!("removing slot {slot}, which no VM has"), error));
            }
        }
    }
    failed
}

/// For as long as the server lives.
pub(crate) async fn forget_requests(service: Service) {
    tokio::time::sleep(service.deps.settings.stray_grace).await;
    loop {
        if let Err(error) = forget_old_requests(&service).await {
            warn!(error = error.chain(), "forgetting old requests");
        }
        tokio::time::sleep(EVERY).await;
    }
}

/// Machines of VMs that no row of the store knows, readable or not, and of other incarnations than a VM has: a later one is there
/// where a backup was restored.
async fn stray_machines(service: &Service) -> Result<Vec<(Arc<dyn Vmm>, MachineId)>> {
    let mut strays = Vec::new();
    for vmm in service.deps.vmms.iter() {
        let strange = vmm.list().await?.into_iter().filter(|machine| is_stray(service, machine));
        strays.extend(strange.map(|machine| (vmm.clone(), machine)));
    }
    Ok(strays)
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
        let hint = "put its cgroup in order: others' processes out of it, its own back; then it goes";
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
