//! Volumes: made, copied, grown, removed; given to VMs in the transaction that makes the VM, taken back in the one that ends it.
//!
//! Intent is written first here too: a record that says Making, Growing or Removing before the file is touched, Ready or nothing after.
//! What a crash leaves is found by [`Service::recover_volumes`].

use std::collections::{BTreeMap, BTreeSet};

use clawpot_core::ports::{Copied, DiskFile, Durability, Expect, Guard, Op, StateStore, Txn, TxnOutcome, VolumeFile};
use clawpot_core::volume::{Lease, VOLUME_VERSION, VolumeRecord, VolumeState};
use clawpot_core::{DiskSource, ExtraDisk, Phase, VmRecord};
use clawpot_failpoint::{self as failpoint, Point};
use clawpot_types::{Error, Kind, MiB, Result, Revision, VmId, VolumeId, VolumeName};
use tracing::{error, info, warn};

use super::{Service, to_its_end};
use crate::Deps;
use crate::records::{Row, vm_key};

/// How often a record that others write too is tried again.
const ATTEMPTS: usize = 16;

/// A change of one volume's record, for the transaction of a VM.
#[derive(Debug)]
pub(crate) struct LeaseChange {
    pub(crate) key: String,
    pub(crate) revision: Revision,
    pub(crate) value: Vec<u8>,
}

/// A volume as it is.
#[derive(Clone, Debug)]
pub struct VolumeView {
    pub record: VolumeRecord,
    /// `None`: there is no file, or it could not be looked at.
    pub file: Option<VolumeFile>,
}

impl Service {
    /// An empty one of `size`.
    pub async fn create_volume(&self, name: VolumeName, size: MiB, actor: &str) -> Result<VolumeView> {
        let (this, actor) = (self.clone(), actor.to_owned());
        to_its_end(async move {
            let what = format!("volume {name}: create");
            let draft = this.draft_volume(&name, size, &actor);
            let (mut revision, mut record) = this.make_volume(draft, &what).await?;
            if let Err(error) = this.deps.volumes.create(&record.id, size).await {
                return Err(this.unmake_volume(&record, error).await.context(what));
            }
            failpoint::reached(Point::VolumeMade);
            this.volume_ready(&mut revision, &mut record).await?;
            info!(%name, %size, actor, "volume made");
            this.view(record).await
        })
        .await
    }

    /// A copy of `from`, and how it was made.
    pub async fn copy_volume(&self, from: VolumeName, name: VolumeName, actor: &str) -> Result<(VolumeView, Copied)> {
        let (this, actor) = (self.clone(), actor.to_owned());
        to_its_end(async move {
            let what = format!("volume {name}: copy of {from}");
            let (mut from_revision, mut source) = this.hold_still(&from, VolumeState::Copying).await?;
            let copied = this.copy_held(&source, &name, &actor).await;
            // Whatever became of the copy.
            this.volume_ready(&mut from_revision, &mut source).await?;
            let (record, copied) = copied.map_err(|error| error.context(what))?;
            info!(%name, %from, ?copied, actor, "volume copied");
            Ok((this.view(record).await?, copied))
        })
        .await
    }

    async fn copy_held(&self, source: &VolumeRecord, name: &VolumeName, actor: &str) -> Result<(VolumeRecord, Copied)> {
        let mut draft = self.draft_volume(name, source.size, actor);
        draft.unclean = source.unclean;
        let (mut revision, mut record) = self.make_volume(draft, "copy").await?;
        let copied = match self.deps.volumes.copy(&source.id, &record.id).await {
            Ok(copied) => copied,
            Err(error) => return Err(self.unmake_volume(&record, error).await),
        };
        failpoint::reached(Point::VolumeMade);
        self.volume_ready(&mut revision, &mut record).await?;
        Ok((record, copied))
    }

    pub async fn get_volume(&self, name: &VolumeName) -> Result<VolumeView> {
        let (_, record) = known_volume(&self.deps, name).await?;
        self.view(record).await
    }

    /// All, in the order of names; then what cannot be read, and why.
    pub async fn list_volumes(&self) -> Result<(Vec<VolumeView>, Vec<(String, Error)>)> {
        let (rows, unreadable) = all_volumes(&self.deps).await?;
        let mut views = Vec::with_capacity(rows.len());
        for (_, record) in rows {
            views.push(self.view(record).await?);
        }
        Ok((views, unreadable))
    }

