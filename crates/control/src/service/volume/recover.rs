//! What a daemon that died left, and what is not known since the store did not say: half-made volumes go, begun removals and
//! resizes are finished.

use std::collections::BTreeSet;

use clawpot_core::Phase;
use clawpot_core::volume::{VolumeRecord, VolumeState};
use clawpot_types::{Result, Revision, VmId, VolumeName};
use tracing::{error, info, warn};

use super::SERVER;
use super::rows::{all_volumes, find_volume, put_volume, told};
use crate::service::Service;

impl Service {
    /// At the start of a daemon, before any runner. What fails is tried again until it is done.
    pub(crate) async fn recover_volumes(&self) {
        let Err(error) = self.look_volumes_over().await else { return };
        error!(error = error.chain(), "bringing volumes in order: tried again");
        let this = self.clone();
        self.until_leaving(async move {
            loop {
                tokio::time::sleep(this.deps.settings.limits.retry).await;
                match this.look_volumes_over().await {
                    Ok(()) => return,
                    Err(error) => warn!(error = error.chain(), "bringing volumes in order: tried again"),
                }
            }
        });
    }

    pub(crate) async fn look_volumes_over(&self) -> Result<()> {
        // Files first: each has its record before it is there, so one that has none is nobody's, also while others are made.
        let files = self.deps.volumes.list().await?;
        let (rows, unreadable) = all_volumes(&self.deps).await?;
        let mut owned = BTreeSet::new();
        for (_, record) in rows {
            owned.insert(record.id.clone());
            if record.state == VolumeState::Growing {
                // It may take long; until it is done no machine gets it.
                self.note_volume(&record.id, Some(record.size));
                self.volume_in_doubt(&record.name);
                continue;
            }
            match self.put_in_order(&record.name).await {
                Ok(true) => {}
                // Where the first look failed somebody may have it by now, and its size is counted by nobody until it is looked at.
                Ok(false) => self.volume_in_doubt(&record.name),
                Err(error) => {
                    warn!(name = %record.name, error = error.chain(), "bringing a volume in order");
                    self.volume_in_doubt(&record.name);
                }
            }
        }
        for (key, error) in &unreadable {
            error!(key, error = error.chain(), "a volume's record cannot be read");
        }
        // No death leaves one: the record is there first and goes last. Where the store was restored it is somebody's data.
        for id in files.into_iter().filter(|id| unreadable.is_empty() && !owned.contains(id)) {
            let file = self.deps.volumes.path(&id);
            warn!(file = %file.display(), "no record knows this volume's file: it stays, for a store that does, or until it is removed by hand");
        }
        Ok(())
    }

    /// How far something came that was done to it is not known, or it is half done: looked at until all is in order.
    pub(super) fn volume_in_doubt(&self, name: &VolumeName) {
        // One asks for all.
        if !self.volumes_in_doubt().insert(name.clone()) {
            return;
        }
        let (this, name) = (self.clone(), name.clone());
        self.until_leaving(async move {
            loop {
                // Before it is looked at: what fails from now on is looked at anew.
                this.volumes_in_doubt().remove(&name);
                match this.put_in_order(&name).await {
                    Ok(true) => return,
                    Ok(false) => {}
                    Err(error) => warn!(%name, error = error.chain(), "bringing a volume in order"),
                }
                if !this.volumes_in_doubt().insert(name.clone()) {
                    return;
                }
                tokio::time::sleep(this.deps.settings.limits.retry).await;
            }
        });
    }

    /// `false`: something is being done to it right now.
    async fn put_in_order(&self, name: &VolumeName) -> Result<bool> {
        let Some(_turn) = self.turns().take(name) else { return Ok(false) };
        let Some((revision, mut record)) = find_volume(&self.deps, name).await? else {
            return Ok(true);
        };
        self.note_volume(&record.id, Some(record.size));
        match record.state {
            VolumeState::Ready => self.doubt(revision, record).await?,
            VolumeState::Copying => self.volume_ready(revision, &mut record, None).await?,
            VolumeState::Checking => {
                record.unclean = true;
                let words = "the check did not come to its end: checked before a VM gets it".to_owned();
                let event = told(&self.deps, &record, "volume.ready", words, SERVER);
                self.volume_ready(revision, &mut record, Some(event)).await?;
            }
            VolumeState::Making => {
                self.erase_volume(revision, &record, "not made: it did not come to its end".to_owned()).await?;
            }
            VolumeState::Removing => {
                self.erase_volume(revision, &record, "nothing of it is left".to_owned()).await?;
            }
            VolumeState::Growing => drop(self.finish_growing(revision, record).await?),
        }
        Ok(true)
    }

    /// What its record says is in order and its file says is not: an older store was restored. It is checked before the next machine
    /// gets it.
    async fn doubt(&self, revision: Revision, mut record: VolumeRecord) -> Result<()> {
        let may_have_machine = |id: &VmId| match self.records.get(id).map(|row| row.phase()) {
            Some(Phase::Failed) => !self.lives.is_bare(id),
            Some(phase) => phase.may_have_vmm(),
            None => false,
        };
        if record.unclean || record.attached.keys().any(may_have_machine) {
            return Ok(());
        }
        let clean = match self.deps.volumes.look(&record.id).await {
            Ok(file) => file.is_none_or(|file| file.clean),
            Err(error) => {
                warn!(volume = %record.name, error = error.chain(), "looking at a volume's file");
                false
            }
        };
        if !clean {
            info!(volume = %record.name, "its file was not unmounted in order, whatever its record says: it is checked before it is used");
            record.unclean = true;
            // Who changed it meanwhile has looked after it.
            put_volume(&*self.deps.store, revision, &record, Vec::new()).await?;
        }
        Ok(())
    }
}
