//! What VMs have of volumes: written with the VM's record, and given back with it.

use clawpot_core::ports::{Check, DiskFile};
use clawpot_core::volume::{Lease, VolumeRecord};
use clawpot_core::{DiskSource, ExtraDisk, VmRecord};
use clawpot_failpoint::{self as failpoint, Point};
use clawpot_types::{Error, Kind, Result, Revision, VmId, VolumeName};
use tracing::{info, warn};

use super::change::needs_repair;
use super::rows::{all_volumes, busy, known_volume, put_volume, told};
use super::{ATTEMPTS, SERVER};
use crate::Deps;
use crate::service::Service;

/// A change of one volume's record, for the transaction of a VM.
#[derive(Debug)]
pub(crate) struct LeaseChange {
    pub(crate) key: String,
    pub(crate) revision: Revision,
    pub(crate) value: Vec<u8>,
}

impl Service {
    /// What `record` is to have, as changes for the transaction that writes it. Every attempt reads anew.
    pub(crate) async fn leases(&self, record: &VmRecord) -> Result<Vec<LeaseChange>> {
        let mut changes = Vec::new();
        for (name, disk) in volumes_of(record) {
            self.no_stray_has(name).map_err(in_request)?;
            let found = known_volume(&self.deps, name).await;
            let (revision, mut volume) = found.map_err(in_request)?;
            let lease = Lease { vm: record.name.clone(), read_only: disk.read_only, path: disk.mount.clone() };
            volume.attach(record.id.clone(), lease).map_err(in_request)?;
            changes.push(LeaseChange { key: VolumeRecord::key(name), revision, value: volume.encode()? });
        }
        Ok(changes)
    }
}

/// As of the request's field: the path first, and behind it at once what is wrong.
fn in_request(error: Error) -> Error {
    let told = Error::new(error.kind(), format!("spec.volumes: {}", error.chain()));
    match error.next_step() {
        Some(hint) => told.hint(hint),
        None => told,
    }
}

pub(crate) fn volumes_of(record: &VmRecord) -> impl Iterator<Item = (&VolumeName, &ExtraDisk)> {
    record.spec.extra_disks.iter().filter_map(|disk| match &disk.source {
        DiskSource::Volume(name) => Some((name, disk)),
        DiskSource::File(_) => None,
    })
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
        let (revision, mut volume) = usable(deps, name, vm, disk).await?;
        let mut events = Vec::new();
        if volume.unclean {
            let done = deps.volumes.check(&volume.id, Check::Quick).await;
            let done =
                done.map_err(|error| needs_repair(error, name).context(format!("volume {name}: check before use")))?;
            info!(volume = %name, vm = %vm.id, done, "checked after an end without unmounting");
            failpoint::reached(Point::VolumeChecked);
            let words = format!("before VM {} gets it: {done}", vm.name);
            events.push(told(deps, &volume, "volume.check", words, SERVER));
        }
        let unclean = !disk.read_only;
        if volume.unclean == unclean && events.is_empty() {
            return Ok(volume);
        }
        volume.unclean = unclean;
        if put_volume(&*deps.store, revision, &volume, events).await?.is_some() {
            failpoint::reached(Point::VolumeGiven);
            return Ok(volume);
        }
    }
    Err(busy(name))
}

/// When nothing is being done to it any more that keeps a machine from having it. Whoever gives the VM up drops this.
async fn usable(deps: &Deps, name: &VolumeName, vm: &VmRecord, disk: &ExtraDisk) -> Result<(Revision, VolumeRecord)> {
    let mut told = false;
    loop {
        let (revision, volume) = known_volume(deps, name).await?;
        if !volume.attached.contains_key(&vm.id) {
            return Err(Error::new(
                Kind::Internal,
                format!("volume {name}: its record does not say that VM {} has it", vm.name),
            ));
        }
        // Who only reads gets one that is being copied, unless it has to be checked.
        let Err(why) = volume.may_be_used(disk.read_only && !volume.unclean) else {
            return Ok((revision, volume));
        };
        if !std::mem::replace(&mut told, true) {
            info!(vm = %vm.id, name = %vm.name, why = why.chain(), "its machine is not made yet");
        }
        tokio::time::sleep(deps.settings.limits.retry).await;
    }
}

/// After the VM's machine is gone: what was unmounted in order needs no check. What goes wrong here costs only one.
pub(crate) async fn settle(deps: &Deps, record: &VmRecord) {
    for (name, _) in volumes_of(record).filter(|(_, disk)| !disk.read_only) {
        let settled = async {
            let (revision, mut volume) = known_volume(deps, name).await?;
            let clean = deps.volumes.look(&volume.id).await?.is_some_and(|file| file.clean);
            if volume.unclean && clean && volume.attached.contains_key(&record.id) {
                volume.unclean = false;
                put_volume(&*deps.store, revision, &volume, Vec::new()).await?;
            }
            Ok::<(), Error>(())
        };
        if let Err(error) = settled.await {
            warn!(volume = %name, error = error.chain(), "it is checked before it is used again");
        }
    }
}