    /// Grows it. No VM that has it may have a machine.
    pub async fn resize_volume(&self, name: VolumeName, size: MiB, actor: &str) -> Result<VolumeView> {
        let (this, actor) = (self.clone(), actor.to_owned());
        to_its_end(async move {
            let (_, before) = known_volume(&this.deps, &name).await?;
            if size < before.size {
                let what = format!("volume {name}: it has {}, and {size} were asked: a volume only grows", before.size);
                return Err(Error::new(Kind::InvalidArgument, what)
                    .hint("make a smaller one and copy the files in a VM that has both"));
            }
            let (mut revision, mut record) = this.hold_still(&name, VolumeState::Growing).await?;
            // Somebody may have been faster and asked for more.
            let size = size.max(record.size);
            // Promised only now, when nobody else changes its size.
            if let Err(error) = this.promise_volume(&record.id, size, &format!("volume {name}: resize")).await {
                return match this.volume_ready(&mut revision, &mut record).await {
                    Ok(()) => Err(error),
                    Err(cleanup) => Err(error.and_cleanup(cleanup)),
                };
            }
            record.size = size;
            this.write_volume(&mut revision, &record).await?;
            let grown = this
                .finish_growing(revision, record)
                .await
                .map_err(|error| error.context(format!("volume {name}: resize")))?;
            info!(%name, %size, actor, "volume resized");
            this.view(grown).await
        })
        .await
    }

    async fn finish_growing(&self, mut revision: Revision, mut record: VolumeRecord) -> Result<VolumeRecord> {
        let grown = self.deps.volumes.grow(&record.id, record.size).await;
        failpoint::reached(Point::VolumeGrown);
        // The larger size stays in the record also when the file system did not follow: it is what asking again makes whole.
        if grown.is_ok() {
            record.unclean = false;
        }
        self.volume_ready(&mut revision, &mut record).await?;
        grown.map(|()| record)
    }

    /// Refused while a VM has it.
    pub async fn delete_volume(&self, name: VolumeName, actor: &str) -> Result<()> {
        let (this, actor) = (self.clone(), actor.to_owned());
        to_its_end(async move {
            for _ in 0..ATTEMPTS {
                let (mut revision, mut record) = known_volume(&this.deps, &name).await?;
                if !record.attached.is_empty() {
                    let vms: Vec<&str> = record.attached.values().map(|lease| lease.vm.as_str()).collect();
                    let what = format!("volume {name}: VM {} has it", vms.join(", VM "));
                    return Err(Error::new(Kind::FailedPrecondition, what)
                        .hint(format!("delete that VM first: clawpot rm {}", vms[0])));
                }
                if record.state != VolumeState::Removing {
                    record.may_be_used(false)?;
                    record.state = VolumeState::Removing;
                    if !this.try_volume(&mut revision, &record).await? {
                        continue;
                    }
                    failpoint::reached(Point::VolumeDoomed);
                }
                this.erase_volume(revision, &record).await?;
                info!(%name, actor, "volume removed");
                return Ok(());
            }
            Err(busy(&name))
        })
        .await
    }

    /// What a daemon that died left: half-made ones go, begun removals and resizes are finished. Before any runner starts.
    pub(crate) async fn recover_volumes(&self) -> Result<()> {
        let (rows, unreadable) = all_volumes(&self.deps).await?;
        let mut files = BTreeSet::new();
        for (mut revision, mut record) in rows {
            files.insert(record.id.clone());
            self.note_volume(&record.id, Some(record.size));
            let done = match record.state {
                VolumeState::Ready => Ok(()),
                VolumeState::Copying => self.volume_ready(&mut revision, &mut record).await,
                VolumeState::Making | VolumeState::Removing => self.erase_volume(revision, &record).await,
                VolumeState::Growing => {
                    let (this, name) = (self.clone(), record.name.clone());
                    // It may take long; until it is done no machine gets it.
                    tokio::spawn(async move {
                        if let Err(error) = this.finish_growing(revision, record).await {
                            error!(%name, error = error.chain(), "finishing a volume's resize");
                        }
                    });
                    continue;
                }
            };
            if let Err(error) = done {
                warn!(name = %record.name, error = error.chain(), "bringing a volume in order");
            }
        }
        for (key, error) in &unreadable {
            error!(key, error = error.chain(), "a volume's record cannot be read");
        }
        // No death leaves one: the record is there first and goes last. Where the store was restored it is somebody's data.
        for id in self.deps.volumes.list().await?.into_iter().filter(|id| unreadable.is_empty() && !files.contains(id))
        {
            let file = self.deps.volumes.path(&id);
            warn!(file = %file.display(), "no record knows this volume's file: it stays, for a store that does, or until it is removed by hand");
        }
        Ok(())
    }

