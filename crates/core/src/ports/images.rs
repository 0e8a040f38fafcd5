use std::path::PathBuf;

use async_trait::async_trait;
use clawpot_types::{Digest, Error, ImageRef, MiB, Result, Timestamp, VmId};

use crate::ImagePin;

/// Images, the host's kernel, and the VMs' disks.
#[async_trait]
pub trait Images: Send + Sync {
    /// What `image` means now. Reads no more than the manifest.
    /// `NotFound` names the images there are; `Corrupt`: manifest unreadable; `FailedPrecondition`: no kernel installed.
    async fn resolve(&self, image: &ImageRef) -> Result<ImagePin>;

    /// Whether [`Self::ensure`] has nothing to do. Never reads whole files.
    async fn look(&self, pin: &ImagePin) -> Result<Option<()>>;

    /// Verifies sizes and digests of the image's files and the host's kernel and initramfs; a file that has not changed
    /// since (device, inode, size, mtime, ctime) is not read again. Cancellation is harmless.
    /// `Corrupt`: which file, expected and found digest or size; `NotFound`: which file is missing.
    async fn ensure(&self, pin: &ImagePin) -> Result<BootFiles>;

    /// Every image of the store, and those whose manifest cannot be read.
    async fn list(&self) -> Result<(Vec<ImageInfo>, Vec<UnreadableImage>)>;

    /// Path of the VM's disk, whether or not it exists.
    fn disk_path(&self, vm: &VmId) -> PathBuf;

    async fn look_disk(&self, vm: &VmId) -> Result<Option<()>>;

    /// A writable disk of `size`, cloned from a formatted template; costs nothing that grows with image or size.
    /// An existing one is kept as it is. `Exhausted`: no room, nothing is left behind.
    async fn create_disk(&self, vm: &VmId, size: MiB) -> Result<PathBuf>;

    /// Gone afterwards, also when it was before.
    async fn remove_disk(&self, vm: &VmId) -> Result<()>;
}

/// What a VMM boots from; absolute paths of root-owned read-only files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BootFiles {
    pub kernel: PathBuf,
    pub kernel_digest: Digest,
    pub initramfs: PathBuf,
    pub rootfs: PathBuf,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageInfo {
    pub name: String,
    pub digest: Digest,
    pub size_bytes: u64,
    pub created_at: Timestamp,
    /// "ext4" or "erofs".
    pub format: String,
}

#[derive(Debug)]
pub struct UnreadableImage {
    pub name: String,
    pub error: Error,
}
