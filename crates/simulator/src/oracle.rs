//! Looks at every commit the moment it is made, and knows what must never be written.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use clawpot_control::records::{name_key, slot_key};
use clawpot_control::service::create::Request;
use clawpot_core::admission::{Claim, Footprint};
use clawpot_core::ports::{Op, Txn};
use clawpot_core::{Desired, MachineId, Phase, VmRecord};
use clawpot_testkit::FakeHost;
use clawpot_types::{Revision, VmId};
use tokio::time::Instant;

use crate::trace::{Thing, Trace};
use crate::volumes::Ledger;
use crate::weather::{Commit, Weather};

/// A delete is acted on within this, where nothing goes wrong meanwhile (DESIGN §4).
const ACTED_ON: Duration = Duration::from_millis(100);

/// As the store has it.
#[derive(Clone, Debug)]
pub struct Seen {
    pub revision: Revision,
    pub record: VmRecord,
}

pub struct Oracle {
    trace: Arc<Trace>,
    weather: Arc<Weather>,
    host: Arc<FakeHost>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    revision: u64,
    vms: BTreeMap<VmId, Seen>,
    /// In the order in which they were forgotten.
    gone: Vec<VmId>,
    requests: BTreeMap<String, VmId>,
    /// Requests that are older than they are remembered.
    forgotten: BTreeSet<(String, VmId)>,
    deletes: BTreeMap<VmId, Instant>,
    deletes_checked: u64,
    quarantined: u64,
    broken: Vec<String>,
    /// MiB that VMs may hold in all.
    memory: u64,
    volumes: Ledger,
}

impl std::fmt::Debug for Oracle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Oracle").finish_non_exhaustive()
    }
}

