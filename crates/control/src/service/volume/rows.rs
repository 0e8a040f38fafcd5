//! Volumes' records in the store.

use clawpot_core::event::{About, Draft};
use clawpot_core::ports::{Durability, Expect, Guard, Op, StateStore, Txn, TxnOutcome};
use clawpot_core::volume::{VolumeRecord, VolumeState};
use clawpot_types::{Error, Kind, MiB, Result, Revision, VolumeId, VolumeName};

use super::ATTEMPTS;
use crate::Deps;
use crate::service::Service;

pub(super) fn busy(name: &VolumeName) -> Error {
    Error::new(Kind::Conflict, format!("volume {name}: it was changed by others again and again")).hint("try again")
}

/// An event of a volume, as it is written with its record.
pub(super) fn told(deps: &Deps, record: &VolumeRecord, kind: &'static str, message: String, actor: &str) -> Draft {
    Draft {
        time: deps.clock.now(),
        about: About::Volume { volume: record.id.clone(), volume_name: record.name.clone() },
        kind,
        message,
        actor: actor.to_owned(),
    }
}

/// `None`: there is none.
pub(super) async fn find_volume(deps: &Deps, name: &VolumeName) -> Result<Option<(Revision, VolumeRecord)>> {
    let found = deps.store.get(&VolumeRecord::key(name)).await;
    let Some(entry) = found.map_err(|error| way_out(error, name))? else { return Ok(None) };
    let record = VolumeRecord::decode(&entry.value).map_err(|error| way_out(error, name))?;
    Ok(Some((entry.revision, record)))
}

/// What to do where a record cannot be read.
fn way_out(error: Error, name: &VolumeName) -> Error {
    let damaged = error.kind() == Kind::Corrupt;
    let error = error.context(format!("volume {name}"));
    if !damaged {
        return error;
    }
    error.hint(format!(
        "restore the store from a backup, or have the record forgotten, with its name, while the file stays: clawpot volume rm --force {name}"
    ))
}

/// `None`: there is none, or it can be read. With its id, as far as that can be.
pub(super) async fn unreadable_volume(deps: &Deps, name: &VolumeName) -> Result<Option<(Revision, Option<VolumeId>)>> {
    let key = VolumeRecord::key(name);
    // Of longer names, too.
    let listing = deps.store.list(&key).await?;
    if let Some(bad) = listing.unreadable.into_iter().find(|bad| bad.key == key) {
        return Ok(Some((bad.revision, None)));
    }
    let found = listing.entries.into_iter().find(|entry| entry.key == key);
    let Some(entry) = found.filter(|entry| VolumeRecord::decode(&entry.value).is_err()) else { return Ok(None) };
    let value: Option<serde_json::Value> = serde_json::from_slice(&entry.value).ok();
    let id = value.as_ref().and_then(|value| value.get("id")?.as_str()?.parse().ok());
    Ok(Some((entry.revision, id)))
}

pub(super) async fn known_volume(deps: &Deps, name: &VolumeName) -> Result<(Revision, VolumeRecord)> {
    find_volume(deps, name).await?.ok_or_else(|| {
        Error::new(Kind::NotFound, format!("volume {name}: there is none"))
            .hint(format!("make it: clawpot volume create {name} --size 1G; `clawpot volume ls` shows what there is"))
    })
}

type Volumes = (Vec<(Revision, VolumeRecord)>, Vec<(String, Error)>);

pub(super) async fn all_volumes(deps: &Deps) -> Result<Volumes> {
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
pub(super) async fn put_volume(
    store: &dyn StateStore,
    revision: Revision,
    record: &VolumeRecord,
    events: Vec<Draft>,
) -> Result<Option<Revision>> {
    let key = VolumeRecord::key(&record.name);
    let txn = Txn {
        guards: vec![Guard { key: key.clone(), expect: Expect::Revision(revision) }],
        ops: vec![Op::Put { key, value: record.encode()? }],
        events,
        durability: Durability::Full,
    };
    match store.txn(txn).await? {
        TxnOutcome::Committed(revision) => Ok(Some(revision)),
        TxnOutcome::Conflict { .. } => Ok(None),
    }
}

impl Service {
    /// Ready again. Nobody else may have changed it: its state keeps others away, save leases of those who read.
    pub(super) async fn volume_ready(
        &self,
        mut revision: Revision,
        record: &mut VolumeRecord,
        event: Option<Draft>,
    ) -> Result<()> {
        record.state = VolumeState::Ready;
        for _ in 0..ATTEMPTS {
            let events = event.iter().cloned().collect();
            if put_volume(&*self.deps.store, revision, record, events).await?.is_some() {
                return Ok(());
            }
            let (now, found) = known_volume(&self.deps, &record.name).await?;
            (revision, record.attached) = (now, found.attached);
        }
        Err(busy(&record.name))
    }

    /// While there are machines that no record knows, what the records say of volumes is not all.
    pub(super) fn no_stray_has(&self, name: &VolumeName) -> Result<()> {
        let Some(why) = self.strays.at_volumes() else { return Ok(()) };
        let grace = self.deps.settings.stray_grace.as_secs();
        Err(Error::new(Kind::FailedPrecondition, format!("volume {name}: {why}")).hint(format!(
            "try again: such machines are ended {grace} s after the server's start; the server's log tells of one that cannot be"
        )))
    }

    /// What counts for the volume against the disk's budget.
    pub(super) fn note_volume(&self, id: &VolumeId, size: Option<MiB>) {
        match size {
            Some(size) => self.volumes().insert(id.clone(), size.0),
            None => self.volumes().remove(id),
        };
    }
}
