use std::collections::BTreeSet;
use std::path::PathBuf;

use async_trait::async_trait;
use bytes::Bytes;
use clawpot_types::{Digest, Error, ImageRef, MiB, Result, Timestamp, Vcpus, VmId};

use super::BoxStream;
use crate::{ImagePin, VmmKind};

/// Images, the host's kernel, and the VMs' disks.
#[async_trait]
pub trait Images: Send + Sync {
    /// What `image` means now. Reads no more than the manifest.
    /// `NotFound` names the images there are; `Corrupt`: manifest unreadable; `FailedPrecondition`: no kernel installed.
    async fn resolve(&self, image: &ImageRef) -> Result<ImagePin>;

    /// All that the image's manifest says. Errors as [`Self::resolve`].
    async fn describe(&self, image: &ImageRef) -> Result<ImageDetail>;

    /// Whether [`Self::ensure`] has nothing to do. Never reads whole files.
    async fn look(&self, pin: &ImagePin) -> Result<Option<()>>;

    /// Verifies sizes and digests of the image's files and the host's kernel and initramfs; a file that has not changed
    /// since (device, inode, size, mtime, ctime) is not read again. Cancellation is harmless.
    /// `Corrupt`: which file, expected and found digest or size; `NotFound`: which file is missing.
    async fn ensure(&self, pin: &ImagePin) -> Result<BootFiles>;

    /// Whether a VM of this kind boots with the image's kernel and the host's initramfs, as far as can be told beforehand. A
    /// kernel is read once in a server's life. `FailedPrecondition`: what it lacks.
    async fn boots(&self, pin: &ImagePin, vmm: VmmKind) -> Result<()>;

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

/// What images there are, and where they come from: the operator's side of the store that [`Images`] reads.
///
/// Long work is a stream of [`ImageProgress`] that ends with `Done`. Dropping it cancels the work; what it leaves is only what a
/// repetition goes on from. Nothing is visible under a name before it is whole.
#[async_trait]
pub trait ImageLibrary: Send + Sync {
    async fn list(&self) -> Result<(Vec<ImageInfo>, Vec<UnreadableImage>)>;

    async fn describe(&self, image: &ImageRef) -> Result<ImageDetail>;

    /// From a registry.
    fn pull(&self, pull: Pull) -> BoxStream<Result<ImageProgress>>;

    /// From an archive: OCI layout, `docker save`, or what [`Self::export`] gives.
    fn import(&self, import: Import, archive: BoxStream<Result<Bytes>>) -> BoxStream<Result<ImageProgress>>;

    /// The image as an archive (OCI layout in a tar).
    async fn export(&self, image: &ImageRef) -> Result<BoxStream<Result<Bytes>>>;

    /// Lets `name` mean `image` from now on. `AlreadyExists` where it means another one and `replace` is false.
    async fn tag(&self, image: &ImageRef, name: &ImageRef, replace: bool) -> Result<Digest>;

    /// Takes the name away. The content stays until [`Self::gc`]; VMs made of it are not touched. Gives the digest it meant.
    async fn untag(&self, name: &ImageRef) -> Result<Digest>;

    /// Removes what no name, no VM of any server on this store, no running pull or import uses.
    async fn gc(&self, gc: Collect) -> Result<Collected>;

    /// From now on this server's VMs use these, whatever was held before; with `None` it uses none and is forgotten.
    async fn hold(&self, live: Option<BTreeSet<Digest>>) -> Result<()>;
}

/// A pull from a registry.
#[derive(Clone, Debug)]
pub struct Pull {
    /// `registry/name:tag` or `registry/name@sha256:…`.
    pub reference: String,
    /// Its name here; the reference where there is none.
    pub name: Option<ImageRef>,
    /// The name may mean another image now.
    pub replace: bool,
    /// Without TLS although the registry is not on loopback.
    pub plain_http: bool,
    pub credentials: Option<Credentials>,
}

/// Of a registry; never shown.
#[derive(Clone)]
pub struct Credentials {
    pub user: String,
    pub password: String,
}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Credentials").field("user", &self.user).finish_non_exhaustive()
    }
}

#[derive(Clone, Debug)]
pub struct Import {
    /// Its name here; the archive's own where there is none.
    pub name: Option<ImageRef>,
    pub replace: bool,
    /// Which one, where the archive has several: a name in it.
    pub select: String,
}

#[derive(Clone, Debug, Default)]
pub struct Collect {
    /// Only tell what would go.
    pub dry_run: bool,
    /// Also what only saves time: layers of images that are there, half-done downloads of any age.
    pub all: bool,
    /// What this server's VMs use. `None`: that cannot be told, so that all it ever used stays.
    pub live: Option<BTreeSet<Digest>>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Collected {
    pub removed: Vec<Garbage>,
    /// What the store takes now, bytes on disk.
    pub kept_bytes: u64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Garbage {
    /// "rootfs", "manifest", "layer", "download", …
    pub kind: String,
    pub name: String,
    /// On disk.
    pub bytes: u64,
}

/// One thing that is being done for a pull or an import.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ImageProgress {
    Step(ImageStep),
    Done(Box<ImageDetail>),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageStep {
    /// A layer's digest, "image" or "file system".
    pub id: String,
    /// "downloading", "resuming", "present", "unpacking", "making", "done", …
    pub doing: String,
    pub bytes: u64,
    /// 0: not known.
    pub total_bytes: u64,
    pub bytes_per_second: u64,
}

/// What an image says of the commands that run in it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ImageConfig {
    pub env: Vec<(String, String)>,
    pub entrypoint: Vec<String>,
    pub cmd: Vec<String>,
    pub cwd: String,
    pub user: String,
}

/// What a machine of this image has unless its owner says otherwise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MachineDefaults {
    pub vcpus: Option<Vcpus>,
    pub memory: Option<MiB>,
    pub disk: Option<MiB>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageDetail {
    /// `name` is what it was asked by, empty where that was a digest.
    pub info: ImageInfo,
    pub names: Vec<String>,
    pub config: ImageConfig,
    pub machine: MachineDefaults,
    /// Its own kernel; `None`: the host's.
    pub kernel: Option<Digest>,
    pub source: Option<ImageSource>,
    /// How it was built of a flake.
    pub revision: Option<super::Revision>,
}

/// Where it came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageSource {
    /// "registry" or "archive".
    pub kind: String,
    pub reference: String,
    /// Of the manifest there.
    pub digest: Digest,
    pub architecture: String,
    /// Digest and packed bytes, lowest first.
    pub layers: Vec<(Digest, u64)>,
}
