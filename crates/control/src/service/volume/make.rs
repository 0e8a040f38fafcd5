//! Create and copy.

use std::collections::BTreeMap;

use clawpot_core::ports::{Copied, Durability, Expect, Guard, Op, Txn, TxnOutcome};
use clawpot_core::volume::{VOLUME_VERSION, VolumeRecord, VolumeState};
use clawpot_failpoint::{self as failpoint, Point};
use clawpot_types::{Error, Kind, MiB, Result, Revision, VolumeName};
use tracing::{info, warn};

use super::rows::{find_volume, told};
use super::{SERVER, VolumeView};
use crate::service::{Service, to_its_end};

impl Service {
    /// An empty one of `size`.
    pub async fn create_volume(&self, name: VolumeName, size: MiB, actor: &str) -> Result<VolumeView> {
        let (this, actor) = (self.clone(), actor.to_owned());
        to_its_end(async move {
            let what = format!("volume {name}: create");
            let _turn = this.volume_turn(&name).await?;
            let asked = ("volume.create", size.to_string());
            let (revision, mut record) = this.make_volume(this.draft_volume(&name, size, &actor), asked, &what).await?;
            if let Err(error) = this.deps.volumes.create(&record.id, size).await {
                return Err(this.unmake_volume(revision, &record, error.context(what)).await);
            }
            failpoint::reached(Point::VolumeMade);
            this.made(revision, &mut record, "made".to_owned()).await?;
            info!(%name, %size, actor, "volume made");
            Ok(this.view(record).await)
        })
        .await
    }

    /// A copy of `from`, and how it was made.
    pub async fn copy_volume(&self, from: VolumeName, name: VolumeName, actor: &str) -> Result<(VolumeView, Copied)> {
        let (this, actor) = (self.clone(), actor.to_owned());
        to_its_end(async move {
            if from == name {
                let what = format!("volume {name}: a volume cannot be the copy of itself");
                return Err(Error::new(Kind::InvalidArgument, what).hint("choose another name for the copy"));
            }
            let (_turn, _other) = (this.volume_turn(&from).await?, this.volume_turn(&name).await?);
            if find_volume(&this.deps, &name).await?.is_some() {
                return Err(exists(&name));
            }
            let hold = |record: &mut VolumeRecord| record.state = VolumeState::Copying;
            let (revision, mut source) = this.hold_still(&from, hold, None).await?;
            let copied = this.copy_held(&source, &name, &actor).await;
            // Whatever became of the copy; and nothing of that changes it.
            if let Err(error) = this.volume_ready(revision, &mut source, None).await {
                warn!(%from, error = error.chain(), "writing down that a volume is copied no longer: tried again later");
                this.volume_in_doubt(&from);
            }
            let (record, copied) = copied.map_err(|error| error.context(format!("volume {name}: copy of {from}")))?;
            info!(%name, %from, ?copied, actor, "volume copied");
            Ok((this.view(record).await, copied))
        })
        .await
    }

    async fn copy_held(&self, source: &VolumeRecord, name: &VolumeName, actor: &str) -> Result<(VolumeRecord, Copied)> {
        let mut draft = self.draft_volume(name, source.size, actor);
        draft.unclean = source.unclean;
        let asked = ("volume.copy", format!("of {}, {}", source.name, source.size));
        let (revision, mut record) = self.make_volume(draft, asked, "copy").await?;
        let copied = match self.deps.volumes.copy(&source.id, &record.id).await {
            Ok(copied) => copied,
            Err(error) => return Err(self.unmake_volume(revision, &record, error).await),
        };
        failpoint::reached(Point::VolumeMade);
        let how = match copied {
            Copied::Reflink => "copied by reflink".to_owned(),
            Copied::Sparse { bytes } => format!("copied sparsely, {} of data", MiB::from_bytes(bytes)),
        };
        self.made(revision, &mut record, how).await?;
        Ok((record, copied))
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

    /// Written down as being made. `asked`: the event's kind and words.
    async fn make_volume(
        &self,
        draft: VolumeRecord,
        asked: (&'static str, String),
        what: &str,
    ) -> Result<(Revision, VolumeRecord)> {
        let key = VolumeRecord::key(&draft.name);
        if self.deps.store.get(&key).await?.is_some() {
            return Err(exists(&draft.name));
        }
        self.promise_volume(&draft.id, draft.size, what).await?;
        let txn = Txn {
            guards: vec![Guard { key: key.clone(), expect: Expect::Absent }],
            ops: vec![Op::Put { key, value: draft.encode()? }],
            events: vec![told(&self.deps, &draft, asked.0, asked.1, &draft.created_by)],
            durability: Durability::Full,
        };
        match self.deps.store.txn(txn).await {
            Ok(TxnOutcome::Committed(revision)) => {
                failpoint::reached(Point::VolumeWritten);
                Ok((revision, draft))
            }
            Ok(TxnOutcome::Conflict { .. }) => {
                self.note_volume(&draft.id, None);
                Err(exists(&draft.name))
            }
            Err(error) => {
                // Counted again where it turns out to be there all the same.
                self.note_volume(&draft.id, None);
                self.volume_in_doubt(&draft.name);
                Err(error)
            }
        }
    }

    async fn made(&self, revision: Revision, record: &mut VolumeRecord, how: String) -> Result<()> {
        let event = told(&self.deps, record, "volume.ready", how, SERVER);
        let done = self.volume_ready(revision, record, Some(event)).await;
        done.inspect_err(|_| self.volume_in_doubt(&record.name))
    }

    /// Nothing of it stays. `error`: why, with what went wrong in undoing it.
    async fn unmake_volume(&self, revision: Revision, record: &VolumeRecord, error: Error) -> Error {
        match self.erase_volume(revision, record, format!("not made: {}", error.chain())).await {
            Ok(()) => error,
            Err(cleanup) => {
                self.volume_in_doubt(&record.name);
                error.and_cleanup(cleanup)
            }
        }
    }
}

fn exists(name: &VolumeName) -> Error {
    Error::new(Kind::AlreadyExists, format!("volume {name}: there is one of this name"))
        .hint(format!("choose another name, or remove that one: clawpot volume rm {name}"))
}
