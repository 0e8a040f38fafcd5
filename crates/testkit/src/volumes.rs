//! `Volumes` over the fake host, whose disk outlives a fake daemon. It watches that no file is touched while a machine has it.

use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use clawpot_core::ports::{Check, Copied, VolumeFile, Volumes};
use clawpot_types::{Error, Kind, MiB, Result, VolumeId};

use crate::faults::{Line, Method};
use crate::host::{FakeHost, FakeProcess, Inventory};

/// What is there of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FakeFile {
    pub size: MiB,
    /// Its file system was unmounted in order.
    pub clean: bool,
    /// It takes a repair.
    pub damaged: bool,
    /// How often it was checked or repaired.
    pub checks: u32,
}

impl FakeFile {
    #[must_use]
    pub const fn new(size: MiB) -> Self {
        Self { size, clean: true, damaged: false, checks: 0 }
    }
}

#[derive(Debug)]
pub struct FakeVolumes {
    host: Arc<FakeHost>,
    line: Line,
}

impl FakeVolumes {
    /// Of the daemon that lives now.
    #[must_use]
    pub fn new(host: &Arc<FakeHost>) -> Arc<Self> {
        Arc::new(Self { host: Arc::clone(host), line: host.faults.line() })
    }
}

/// Where the files would be.
pub(crate) const DIR: &str = "/fake/volumes";

pub(crate) fn path(id: &VolumeId) -> PathBuf {
    format!("{DIR}/{id}").into()
}

impl Inventory {
    /// The machine that has the file, if any but `fine` does.
    fn volume_user(&self, id: &VolumeId, fine: impl Fn(bool, bool) -> bool) -> Option<String> {
        let path = path(id);
        self.machines.iter().find_map(|(machine, held)| {
            let lives = matches!(held.process, FakeProcess::Lives { .. });
            let has = held.disks.iter().find(|(file, _)| *file == path)?;
            (!fine(has.1, lives)).then(|| machine.to_string())
        })
    }

    fn untouched(&mut self, id: &VolumeId, doing: &str, fine: impl Fn(bool, bool) -> bool) {
        if let Some(machine) = self.volume_user(id, fine) {
            self.violation(format!("volume file {id} was {doing} while machine {machine} has it"));
        }
    }

    fn volume(&mut self, id: &VolumeId) -> Result<&mut FakeFile> {
        self.volumes.get_mut(id).ok_or_else(|| Error::new(Kind::NotFound, format!("volume file {id}: not here")))
    }
}

fn check(inventory: &mut Inventory, id: &VolumeId, how: Check) -> Result<String> {
    let file = *inventory.volume(id)?;
    if how == Check::Quick && file.clean {
        return Ok("nothing was wrong".to_owned());
    }
    inventory.untouched(id, "checked", |_, _| false);
    if file.damaged && how != Check::Repair {
        return Err(Error::new(Kind::Corrupt, "its file system needs more repair than is done unasked"));
    }
    let file = inventory.volume(id)?;
    (file.clean, file.damaged, file.checks) = (true, false, file.checks + 1);
    Ok("checked".to_owned())
}

#[async_trait]
impl Volumes for FakeVolumes {
    fn path(&self, id: &VolumeId) -> PathBuf {
        path(id)
    }

    async fn look(&self, id: &VolumeId) -> Result<Option<VolumeFile>> {
        let work = || {
            let found = self.host.lock().volumes.get(id).copied();
            Ok(found.map(|file| VolumeFile { size: file.size, used_bytes: 0, clean: file.clean }))
        };
        self.line.call(Method::VolumesLook, work).await
    }

    async fn create(&self, id: &VolumeId, size: MiB) -> Result<()> {
        let work = || {
            self.host.change(|inventory| inventory.volumes.insert(id.clone(), FakeFile::new(size)));
            Ok(())
        };
        self.line.call(Method::VolumesCreate, work).await
    }

    async fn copy(&self, from: &VolumeId, to: &VolumeId) -> Result<Copied> {
        let work = || {
            self.host.change(|inventory| {
                inventory.untouched(from, "copied", |read_only, lives| read_only || !lives);
                let source = *inventory.volume(from)?;
                inventory.volumes.insert(to.clone(), source);
                Ok(Copied::Sparse { bytes: 0 })
            })
        };
        self.line.call(Method::VolumesCopy, work).await
    }

    async fn check(&self, id: &VolumeId, how: Check) -> Result<String> {
        let work = || self.host.change(|inventory| check(inventory, id, how));
        self.line.call(Method::VolumesCheck, work).await
    }

    async fn grow(&self, id: &VolumeId, size: MiB) -> Result<()> {
        let work = || {
            self.host.change(|inventory| {
                inventory.untouched(id, "grown", |_, _| false);
                inventory.volume(id)?.size = size;
                Ok(())
            })
        };
        self.line.call(Method::VolumesGrow, work).await
    }

    async fn remove(&self, id: &VolumeId) -> Result<()> {
        let work = || {
            self.host.change(|inventory| {
                inventory.untouched(id, "removed", |_, _| false);
                inventory.volumes.remove(id);
            });
            Ok(())
        };
        self.line.call(Method::VolumesRemove, work).await
    }

    async fn list(&self) -> Result<Vec<VolumeId>> {
        let work = || Ok(self.host.lock().volumes.keys().cloned().collect());
        self.line.call(Method::VolumesList, work).await
    }
}