impl Oracle {
    #[must_use]
    pub fn new(trace: Arc<Trace>, weather: Arc<Weather>, host: Arc<FakeHost>) -> Self {
        Self { trace, weather, host, state: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// MiB that VMs may hold in all, from now on; no less than they hold.
    pub fn set_memory(&self, limit: u64) {
        self.lock().memory = limit;
    }

    /// Something that must not be was seen.
    pub fn broken(&self, what: impl Into<String>) {
        let what = what.into();
        self.trace.add(Thing::Told(format!("BROKEN: {what}")));
        self.lock().broken.push(what);
    }

    /// The first thing that was wrong; the host's complaints too.
    #[must_use]
    pub fn verdict(&self) -> Option<String> {
        let own = self.lock().broken.first().cloned();
        own.or_else(|| self.host.violations().into_iter().next())
    }

    #[must_use]
    pub fn vms(&self) -> BTreeMap<VmId, Seen> {
        self.lock().vms.clone()
    }

    /// Every VM there ever was, those that are gone last.
    #[must_use]
    pub fn known(&self) -> Vec<VmId> {
        let state = self.lock();
        state.vms.keys().chain(&state.gone).cloned().collect()
    }

    #[must_use]
    pub fn deletes_checked(&self) -> u64 {
        self.lock().deletes_checked
    }

    /// How often a VM came into quarantine.
    #[must_use]
    pub fn quarantined(&self) -> u64 {
        self.lock().quarantined
    }

    #[must_use]
    pub fn volumes(&self) -> Vec<clawpot_core::volume::VolumeRecord> {
        self.lock().volumes.records()
    }

    /// How many there ever were.
    #[must_use]
    pub fn volumes_made(&self) -> u64 {
        self.lock().volumes.made
    }

    /// A client was told that its create made `vm`.
    pub fn created(&self, request: &str, vm: &VmId) {
        let state = self.lock();
        let known = state.requests.get(request).cloned();
        // A clock that jumps by a day while the answer is on its way makes the request forgotten.
        let fits = known.as_ref() == Some(vm) || state.forgotten.contains(&(request.to_owned(), vm.clone()));
        drop(state);
        if !fits {
            self.broken(format!("request {request} was answered with VM {vm}; the store says {known:?}"));
        }
    }

    /// A client was told that this is so: it has to be in the store.
    pub fn acknowledged(&self, vm: &VmId, revision: Revision, desired: Desired) {
        let state = self.lock();
        let gone = state.gone.contains(vm);
        let wrong = match state.vms.get(vm) {
            Some(seen) if seen.revision < revision => Some(format!("the store is at {}", seen.revision)),
            Some(seen) if desired == Desired::Deleted && seen.record.desired != desired => {
                Some(format!("the store wants it {:?}", seen.record.desired))
            }
            None if !gone => Some("the store never had it".to_owned()),
            _ => None,
        };
        drop(state);
        if let Some(why) = wrong {
            self.broken(format!("VM {vm}: {desired:?} was acknowledged at revision {revision}, and {why}"));
        }
    }

    /// A daemon asks the store for this commit.
    pub fn asked(&self, txn: &Txn) {
        let key = txn.ops.iter().find_map(|op| match op {
            Op::Put { key, .. } => key.strip_prefix("vms/"),
            Op::Delete { .. } => None,
        });
        let before = key.and_then(|id| self.lock().vms.get(&id.parse().ok()?).map(|seen| seen.record.clone()));
        let commit = Commit::of(txn, before.as_ref()).or_else(|| Commit::of_volume(txn));
        self.weather.comes(commit);
    }

    /// The store has made this commit.
    pub fn committed(&self, txn: &Txn, revision: Revision) {
        let mut wrong = Vec::new();
        let mut seen = Vec::new();
        {
            let mut state = self.lock();
            if revision.0 != state.revision + 1 {
                wrong.push(format!("revision {revision} follows {}", state.revision));
            }
            state.revision = revision.0;
            wrong.extend(state.volumes.committed(txn, &self.host));
            for op in &txn.ops {
                match op {
                    Op::Put { key, value } if key.starts_with("vms/") => match VmRecord::decode(value) {
                        Ok(record) => {
                            seen.push((record.id.clone(), Some(record.phase)));
                            self.put(&mut state, txn, revision, record, &mut wrong);
                        }
                        Err(error) => wrong.push(format!("{key}: written unreadable: {}", error.chain())),
                    },
                    Op::Put { key, value } if key.starts_with("requests/") => {
                        state.request(key.trim_start_matches("requests/"), value, &mut wrong);
                    }
                    Op::Delete { key } if key.starts_with("vms/") => {
                        let id = key.trim_start_matches("vms/");
                        seen.extend(id.parse().map(|id: VmId| (id, None)));
                        self.forgotten(&mut state, id, txn, &mut wrong);
                    }
                    Op::Delete { key } if key.starts_with("requests/") => {
                        let request = key.trim_start_matches("requests/");
                        if let Some(vm) = state.requests.remove(request) {
                            state.forgotten.insert((request.to_owned(), vm));
                        }
                    }
                    _ => {}
                }
            }
        }
        for (id, phase) in seen {
            self.trace.add(Thing::Committed(revision, id, phase));
        }
        wrong.into_iter().for_each(|what| self.broken(what));
    }

    fn put(&self, state: &mut State, txn: &Txn, revision: Revision, record: VmRecord, wrong: &mut Vec<String>) {
        let id = record.id.clone();
        match state.vms.get(&id) {
            None => state.appeared(&record, txn, wrong),
            Some(Seen { record: before, .. }) => {
                wrong.extend(change(before, &record).map(|what| format!("VM {id}: {what}")));
                if before.desired != Desired::Deleted && record.desired == Desired::Deleted {
                    state.deletes.insert(id.clone(), Instant::now());
                }
                if before.phase != record.phase && !told(txn, &id, "vm.phase") {
                    wrong.push(format!("VM {id} became {} and no event says so", record.phase));
                }
                let released = before.phase == Phase::Quarantined;
                let begins = record.phase == Phase::Preparing && before.phase != record.phase && !released;
                if before.phase == Phase::Stopping || begins {
                    wrong.extend(self.untrue(&record).map(|what| format!("VM {id} became {}: {what}", record.phase)));
                }
            }
        }
        if record.phase == Phase::Quarantined {
            // Until somebody has looked after it.
            state.deletes.remove(&id);
            state.quarantined += 1;
        }
        if record.phase == Phase::Deleting {
            self.acted_on(state, &id, wrong);
        }
        let machines = self.host.machines();
        let before = state.held(&machines);
        let asked = record.generation;
        let generation = state.vms.insert(id.clone(), Seen { revision, record }).map(|seen| seen.record.generation);
        // Nobody is taken in beyond the limit; what a VM holds already, it keeps.
        let held = state.held(&machines);
        if held > state.memory && held > before && generation != Some(asked) {
            wrong.push(format!("with VM {id} all VMs hold {held} MiB of {}", state.memory));
        }
    }

    /// What the host shows to be otherwise. Only what nobody but the VM's own runner can change.
    fn untrue(&self, record: &VmRecord) -> Option<String> {
        let machines = self.host.machines();
        let machine = machines.iter().find(|machine| machine.vm == record.id);
        match record.phase {
            Phase::Preparing => machine.map(|machine| format!("machine {machine} of an earlier boot is still there")),
            Phase::Stopped => machine
                .map(|machine| format!("machine {machine} is still there"))
                .or_else(|| self.host.slots().contains(&record.slot).then(|| "its network is still there".to_owned())),
            _ => None,
        }
    }

    fn forgotten(&self, state: &mut State, id: &str, txn: &Txn, wrong: &mut Vec<String>) {
        let Some((id, seen)) = id.parse().ok().and_then(|id: VmId| state.vms.remove_entry(&id)) else {
            wrong.push(format!("VM {id} was forgotten, and nobody knew it"));
            return;
        };
        if seen.record.phase != Phase::Deleting {
            wrong.push(format!("VM {id} was forgotten while {}", seen.record.phase));
        }
        self.acted_on(state, &id, wrong);
        let left: Vec<String> = self.host.left_behind().into_iter().filter(|line| line.contains(id.as_str())).collect();
        wrong.extend(left.into_iter().map(|line| format!("VM {id} was forgotten, and there still is: {line}")));
        if self.host.slots().contains(&seen.record.slot) {
            wrong.push(format!("VM {id} was forgotten, and the network of slot {} is still there", seen.record.slot));
        }
        for key in [slot_key(seen.record.slot), name_key(&seen.record.name)] {
            if !txn.ops.iter().any(|op| matches!(op, Op::Delete { key: deleted } if *deleted == key)) {
                wrong.push(format!("VM {id} was forgotten, and {key} is still its"));
            }
        }
        if !told(txn, &id, "vm.gone") {
            wrong.push(format!("VM {id} was forgotten and no event says so"));
        }
        state.gone.push(id);
    }

    fn acted_on(&self, state: &mut State, id: &VmId, wrong: &mut Vec<String>) {
        let Some(asked) = state.deletes.remove(id) else { return };
        if !self.weather.calm_since(asked) {
            return;
        }
        state.deletes_checked += 1;
        if asked.elapsed() > ACTED_ON {
            wrong.push(format!("VM {id}: its delete was acted on after {:?}", asked.elapsed()));
        }
    }
}

impl State {
    /// MiB. A VM that is being deleted is counted by the server, and may have been at rest.
    fn held(&self, machines: &[MachineId]) -> u64 {
        let has_machine = |id: &VmId| machines.iter().any(|machine| machine.vm == *id);
        let holds = |(id, seen): &(&VmId, &Seen)| match seen.record.phase {
            Phase::Deleting => false,
            // One that failed, and whose machine is gone, holds nothing while it is being stopped.
            Phase::Stopping => has_machine(id),
            _ => true,
        };
        let stay = self.vms.iter().filter(holds).map(|(_, seen)| seen);
        stay.map(|seen| Claim::of(&seen.record, Footprint::NONE).memory).sum()
    }

    fn appeared(&self, record: &VmRecord, txn: &Txn, wrong: &mut Vec<String>) {
        let id = &record.id;
        if self.gone.contains(id) {
            wrong.push(format!("VM {id} was forgotten and is back"));
        }
        if record.phase != Phase::Accepted {
            wrong.push(format!("VM {id} begins as {}", record.phase));
        }
        for (other, seen) in &self.vms {
            if seen.record.slot == record.slot {
                wrong.push(format!("VMs {other} and {id} share slot {}", record.slot));
            }
            if seen.record.name == record.name {
                wrong.push(format!("VMs {other} and {id} share the name {}", record.name));
            }
        }
        let written: BTreeSet<&str> = txn
            .ops
            .iter()
            .filter_map(|op| match op {
                Op::Put { key, .. } => Some(key.as_str()),
                Op::Delete { .. } => None,
            })
            .collect();
        if !told(txn, id, "vm.create") {
            wrong.push(format!("VM {id} was created and no event says so"));
        }
        for key in [slot_key(record.slot), name_key(&record.name)] {
            if !written.contains(key.as_str()) {
                wrong.push(format!("VM {id} was written without {key}"));
            }
        }
    }

    fn request(&mut self, request: &str, value: &[u8], wrong: &mut Vec<String>) {
        match Request::decode(value) {
            Ok(made) => {
                if let Some(other) = self.requests.insert(request.to_owned(), made.vm.clone()) {
                    wrong.push(format!("request {request} made VM {other} and VM {}", made.vm));
                }
            }
            Err(error) => wrong.push(format!("request {request}: written unreadable: {}", error.chain())),
        }
    }
}

/// Whether an event of this kind is committed with the change.
fn told(txn: &Txn, id: &VmId, kind: &str) -> bool {
    txn.events.iter().any(|event| event.about.is_vm(id) && event.kind == kind)
}

/// What must not change so.
fn change(before: &VmRecord, after: &VmRecord) -> Option<String> {
    let edge = before.phase != after.phase;
    if edge && !before.phase.may_become(after.phase) {
        return Some(format!("{} → {} is no edge", before.phase, after.phase));
    }
    if before.desired == Desired::Deleted && after.desired != Desired::Deleted {
        return Some(format!("its delete was undone: it is wanted {:?}", after.desired));
    }
    // A VM that ended by itself is wanted no more; nobody's word changed.
    let news = after.exit != before.exit;
    let gave_up = edge && after.phase == Phase::Stopping && after.desired == Desired::Stopped && news;
    let unasked = after.desired != before.desired && after.generation == before.generation;
    if after.generation < before.generation || (unasked && !gave_up) {
        let intents = format!("{:?} → {:?}", before.desired, after.desired);
        return Some(format!("{intents} at generation {} → {}", before.generation, after.generation));
    }
    let released = before.quarantine.as_ref().is_some_and(|quarantine| after.phase == quarantine.from);
    if edge && before.phase == Phase::Quarantined && !released {
        return Some(format!("out of {:?} it became {}", before.quarantine, after.phase));
    }
    let boots = edge && after.phase == Phase::Preparing && !released;
    if (after.incarnation != before.incarnation) != boots || after.incarnation < before.incarnation {
        return Some(format!(
            "{} → {}: incarnation {} → {}",
            before.phase, after.phase, before.incarnation, after.incarnation
        ));
    }
    if (&before.name, before.slot, &before.image, before.created_at)
        != (&after.name, after.slot, &after.image, after.created_at)
    {
        return Some("its name, slot, image or birth changed".to_owned());
    }
    (before.disk_made && !after.disk_made).then(|| "it forgot that its disk was made".to_owned())
}
