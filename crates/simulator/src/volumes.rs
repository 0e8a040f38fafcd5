//! What must be so of volumes: at each commit, and at rest. One writer or many readers; no file without a record and no record without a
//! file; kept over their VMs' deletion; never removed while used.

use std::collections::{BTreeMap, BTreeSet};

use clawpot_control::Service;
use clawpot_core::admission::{Claim, Footprint};
use clawpot_core::event::About;
use clawpot_core::ports::{Op, Txn};
use clawpot_core::volume::{VolumeRecord, VolumeState};
use clawpot_core::{DiskSource, VmRecord};
use clawpot_testkit::FakeHost;
use clawpot_types::VolumeId;

use crate::disk::at_once;
use crate::world::World;

/// Volumes as the store has them, from one commit to the next.
#[derive(Debug, Default)]
pub struct Ledger {
    /// By key.
    volumes: BTreeMap<String, VolumeRecord>,
    /// How many there ever were.
    pub made: u64,
}

impl Ledger {
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&VolumeRecord> {
        self.volumes.get(key)
    }

    #[must_use]
    pub fn records(&self) -> Vec<VolumeRecord> {
        self.volumes.values().cloned().collect()
    }

    /// A commit is made: what is wrong with it.
    pub fn committed(&mut self, txn: &Txn, host: &FakeHost) -> Vec<String> {
        let mut wrong = Vec::new();
        for op in &txn.ops {
            match op {
                Op::Put { key, value } if key.starts_with("volumes/") => match VolumeRecord::decode(value) {
                    Ok(record) => self.put(key, record, txn, &mut wrong),
                    Err(error) => wrong.push(format!("{key}: written unreadable: {}", error.chain())),
                },
                Op::Delete { key } if key.starts_with("volumes/") => self.gone(key, txn, host, &mut wrong),
                _ => {}
            }
        }
        wrong
    }

    fn put(&mut self, key: &str, record: VolumeRecord, txn: &Txn, wrong: &mut Vec<String>) {
        let name = record.name.clone();
        let before = self.volumes.get(key);
        wrong.extend(change(before, &record).map(|what| format!("volume {name}: {what}")));
        let writers = record.attached.values().filter(|lease| !lease.read_only).count();
        if writers > 0 && record.attached.len() > 1 {
            wrong.push(format!("volume {name}: {writers} write to it, and {} have it", record.attached.len()));
        }
        let state = |record: &VolumeRecord| record.state;
        let held = |state| matches!(state, Some(VolumeState::Copying));
        let (was, is) = (before.map(state), record.state);
        // Who copies it changes nothing of it.
        if was != Some(is) && !held(was) && !held(Some(is)) && !told(txn, &record.id, "volume.") {
            wrong.push(format!("volume {name} became {is:?} and no event says so"));
        }
        for (vm, lease) in before.into_iter().flat_map(|before| &before.attached) {
            let forgotten = txn.ops.iter().any(|op| matches!(op, Op::Delete { key } if *key == format!("vms/{vm}")));
            if record.attached.get(vm) != Some(lease) && !forgotten {
                wrong.push(format!("volume {name}: VM {vm}'s hold changed, and the VM is still there"));
            }
        }
        self.made += u64::from(before.is_none());
        self.volumes.insert(key.to_owned(), record);
    }

    fn gone(&mut self, key: &str, txn: &Txn, host: &FakeHost, wrong: &mut Vec<String>) {
        let Some(record) = self.volumes.remove(key) else {
            wrong.push(format!("{key} was forgotten, and nobody knew it"));
            return;
        };
        if !matches!(record.state, VolumeState::Making | VolumeState::Removing) || !record.attached.is_empty() {
            wrong.push(format!("{key} was forgotten while {:?} and held by {:?}", record.state, record.attached));
        }
        if host.volume_files().contains_key(&record.id) {
            wrong.push(format!("{key} was forgotten, and its file {} is still there", record.id));
        }
        if !told(txn, &record.id, "volume.gone") {
            wrong.push(format!("{key} was forgotten and no event says so"));
        }
    }
}

/// Whether an event of the volume is committed whose kind begins so.
fn told(txn: &Txn, id: &VolumeId, kind: &str) -> bool {
    let about =
        |event: &clawpot_core::event::Draft| matches!(&event.about, About::Volume { volume, .. } if volume == id);
    txn.events.iter().any(|event| about(event) && event.kind.starts_with(kind) && !event.actor.is_empty())
}