    /// What `record` is to have, as changes for the transaction that writes it. Every attempt reads anew.
    pub(crate) async fn leases(&self, record: &VmRecord) -> Result<Vec<LeaseChange>> {
        let mut changes = Vec::new();
        for (name, disk) in volumes_of(record) {
            let found = known_volume(&self.deps, name).await;
            let (revision, mut volume) = found.map_err(|error| error.context("spec.volumes"))?;
            let lease = Lease { vm: record.name.clone(), read_only: disk.read_only, path: disk.mount.clone() };
            volume.attach(record.id.clone(), lease).map_err(|error| error.context("spec.volumes"))?;
            changes.push(LeaseChange { key: VolumeRecord::key(name), revision, value: volume.encode()? });
        }
        Ok(changes)
    }

    async fn view(&self, record: VolumeRecord) -> Result<VolumeView> {
        let file = self.deps.volumes.look(&record.id).await.unwrap_or_else(|error| {
            warn!(volume = %record.name, error = error.chain(), "looking at a volume's file");
            None
        });
        Ok(VolumeView { record, file })
    }

    fn draft_volume(&self, name: &VolumeName, size: MiB, actor: &str) -> VolumeRecord {
        VolumeRecord {
            version: VOLUME_VERSION,
            id: self.deps.ids.volume_id(),
            name: name.clone(),
            size,
            created_at: self.deps.clock.now(),
            created_by: actor.to_owned(),
            state: VolumeState::Making,
            attached: BTreeMap::new(),
            unclean: false,
        }
    }

    /// Written down as being made.
    async fn make_volume(&self, draft: VolumeRecord, what: &str) -> Result<(Revision, VolumeRecord)> {
        let key = VolumeRecord::key(&draft.name);
        let exists = || {
            Err(Error::new(Kind::AlreadyExists, format!("volume {}: there is one of this name", draft.name))
                .hint("choose another name, or remove that one: clawpot volume rm"))
        };
        if self.deps.store.get(&key).await?.is_some() {
            return exists();
        }
        self.promise_volume(&draft.id, draft.size, what).await?;
        let txn = Txn {
            guards: vec![Guard { key: key.clone(), expect: Expect::Absent }],
            ops: vec![Op::Put { key, value: draft.encode()? }],
            events: Vec::new(),
            durability: Durability::Full,
        };
        match self.deps.store.txn(txn).await {
            Ok(TxnOutcome::Committed(revision)) => {
                failpoint::reached(Point::VolumeWritten);
                Ok((revision, draft))
            }
            Ok(TxnOutcome::Conflict { .. }) => {
                self.note_volume(&draft.id, None);
                exists()
            }
            Err(error) => {
                self.note_volume(&draft.id, None);
                Err(error)
            }
        }
    }

    /// Nothing of it stays. `error`: why, with what went wrong in undoing it.
    async fn unmake_volume(&self, record: &VolumeRecord, error: Error) -> Error {
        let undone = async {
            let (revision, _) = known_volume(&self.deps, &record.name).await?;
            self.erase_volume(revision, record).await
        };
        match undone.await {
            Ok(()) => error,
            Err(cleanup) => error.and_cleanup(cleanup),
        }
    }

    /// File, then record.
    async fn erase_volume(&self, revision: Revision, record: &VolumeRecord) -> Result<()> {
        self.deps.volumes.remove(&record.id).await?;
        failpoint::reached(Point::VolumeErased);
        let key = VolumeRecord::key(&record.name);
        let txn = Txn {
            guards: vec![Guard { key: key.clone(), expect: Expect::Revision(revision) }],
            ops: vec![Op::Delete { key }],
            events: Vec::new(),
            durability: Durability::Full,
        };
        match self.deps.store.txn(txn).await? {
            TxnOutcome::Committed(_) => {
                self.note_volume(&record.id, None);
                Ok(())
            }
            TxnOutcome::Conflict { .. } => Err(busy(&record.name)),
        }
    }

