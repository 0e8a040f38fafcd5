use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use clawpot_core::ports::{BootFiles, ImageDetail, ImageInfo, Images, UnreadableImage};
use clawpot_core::{ImagePin, VmmKind};
use clawpot_types::{Digest, Error, ImageRef, Kind, MiB, Result, VmId};

use crate::disks::Disks;
use crate::kernel::{self, Looked};
use crate::library::{Library, Room};
use crate::manifest::Blob;
use crate::refs::Refs;
use crate::store::Store;
use crate::verify::Verifier;

/// The `Images` port over an image store and a state directory on one file system.
#[derive(Debug)]
pub struct LocalImages {
    files: Arc<Files>,
    disks: Disks,
}

#[derive(Debug)]
struct Files {
    store: Store,
    verifier: Arc<Verifier>,
    refs: Arc<Refs>,
    /// Kernels that were looked through, by their digests. A handful.
    kernels: Mutex<BTreeMap<Digest, Looked>>,
}

impl LocalImages {
    /// `state` exists and belongs to this process alone; the store may be shared and needs not exist yet. Blocks.
    pub fn open(image_dir: &Path, state: &Path) -> Result<Self> {
        let verifier = Verifier::open(&state.join("verified.json"));
        let store = Store::new(image_dir)?;
        let refs = Arc::new(Refs::open(&store, state)?);
        crate::build::sweep(&store.cache())?;
        let files = Arc::new(Files { store, verifier: Arc::new(verifier), refs, kernels: Mutex::default() });
        Ok(Self { files, disks: Disks::open(state)? })
    }

    /// The operator's side of the same store. `helper` is the path of `clawpot-unpack`.
    #[must_use]
    pub fn library(&self, helper: &Path, room: Room) -> Library {
        let Files { store, verifier, refs, .. } = &*self.files;
        Library::new(store.clone(), Arc::clone(verifier), Arc::clone(refs), helper.to_owned(), room)
    }

    /// The host's kernel and initramfs, verified: what a probe VM boots, and the kernel's digest.
    pub async fn kernel(&self) -> Result<Kernel> {
        self.blocking(Files::kernel).await
    }

    /// Runs `work` where it may block. Whoever stops waiting changes nothing: it only reads, and keeps verdicts.
    async fn blocking<T: Send + 'static>(&self, work: impl FnOnce(&Files) -> Result<T> + Send + 'static) -> Result<T> {
        let files = Arc::clone(&self.files);
        let task = tokio::task::spawn_blocking(move || work(&files));
        task.await.map_err(|error| Error::new(Kind::Internal, "an image task panicked").because(error))?
    }
}

/// Paths of what every VM of this host boots.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kernel {
    pub kernel: PathBuf,
    pub digest: Digest,
    pub initramfs: PathBuf,
}

impl Files {
    fn kernel(&self) -> Result<Kernel> {
        let boot = self.store.boot()?;
        let (kernel, initramfs) =
            (self.store.blob_path(&boot.kernel.digest), self.store.blob_path(&boot.initramfs.digest));
        self.verifier.verify("kernel", &kernel, &boot.kernel)?;
        self.verifier.verify("initramfs", &initramfs, &boot.initramfs)?;
        Ok(Kernel { kernel, digest: boot.kernel.digest, initramfs })
    }

    /// What a VM with this image boots from: role, path and what it must be.
    fn parts(&self, pin: &ImagePin) -> Result<[(&'static str, PathBuf, Blob); 3]> {
        let boot = self.store.boot()?;
        let manifest = self.store.by_digest(&pin.digest)?;
        let part = |role, blob: Blob| (role, self.store.blob_path(&blob.digest), blob);
        Ok([
            part("kernel", manifest.kernel.unwrap_or(boot.kernel)),
            part("initramfs", boot.initramfs),
            part("image", manifest.rootfs.blob),
        ])
    }

    fn ensure(&self, pin: &ImagePin) -> Result<BootFiles> {
        let parts = self.parts(pin)?;
        for (role, path, blob) in &parts {
            self.verifier.verify(role, path, blob)?;
        }
        let [(_, kernel, kernel_blob), (_, initramfs, _), (_, rootfs, _)] = parts;
        Ok(BootFiles { kernel, kernel_digest: kernel_blob.digest, initramfs, rootfs })
    }

    fn boots(&self, pin: &ImagePin, vmm: VmmKind) -> Result<()> {
        let manifest = self.store.by_digest(&pin.digest)?;
        let Some(own) = manifest.kernel else { return Ok(()) };
        let host = self.store.boot()?.kernel;
        if own == host {
            return Ok(());
        }
        self.look_at(&own)?.fits(&self.look_at(&host)?, vmm, manifest.rootfs.format)
    }

    fn look_at(&self, kernel: &Blob) -> Result<Looked> {
        let known = || self.kernels.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(looked) = known().get(&kernel.digest) {
            return Ok(looked.clone());
        }
        let path = self.store.blob_path(&kernel.digest);
        let file = std::fs::File::open(&path)
            .map_err(|error| Error::io(format!("opening the kernel {}", path.display()), error))?;
        let looked = kernel::look(&file)?;
        known().insert(kernel.digest.clone(), looked.clone());
        Ok(looked)
    }
}

#[async_trait]
impl Images for LocalImages {
    async fn resolve(&self, image: &ImageRef) -> Result<ImagePin> {
        let image = image.clone();
        self.blocking(move |files| {
            let (digest, _) = files.store.resolve(&image)?;
            files.store.boot()?;
            // Before a record of the VM exists: from here on no collection takes the image away.
            files.refs.mark(&digest)?;
            Ok(ImagePin { digest })
        })
        .await
    }

    async fn describe(&self, image: &ImageRef) -> Result<ImageDetail> {
        let image = image.clone();
        self.blocking(move |files| files.store.describe(&image)).await
    }

    async fn look(&self, pin: &ImagePin) -> Result<Option<()>> {
        let pin = pin.clone();
        self.blocking(move |files| match files.parts(&pin) {
            Ok(parts) => Ok(parts.iter().all(|(_, path, blob)| files.verifier.is_known(path, blob)).then_some(())),
            // To be told by `ensure`, with all that it says.
            Err(error) if matches!(error.kind(), Kind::NotFound | Kind::FailedPrecondition) => Ok(None),
            Err(error) => Err(error),
        })
        .await
    }

    async fn ensure(&self, pin: &ImagePin) -> Result<BootFiles> {
        let pin = pin.clone();
        self.blocking(move |files| files.ensure(&pin)).await
    }

    async fn boots(&self, pin: &ImagePin, vmm: VmmKind) -> Result<()> {
        let pin = pin.clone();
        self.blocking(move |files| files.boots(&pin, vmm)).await
    }

    async fn list(&self) -> Result<(Vec<ImageInfo>, Vec<UnreadableImage>)> {
        self.blocking(|files| files.store.list()).await
    }

    fn disk_path(&self, vm: &VmId) -> PathBuf {
        self.disks.path(vm)
    }

    async fn look_disk(&self, vm: &VmId) -> Result<Option<()>> {
        self.disks.look(vm).await
    }

    async fn create_disk(&self, vm: &VmId, size: MiB) -> Result<PathBuf> {
        self.disks.create(vm, size).await
    }

    async fn remove_disk(&self, vm: &VmId) -> Result<()> {
        self.disks.remove(vm).await
    }
}
