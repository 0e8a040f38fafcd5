//! Removal: the record says so, the file goes, the record goes.

use clawpot_core::event::{About, Draft};
use clawpot_core::ports::{Durability, Expect, Guard, Op, Txn, TxnOutcome};
use clawpot_core::volume::{VolumeRecord, VolumeState};
use clawpot_failpoint::{self as failpoint, Point};
use clawpot_types::{Error, Kind, Result, Revision, VolumeName};
use tracing::{info, warn};

use super::rows::{busy, known_volume, put_volume, told, unreadable_volume};
use super::turn::taken;
use super::{ATTEMPTS, SERVER, volumes_of};
use crate::records::Row;
use crate::service::{Service, to_its_end};

impl Service {
    /// Refused while a VM has it.
    pub async fn delete_volume(&self, name: VolumeName, actor: &str) -> Result<()> {
        let (this, actor) = (self.clone(), actor.to_owned());
        to_its_end(async move {
            let _turn = this.volume_turn(&name).await?;
            this.no_stray_has(&name)?;
            for _ in 0..ATTEMPTS {
                let (revision, mut record) = known_volume(&this.deps, &name).await?;
                if !record.attached.is_empty() {
                    let vms: Vec<&str> = record.attached.values().map(|lease| lease.vm.as_str()).collect();
                    let what = format!("volume {name}: VM {} has it", vms.join(", VM "));
                    return Err(Error::new(Kind::FailedPrecondition, what)
                        .hint(format!("delete that VM first: clawpot rm {}", vms[0])));
                }
                let doomed = match record.state {
                    VolumeState::Removing => Ok(Some(revision)),
                    _ => {
                        record.may_be_used(false)?;
                        record.state = VolumeState::Removing;
                        let words = format!("removal of {}", record.size);
                        let event = told(&this.deps, &record, "volume.delete", words, &actor);
                        put_volume(&*this.deps.store, revision, &record, vec![event]).await
                    }
                };
                let Some(revision) = doomed.inspect_err(|_| this.volume_in_doubt(&name))? else { continue };
                failpoint::reached(Point::VolumeDoomed);
                let erased = this.erase_volume(revision, &record, "nothing of it is left".to_owned()).await;
                erased.inspect_err(|_| this.volume_in_doubt(&name))?;
                info!(%name, actor, "volume removed");
                return Ok(());
            }
            Err(busy(&name))
        })
        .await
    }

    /// As [`Self::delete_volume`], and one whose record cannot be read is forgotten. Nobody can say for sure which file is its: that
    /// stays.
    pub async fn delete_volume_by_force(&self, name: VolumeName, actor: &str) -> Result<()> {
        let Some((revision, id)) = unreadable_volume(&self.deps, &name).await? else {
            return self.delete_volume(name, actor).await;
        };
        let (this, actor) = (self.clone(), actor.to_owned());
        to_its_end(async move {
            let _turn = this.turns().take(&name).ok_or_else(|| taken(&name))?;
            this.no_vm_names(&name)?;
            let key = VolumeRecord::key(&name);
            // Without an id there is none of which an event could tell: then only the log does.
            let event = id.as_ref().map(|id| Draft {
                time: this.deps.clock.now(),
                about: About::Volume { volume: id.clone(), volume_name: name.clone() },
                kind: "volume.gone",
                message: "its record could not be read, and was forgotten by force; its file stays".to_owned(),
                actor: actor.clone(),
            });
            let txn = Txn {
                guards: vec![Guard { key: key.clone(), expect: Expect::Revision(revision) }],
                ops: vec![Op::Delete { key }],
                events: event.into_iter().collect(),
                durability: Durability::Full,
            };
            let TxnOutcome::Committed(_) = this.deps.store.txn(txn).await? else { return Err(busy(&name)) };
            let file = id.as_ref().map(|id| this.deps.volumes.path(id));
            warn!(%name, ?file, actor, "a volume whose record could not be read was forgotten; its file stays");
            id.iter().for_each(|id| this.note_volume(id, None));
            Ok(())
        })
        .await
    }

    /// Whose it is its record cannot say; those who have it can.
    fn no_vm_names(&self, name: &VolumeName) -> Result<()> {
        for (id, row) in self.records.rows_after(None) {
            let who = match row {
                Row::Known { record, .. } if volumes_of(&record).any(|(named, _)| named == name) => {
                    record.name.to_string()
                }
                Row::Known { .. } => continue,
                Row::Unreadable { .. } => id.to_string(),
            };
            let what = format!("volume {name}: VM {who} has it, or may have");
            return Err(
                Error::new(Kind::FailedPrecondition, what).hint(format!("delete that VM first: clawpot rm {who}"))
            );
        }
        Ok(())
    }

    /// File, then record.
    pub(super) async fn erase_volume(&self, revision: Revision, record: &VolumeRecord, why: String) -> Result<()> {
        self.deps.volumes.remove(&record.id).await?;
        self.note_volume(&record.id, None);
        failpoint::reached(Point::VolumeErased);
        let key = VolumeRecord::key(&record.name);
        let txn = Txn {
            guards: vec![Guard { key: key.clone(), expect: Expect::Revision(revision) }],
            ops: vec![Op::Delete { key }],
            events: vec![told(&self.deps, record, "volume.gone", why, SERVER)],
            durability: Durability::Full,
        };
        match self.deps.store.txn(txn).await? {
            TxnOutcome::Committed(_) => Ok(()),
            TxnOutcome::Conflict { .. } => Err(busy(&record.name)),
        }
    }
}