    /// Into `state`, in which no machine gets it to write, and none that has it runs.
    async fn hold_still(&self, name: &VolumeName, state: VolumeState) -> Result<(Revision, VolumeRecord)> {
        for _ in 0..ATTEMPTS {
            let (revision, mut record) = known_volume(&self.deps, name).await?;
            record.may_be_used(false)?;
            let mut guards = Vec::new();
            for (id, lease) in &record.attached {
                // Who only reads does not disturb a copy, unless it has the volume checked first.
                if lease.read_only && state == VolumeState::Copying && !record.unclean {
                    continue;
                }
                guards.push(Guard { key: vm_key(id), expect: Expect::Revision(self.at_rest(id, lease, name)?) });
            }
            record.state = state;
            let key = VolumeRecord::key(name);
            guards.push(Guard { key: key.clone(), expect: Expect::Revision(revision) });
            let ops = vec![Op::Put { key, value: record.encode()? }];
            let txn = Txn { guards, ops, events: Vec::new(), durability: Durability::Full };
            if let TxnOutcome::Committed(revision) = self.deps.store.txn(txn).await? {
                failpoint::reached(Point::VolumeHeld);
                return Ok((revision, record));
            }
        }
        Err(busy(name))
    }

    /// The revision of a VM that has no machine.
    fn at_rest(&self, id: &VmId, lease: &Lease, name: &VolumeName) -> Result<Revision> {
        match self.records.get(id) {
            Some(Row::Known { revision, record }) if matches!(record.phase, Phase::Stopped) => Ok(revision),
            _ => Err(Error::new(
                Kind::FailedPrecondition,
                format!("volume {name}: VM {} has it and is not stopped", lease.vm),
            )
            .hint(format!("stop it first: clawpot stop {}", lease.vm))),
        }
    }

    async fn volume_ready(&self, revision: &mut Revision, record: &mut VolumeRecord) -> Result<()> {
        record.state = VolumeState::Ready;
        self.write_volume(revision, record).await
    }

    /// What nobody else may have changed: its state keeps others away, save leases of those who read.
    async fn write_volume(&self, revision: &mut Revision, record: &VolumeRecord) -> Result<()> {
        let mut record = record.clone();
        for _ in 0..ATTEMPTS {
            if self.try_volume(revision, &record).await? {
                return Ok(());
            }
            let (now, found) = known_volume(&self.deps, &record.name).await?;
            (*revision, record.attached) = (now, found.attached);
        }
        Err(busy(&record.name))
    }

    async fn try_volume(&self, revision: &mut Revision, record: &VolumeRecord) -> Result<bool> {
        let Some(now) = put_volume(&*self.deps.store, *revision, record).await? else { return Ok(false) };
        *revision = now;
        Ok(true)
    }

    fn note_volume(&self, id: &VolumeId, size: Option<MiB>) {
        match size {
            Some(size) => self.volumes().insert(id.clone(), size.0),
            None => self.volumes().remove(id),
        };
    }
}

fn busy(name: &VolumeName) -> Error {
    Error::new(Kind::Conflict, format!("volume {name}: it was changed by others again and again")).hint("try again")
}

pub(crate) fn volumes_of(record: &VmRecord) -> impl Iterator<Item = (&VolumeName, &ExtraDisk)> {
    record.spec.extra_disks.iter().filter_map(|disk| match &disk.source {
        DiskSource::Volume(name) => Some((name, disk)),
        DiskSource::File(_) => None,
    })
}

async fn known_volume(deps: &Deps, name: &VolumeName) -> Result<(Revision, VolumeRecord)> {
    let found = deps.store.get(&VolumeRecord::key(name)).await?;
    let entry = found.ok_or_else(|| {
        Error::new(Kind::NotFound, format!("volume {name}: there is none"))
            .hint(format!("make it: clawpot volume create {name} --size 1G; `clawpot volume ls` shows what there is"))
    })?;
    let record = VolumeRecord::decode(&entry.value).map_err(|error| error.context(format!("volume {name}")))?;
    Ok((entry.revision, record))
}

type Volumes = (Vec<(Revision, VolumeRecord)>, Vec<(String, Error)>);

async fn all_volumes(deps: &Deps) -> Result<Volumes> {
    let listing = deps.store.list("volumes/").await?;
    let mut unreadable: Vec<_> = listing.unreadable.into_iter().map(|bad| (bad.key, bad.error)).collect();
    let mut rows = Vec::with_capacity(listing.entries.len());
    for entry in listing.entries {
        match VolumeRecord::decode(&entry.value) {
            Ok(record) => rows.push((entry.revision, record)),
            Err(error) => unreadable.push((entry.key, error)),
        }
    }
    Ok((rows, unreadable))
}

