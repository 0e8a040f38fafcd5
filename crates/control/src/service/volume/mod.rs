//! Volumes: made, copied, grown, checked, removed; given to VMs in the transaction that makes the VM, taken back in the one that ends it.
//!
//! - `make` create and copy · `change` resize and check · `remove` · `recover` what a death or a store that did not answer leaves
//! - `lease` what VMs have · `rows` the records · `turn` one of these at a time for each volume
//!
//! Intent is written first here too: a record that says Making, Growing, Checking or Removing before the file is touched, Ready or
//! nothing after. Each of these transactions is an event; the last one says how it went.

mod change;
mod lease;
mod make;
mod recover;
mod remove;
mod rows;
mod turn;

use clawpot_core::ports::VolumeFile;
use clawpot_core::volume::VolumeRecord;
use clawpot_types::{Error, Result, VolumeName};
use tracing::warn;

pub(crate) use lease::{LeaseChange, disk_files, releases, settle, volumes_of};
pub(crate) use turn::Turns;

use super::Service;
use rows::{all_volumes, known_volume};

/// How often a record that others write too is tried again.
const ATTEMPTS: usize = 16;

/// Who acts where nobody asked.
const SERVER: &str = "server";

/// A volume as it is.
#[derive(Clone, Debug)]
pub struct VolumeView {
    pub record: VolumeRecord,
    /// `None`: there is no file, or it could not be looked at.
    pub file: Option<VolumeFile>,
}

impl Service {
    pub async fn get_volume(&self, name: &VolumeName) -> Result<VolumeView> {
        let (_, record) = known_volume(&self.deps, name).await?;
        Ok(self.view(record).await)
    }

    /// All, in the order of names; then what cannot be read, and why.
    pub async fn list_volumes(&self) -> Result<(Vec<VolumeView>, Vec<(String, Error)>)> {
        let (rows, unreadable) = all_volumes(&self.deps).await?;
        let mut views = Vec::with_capacity(rows.len());
        for (_, record) in rows {
            views.push(self.view(record).await);
        }
        Ok((views, unreadable))
    }

    async fn view(&self, record: VolumeRecord) -> VolumeView {
        let file = self.deps.volumes.look(&record.id).await.unwrap_or_else(|error| {
            warn!(volume = %record.name, error = error.chain(), "looking at a volume's file");
            None
        });
        VolumeView { record, file }
    }
}
