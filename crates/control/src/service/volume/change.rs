//! Resize and check: what is done to a file while no machine has it.

use clawpot_core::event::Draft;
use clawpot_core::ports::{Check, Durability, Expect, Guard, Op, Txn, TxnOutcome};
use clawpot_core::volume::{Lease, VolumeRecord, VolumeState};
use clawpot_core::{Phase, VmRecord};
use clawpot_failpoint::{self as failpoint, Point};
use clawpot_types::{Error, Kind, MiB, Result, Revision, VmId, VolumeName};
use tracing::info;

use super::rows::{busy, known_volume, told};
use super::{ATTEMPTS, SERVER, VolumeView};
use crate::records::{Row, vm_key};
use crate::service::{Service, to_its_end};

/// Kind, words and actor of the event that is written with a change.
pub(super) type Asked<'a> = (&'static str, String, &'a str);

impl Service {
    /// Grows it. No VM that has it may have a machine.
    pub async fn resize_volume(&self, name: VolumeName, size: MiB, actor: &str) -> Result<VolumeView> {
        let (this, actor) = (self.clone(), actor.to_owned());
        to_its_end(async move {
            let _turn = this.volume_turn(&name).await?;
            let (_, before) = known_volume(&this.deps, &name).await?;
            if size < before.size {
                let what = format!("volume {name}: it has {}, and {size} were asked: a volume only grows", before.size);
                return Err(Error::new(Kind::InvalidArgument, what)
                    .hint("make a smaller one and copy the files in a VM that has both"));
            }
            this.promise_volume(&before.id, size, &format!("volume {name}: resize")).await?;
            let hold = |record: &mut VolumeRecord| {
                record.state = VolumeState::Growing;
                record.size = size;
            };
            let asked = ("volume.resize", format!("{} → {size}", before.size), actor.as_str());
            let held = this.hold_still(&name, hold, Some(asked)).await;
            // Its size counts as it was, or as the store turns out to have it.
            let (revision, record) = held.inspect_err(|_| {
                this.note_volume(&before.id, Some(before.size));
            })?;
            let grown = this.finish_growing(revision, record).await;
            let grown = grown.map_err(|error| error.context(format!("volume {name}: resize")))?;
            info!(%name, %size, actor, "volume resized");
            Ok(this.view(grown).await)
        })
        .await
    }

    /// From a record that says Growing.
    pub(super) async fn finish_growing(&self, revision: Revision, mut record: VolumeRecord) -> Result<VolumeRecord> {
        let grown = self.deps.volumes.grow(&record.id, record.size).await;
        failpoint::reached(Point::VolumeGrown);
        let file = if grown.is_err() { self.deps.volumes.look(&record.id).await } else { Ok(None) };
        let how = match (&grown, file) {
            (Ok(()), _) => format!("resized to {}", record.size),
            (Err(error), Ok(file)) => {
                // The record says what the file has become.
                record.size = file.map_or(record.size, |file| file.size);
                format!("not resized, it has {}: {}", record.size, error.chain())
            }
            // Nobody can say what it is, and nobody gets it until it was grown again.
            (Err(_), Err(_)) => {
                self.volume_in_doubt(&record.name);
                return grown.map(|()| record);
            }
        };
        let event = told(&self.deps, &record, "volume.ready", how, SERVER);
        let written = self.volume_ready(revision, &mut record, Some(event)).await;
        match &written {
            Ok(()) => self.note_volume(&record.id, Some(record.size)),
            Err(_) => self.volume_in_doubt(&record.name),
        }
        // Of two errors the first is the cause.
        grown?;
        written.map(|()| record)
    }