/// `None`: somebody changed it meanwhile.
async fn put_volume(store: &dyn StateStore, revision: Revision, record: &VolumeRecord) -> Result<Option<Revision>> {
    let key = VolumeRecord::key(&record.name);
    let txn = Txn {
        guards: vec![Guard { key: key.clone(), expect: Expect::Revision(revision) }],
        ops: vec![Op::Put { key, value: record.encode()? }],
        events: Vec::new(),
        durability: Durability::Full,
    };
    match store.txn(txn).await? {
        TxnOutcome::Committed(revision) => Ok(Some(revision)),
        TxnOutcome::Conflict { .. } => Ok(None),
    }
}

/// What `id` has, given back: changes for the transaction that forgets it. All volumes are looked at: the VM's own record may not be
/// readable.
pub(crate) async fn releases(deps: &Deps, id: &VmId) -> Result<Vec<LeaseChange>> {
    let (rows, _) = all_volumes(deps).await?;
    let mut changes = Vec::new();
    for (revision, mut record) in rows {
        if record.attached.remove(id).is_some() {
            changes.push(LeaseChange { key: VolumeRecord::key(&record.name), revision, value: record.encode()? });
        }
    }
    Ok(changes)
}

/// The files of the VM's extra disks. Volumes that it may write to are written down as unclean from here on; those that were, whoever
/// wrote to them, are checked first: `ready` is before the machine is prepared.
pub(crate) async fn disk_files(deps: &Deps, record: &VmRecord, ready: bool) -> Result<Vec<DiskFile>> {
    let mut files = Vec::with_capacity(record.spec.extra_disks.len());
    for disk in &record.spec.extra_disks {
        let file = match &disk.source {
            DiskSource::File(path) => path.clone(),
            DiskSource::Volume(name) => {
                let volume =
                    if ready { make_ready(deps, name, record, disk).await? } else { known_volume(deps, name).await?.1 };
                deps.volumes.path(&volume.id)
            }
        };
        files.push(DiskFile { file, read_only: disk.read_only, mount: disk.mount.clone() });
    }
    Ok(files)
}

async fn make_ready(deps: &Deps, name: &VolumeName, vm: &VmRecord, disk: &ExtraDisk) -> Result<VolumeRecord> {
    for _ in 0..ATTEMPTS {
        let (revision, mut volume) = known_volume(deps, name).await?;
        // Who only reads gets one that is being copied, unless it has to be checked.
        volume.may_be_used(disk.read_only && !volume.unclean)?;
        if !volume.attached.contains_key(&vm.id) {
            return Err(Error::new(
                Kind::Internal,
                format!("volume {name}: its record does not say that VM {} has it", vm.name),
            ));
        }
        if volume.unclean {
            let done = deps.volumes.check(&volume.id).await.map_err(|error| error.context(format!("volume {name}")))?;
            info!(volume = %name, vm = %vm.id, done, "checked after an end without unmounting");
            failpoint::reached(Point::VolumeChecked);
        }
        let unclean = !disk.read_only;
        if volume.unclean == unclean {
            return Ok(volume);
        }
        volume.unclean = unclean;
        if put_volume(&*deps.store, revision, &volume).await?.is_some() {
            failpoint::reached(Point::VolumeGiven);
            return Ok(volume);
        }
    }
    Err(busy(name))
}

/// After the VM's machine is gone: what was unmounted in order needs no check. What goes wrong here costs only one.
pub(crate) async fn settle(deps: &Deps, record: &VmRecord) {
    for (name, _) in volumes_of(record).filter(|(_, disk)| !disk.read_only) {
        let settled = async {
            let (revision, mut volume) = known_volume(deps, name).await?;
            let clean = deps.volumes.look(&volume.id).await?.is_some_and(|file| file.clean);
            if volume.unclean && clean && volume.attached.contains_key(&record.id) {
                volume.unclean = false;
                put_volume(&*deps.store, revision, &volume).await?;
            }
            Ok::<(), Error>(())
        };
        if let Err(error) = settled.await {
            warn!(volume = %name, error = error.chain(), "it is checked before it is used again");
        }
    }
}