/// What must not change so.
fn change(before: Option<&VolumeRecord>, after: &VolumeRecord) -> Option<String> {
    use VolumeState::{Checking, Copying, Growing, Making, Ready, Removing};
    let Some(before) = before else {
        return (after.state != Making).then(|| format!("it begins as {:?}", after.state));
    };
    if (&before.id, &before.name, before.created_at) != (&after.id, &after.name, after.created_at) {
        return Some("another one took its place".to_owned());
    }
    let edge = match (before.state, after.state) {
        (Making | Copying | Growing | Checking, Ready) => true,
        (Ready, Copying | Growing | Checking) => true,
        (Ready, Removing) => after.attached.is_empty(),
        (from, to) => from == to,
    };
    if !edge {
        return Some(format!("{:?} → {:?} is no edge", before.state, after.state));
    }
    if after.size < before.size && before.state != Growing {
        return Some(format!("{} → {}: it became smaller", before.size, after.size));
    }
    let came = after.attached.keys().any(|vm| !before.attached.contains_key(vm));
    let busy = !matches!(before.state, Ready | Copying);
    (came && busy).then(|| format!("a VM got it while {:?}", before.state))
}

/// Nothing is being done to any of them.
#[must_use]
pub fn restless(world: &World) -> Option<String> {
    let busy = world.oracle.volumes().into_iter().find(|record| record.state != VolumeState::Ready)?;
    Some(format!("volume {} is {:?}", busy.name, busy.state))
}

/// At rest: records, files, VMs and what is counted say the same.
#[must_use]
pub fn truth(world: &World, vms: &[&VmRecord]) -> Vec<String> {
    let files = world.host.volume_files();
    let records = world.oracle.volumes();
    let mut wrong = Vec::new();
    for record in &records {
        match files.get(&record.id) {
            None => wrong.push(format!("volume {} has no file", record.name)),
            Some(file) if file.size != record.size => {
                wrong.push(format!("volume {} has {}, and its file {}", record.name, record.size, file.size));
            }
            Some(file) if !file.clean && !record.unclean => {
                wrong.push(format!("volume {} was not unmounted in order, and nobody knows", record.name));
            }
            Some(_) => {}
        }
        for vm in record.attached.keys().filter(|vm| !vms.iter().any(|known| known.id == **vm)) {
            wrong.push(format!("volume {} is held by VM {vm}, which is gone", record.name));
        }
    }
    let owned: BTreeSet<&VolumeId> = records.iter().map(|record| &record.id).collect();
    wrong.extend(files.keys().filter(|id| !owned.contains(id)).map(|id| format!("volume file {id} is nobody's")));
    for vm in vms {
        for disk in &vm.spec.extra_disks {
            let DiskSource::Volume(name) = &disk.source else { continue };
            let found = records.iter().find(|record| record.name == *name);
            let lease = found.and_then(|record| record.attached.get(&vm.id));
            if lease.map(|lease| lease.read_only) != Some(disk.read_only) {
                wrong.push(format!("VM {} has volume {name} ({}), whose record says {lease:?}", vm.id, disk.read_only));
            }
        }
    }
    wrong
}

/// What the server counts against its disk is what VMs and volumes have.
pub async fn counted(world: &World, service: &Service) -> Result<(), String> {
    let budgets = service.budgets().await.map_err(|error| error.chain())?;
    let vms: u64 = world.oracle.vms().values().map(|seen| Claim::of(&seen.record, Footprint::NONE).disk).sum();
    let volumes: u64 = world.oracle.volumes().iter().map(|record| record.size.0).sum();
    let used = budgets.disk.used;
    if used == vms + volumes {
        return Ok(());
    }
    Err(format!("the server counts {used} MiB of disk, VMs have {vms} and volumes {volumes}"))
}

/// What is in the store of volumes, and on the host. After the last one was removed: nothing.
#[must_use]
pub fn left(world: &World) -> Vec<String> {
    let keys = match at_once(world.disk.state.list("volumes/")) {
        Ok(listing) => listing.entries.into_iter().map(|entry| format!("key {}", entry.key)).collect(),
        Err(error) => vec![error.chain()],
    };
    let files = world.host.volume_files().into_keys().map(|id| format!("volume file {id}"));
    keys.into_iter().chain(files).collect()
}
