use std::path::PathBuf;

use async_trait::async_trait;
use clawpot_types::{MiB, Result, VolumeId};

/// The files of volumes: an ext4 each, sparse. What a volume is, and whose, the store says.
#[async_trait]
pub trait Volumes: Send + Sync {
    /// Whether or not it exists.
    fn path(&self, id: &VolumeId) -> PathBuf;

    async fn look(&self, id: &VolumeId) -> Result<Option<VolumeFile>>;

    /// An empty one; what was half made under this id is made afresh. `Exhausted`: no room, nothing is left behind.
    async fn create(&self, id: &VolumeId, size: MiB) -> Result<()>;

    /// A copy of `from`, which nobody writes to meanwhile. Otherwise as [`Self::create`].
    async fn copy(&self, from: &VolumeId, to: &VolumeId) -> Result<Copied>;

    /// Brings in order what an end without unmounting left behind. Nobody has it meanwhile. What was done, in a few words.
    /// `Corrupt`: that takes more than is done without asking.
    async fn check(&self, id: &VolumeId) -> Result<String>;

    /// File and file system become `size`; again is fine. Nobody has it meanwhile.
    async fn grow(&self, id: &VolumeId, size: MiB) -> Result<()>;

    /// Gone afterwards, also when it was before.
    async fn remove(&self, id: &VolumeId) -> Result<()>;

    /// Every one of which there is a file.
    async fn list(&self) -> Result<Vec<VolumeId>>;
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeFile {
    /// On the host's disk.
    pub used_bytes: u64,
    /// Its file system says that it was unmounted in order. A guest can say so too: this spares a check, and decides nothing else.
    pub clean: bool,
}

/// How a copy was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Copied {
    /// Blocks are shared until one of the two changes them.
    Reflink,
    /// Block by block, what is not zero.
    Sparse { bytes: u64 },
}
