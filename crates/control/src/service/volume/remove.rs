//! Removal: the record says so, the file goes, the record goes.

use clawpot_core::ports::{Durability, Expect, Guard, Op, Txn, TxnOutcome};
use clawpot_core::volume::{VolumeRecord, VolumeState};
use clawpot_failpoint::{self as failpoint, Point};
use clawpot_types::{Error, Kind, Result, Revision, VolumeName};
use tracing::info;

use super::rows::{busy, known_volume, put_volume, told};
use super::{ATTEMPTS, SERVER};
use crate::service::{Service, to_its_end};

impl Service {
    /// Refused while a VM has it.
    pub async fn delete_volume(&self, name: VolumeName, actor: &str) -> Result<()> {
        let (this, actor) = (self.clone(), actor.to_owned());
        to_its_end(async move {
            let _turn = this.volume_turn(&name).await?;
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
