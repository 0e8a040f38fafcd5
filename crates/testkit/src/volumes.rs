//! `Volumes` without files. Outlives a fake daemon, as a disk does.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use clawpot_core::ports::{Copied, VolumeFile, Volumes};
use clawpot_types::{Error, Kind, MiB, Result, VolumeId};

#[derive(Debug, Default)]
pub struct FakeVolumes {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    files: BTreeMap<VolumeId, FakeFile>,
    /// What the next effect meets.
    fault: Option<Fault>,
}

/// What is there of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FakeFile {
    pub size: MiB,
    /// Its file system was unmounted in order.
    pub clean: bool,
    /// How often it was checked.
    pub checks: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    DiskFull,
    /// The daemon dies in it: the call never comes back.
    Death,
}

impl FakeVolumes {
    #[must_use]
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[must_use]
    pub fn files(&self) -> BTreeMap<VolumeId, FakeFile> {
        self.lock().files.clone()
    }

    /// A file that no record knows, or that a guest has left so.
    pub fn put(&self, id: VolumeId, file: FakeFile) {
        self.lock().files.insert(id, file);
    }

    pub fn fail_next(&self, fault: Fault) {
        self.lock().fault = Some(fault);
    }

    async fn meet(&self) -> Result<()> {
        let fault = self.lock().fault.take();
        match fault {
            None => Ok(()),
            Some(Fault::DiskFull) => Err(Error::new(Kind::Exhausted, "no room in /fake/volumes")),
            Some(Fault::Death) => std::future::pending().await,
        }
    }
}

fn absent(id: &VolumeId) -> Error {
    Error::new(Kind::NotFound, format!("volume file {id}: not here"))
}

#[async_trait]
impl Volumes for FakeVolumes {
    fn path(&self, id: &VolumeId) -> PathBuf {
        format!("/fake/volumes/{id}").into()
    }

    async fn look(&self, id: &VolumeId) -> Result<Option<VolumeFile>> {
        let found = self.lock().files.get(id).copied();
        Ok(found.map(|file| VolumeFile { used_bytes: 0, clean: file.clean }))
    }

    async fn create(&self, id: &VolumeId, size: MiB) -> Result<()> {
        self.meet().await?;
        self.put(id.clone(), FakeFile { size, clean: true, checks: 0 });
        Ok(())
    }

    async fn copy(&self, from: &VolumeId, to: &VolumeId) -> Result<Copied> {
        self.meet().await?;
        let mut inner = self.lock();
        let source = *inner.files.get(from).ok_or_else(|| absent(from))?;
        inner.files.insert(to.clone(), source);
        Ok(Copied::Sparse { bytes: 0 })
    }

    async fn check(&self, id: &VolumeId) -> Result<String> {
        self.meet().await?;
        let mut inner = self.lock();
        let file = inner.files.get_mut(id).ok_or_else(|| absent(id))?;
        file.clean = true;
        file.checks += 1;
        Ok("checked".to_owned())
    }

    async fn grow(&self, id: &VolumeId, size: MiB) -> Result<()> {
        self.meet().await?;
        self.lock().files.get_mut(id).ok_or_else(|| absent(id))?.size = size;
        Ok(())
    }

    async fn remove(&self, id: &VolumeId) -> Result<()> {
        self.meet().await?;
        self.lock().files.remove(id);
        Ok(())
    }

    async fn list(&self) -> Result<Vec<VolumeId>> {
        Ok(self.lock().files.keys().cloned().collect())
    }
}
