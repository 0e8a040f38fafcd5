//! The end of a build: its VM, then its files.

use std::time::Duration;

use clawpot_core::{DiskSource, Phase, VmRecord};
use clawpot_types::{Error, Kind, Result, VmId};
use tracing::{info, warn};

use super::{Builds, build_name};
use crate::records::Row;

/// Between two attempts to remove a VM of a store that cannot be written.
const RETRY: Duration = Duration::from_secs(5);

/// How long its VM may take to go. Seconds are what it takes; longer is one of which the host cannot say what there is.
const REMOVAL: Duration = Duration::from_secs(300);

impl Builds {
    /// The VM first, as it has the disks.
    pub(super) async fn clear(&self, build: &VmId, actor: &str) -> Result<()> {
        // By its name, as the answer of its create may have been lost.
        if let Ok(vm) = self.service.records().find(&build_name(build)) {
            self.remove_vm(&vm, actor).await?;
        }
        self.bench.clear(build).await
    }

    /// Until it is gone, or quarantined. Not forever: what stays is removed by its time to live, or by the next server.
    async fn remove_vm(&self, vm: &VmId, actor: &str) -> Result<()> {
        let mut attempts = 0;
        loop {
            match self.service.delete(vm.as_str(), false, actor).await {
                Ok(_) => break,
                Err(error) if error.kind() == Kind::NotFound => return Ok(()),
                Err(error) if attempts == 3 => return Err(error),
                Err(error) => warn!(%vm, error = error.chain(), "removing the VM of a build"),
            }
            attempts += 1;
            tokio::time::sleep(RETRY).await;
        }
        let over = |row: Option<Row>| row.is_none_or(|row| row.phase() == Phase::Quarantined);
        match tokio::time::timeout(REMOVAL, self.service.until(vm, over)).await {
            Ok(reached) => reached?,
            Err(_) => {
                let what = format!("VM {vm}: it is being deleted for {} s, and is still there", REMOVAL.as_secs());
                return Err(Error::new(Kind::Timeout, what).hint("the server's log says what it waits for"));
            }
        }
        match self.service.records().get(vm) {
            None => Ok(()),
            // Who looks after it may take days, for which no client and no place among the builds waits.
            Some(_) => {
                Err(Error::new(Kind::FailedPrecondition, format!("VM {vm}: it is quarantined, and not removed"))
                    .hint(format!("see why: clawpot inspect {vm}")))
            }
        }
    }

    /// What builds of servers that are gone have left: their VMs, then their files. What there is, is looked at in this call,
    /// before anybody can ask for a build; the work is done when the future is.
    pub fn clear_up(&self) -> impl Future<Output = ()> + Send + 'static {
        let rows = self.service.records().rows_after(None);
        let own = |row: &Row| matches!(row, Row::Known { record, .. } if record.is_servers());
        let vms: Vec<VmId> = rows.iter().filter(|(_, row)| own(row)).map(|(vm, _)| vm.clone()).collect();
        let this = self.clone();
        async move { this.remove(&vms).await }
    }

    async fn remove(&self, vms: &[VmId]) {
        for vm in vms {
            // The runner goes on by itself where this gives up.
            match self.remove_vm(vm, "server").await {
                Ok(()) => info!(%vm, "the VM of a build that nobody waits for was removed"),
                Err(error) => warn!(%vm, error = error.chain(), "removing the VM of a build that nobody waits for"),
            }
        }
        match self.bench.left().await {
            Ok(left) => {
                for build in left {
                    self.clear_files(&build).await;
                }
            }
            Err(error) => warn!(error = error.chain(), "looking for what builds have left"),
        }
    }

    async fn clear_files(&self, build: &VmId) {
        let used = self.running().contains_key(build)
            || self.service.records().rows_after(None).iter().any(|(_, row)| match row {
                // Who knows what it has.
                Row::Unreadable { .. } => true,
                Row::Known { record, .. } => record.is_servers() && names(record, build),
            });
        if used {
            return;
        }
        if let Err(error) = self.bench.clear(build).await {
            warn!(%build, error = error.chain(), "removing what a build has left");
        }
    }
}

/// Whether one of the VM's disks is a file of this build.
fn names(record: &VmRecord, build: &VmId) -> bool {
    record.spec.extra_disks.iter().any(|disk| match &disk.source {
        DiskSource::File(path) => path.iter().any(|part| part == build.as_str()),
        DiskSource::Volume(_) => false,
    })
}