    /// Has its file system looked through, and says what came of it. No VM that has it may have a machine.
    pub async fn check_volume(&self, name: VolumeName, how: Check, actor: &str) -> Result<(VolumeView, String)> {
        let (this, actor) = (self.clone(), actor.to_owned());
        to_its_end(async move {
            let _turn = this.volume_turn(&name).await?;
            let hold = |record: &mut VolumeRecord| record.state = VolumeState::Checking;
            let words = if how == Check::Repair { "repair" } else { "check" };
            let asked = ("volume.check", format!("{words} asked for"), actor.as_str());
            let (revision, mut record) = this.hold_still(&name, hold, Some(asked)).await?;
            let done = this.deps.volumes.check(&record.id, how).await;
            failpoint::reached(Point::VolumeMended);
            record.unclean = done.is_err();
            let outcome = match &done {
                Ok(done) => done.clone(),
                Err(error) => format!("not in order: {}", error.chain()),
            };
            let event = told(&this.deps, &record, "volume.ready", outcome, SERVER);
            let written = this.volume_ready(revision, &mut record, Some(event)).await;
            let written = written.inspect_err(|_| this.volume_in_doubt(&name));
            let next = if how == Check::Repair { beyond_repair } else { needs_repair };
            let done = done.map_err(|error| next(error, &name).context(format!("volume {name}: {words}")))?;
            written?;
            info!(%name, done, actor, "volume checked");
            Ok((this.view(record).await, done))
        })
        .await
    }

    /// As `change` makes it, in which no machine gets it to write, and none that has it runs.
    pub(super) async fn hold_still(
        &self,
        name: &VolumeName,
        change: impl Fn(&mut VolumeRecord) + Send,
        asked: Option<Asked<'_>>,
    ) -> Result<(Revision, VolumeRecord)> {
        self.no_stray_has(name)?;
        for _ in 0..ATTEMPTS {
            let (revision, mut record) = known_volume(&self.deps, name).await?;
            record.may_be_used(false)?;
            change(&mut record);
            let mut guards = Vec::new();
            for (id, lease) in &record.attached {
                // Who only reads does not disturb a copy, unless it has the volume checked first.
                if lease.read_only && record.state == VolumeState::Copying && !record.unclean {
                    continue;
                }
                guards.push(Guard { key: vm_key(id), expect: Expect::Revision(self.at_rest(id, lease, name)?) });
            }
            let key = VolumeRecord::key(name);
            guards.push(Guard { key: key.clone(), expect: Expect::Revision(revision) });
            let ops = vec![Op::Put { key, value: record.encode()? }];
            let event = |(kind, words, actor): &Asked<'_>| told(&self.deps, &record, kind, words.clone(), actor);
            let events: Vec<Draft> = asked.iter().map(event).collect();
            let outcome = self.deps.store.txn(Txn { guards, ops, events, durability: Durability::Full }).await;
            if let TxnOutcome::Committed(revision) = outcome.inspect_err(|_| self.volume_in_doubt(name))? {
                failpoint::reached(Point::VolumeHeld);
                return Ok((revision, record));
            }
        }
        Err(busy(name))
    }

    /// The revision of a VM that has no machine.
    fn at_rest(&self, id: &VmId, lease: &Lease, name: &VolumeName) -> Result<Revision> {
        let has_none = |record: &VmRecord| record.phase == Phase::Stopped;
        match self.records.get(id) {
            Some(Row::Known { revision, record }) if has_none(&record) => Ok(revision),
            _ => Err(Error::new(
                Kind::FailedPrecondition,
                format!("volume {name}: VM {} has it and is not stopped", lease.vm),
            )
            .hint(format!("stop it first: clawpot stop {}", lease.vm))),
        }
    }
}

/// What to do where a check alone does not help.
pub(super) fn needs_repair(error: Error, name: &VolumeName) -> Error {
    if error.kind() != Kind::Corrupt {
        return error;
    }
    error.hint(format!(
        "keep a copy of it as it is (clawpot volume cp {name} {name}-damaged), then have it repaired: clawpot volume check {name} \
         --repair; files that lose their names come to lie in lost+found"
    ))
}

/// What to do where a repair does not help either.
fn beyond_repair(error: Error, name: &VolumeName) -> Error {
    if error.kind() != Kind::Corrupt {
        return error;
    }
    error.hint(format!(
        "restore it from a backup; what `debugfs` can still read in a copy of its file may be saved, then: clawpot volume rm {name}"
    ))
}
