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

    /// Brings its file system in order. Nobody has it meanwhile. What was done, in a few words.
    /// `Corrupt`: that takes more than `how` allows.
    async fn check(&self, id: &VolumeId, how: Check) -> Result<String>;

    /// The disk becomes `size`, and its file system when a machine mounts it to write; again is fine. Nobody has it meanwhile. When
    /// it fails, it has the size that it had.
    async fn grow(&self, id: &VolumeId, size: MiB) -> Result<()>;

    /// Gone afterwards, also when it was before.
    async fn remove(&self, id: &VolumeId) -> Result<()>;

    /// Every one of which there is a file.
    async fn list(&self) -> Result<Vec<VolumeId>>;
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeFile {
    pub size: MiB,
    /// On the host's disk.
    pub used_bytes: u64,
    /// Its file system says that it was unmounted in order. A guest can say so too: this spares a check, and decides nothing else.
    pub clean: bool,
}

/// How much of a file system is looked at, and what may be done to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Check {
    /// Nothing of one that says it was unmounted in order; of another what is not, as far as that is safe.
    Quick,
    /// All of it, as far as that is safe.
    Whole,
    /// All of it, and whatever it takes: files may lose their names or their content.
    Repair,
}

/// How a copy was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Copied {
    /// Blocks are shared until one of the two changes them.
    Reflink,
    /// Block by block, what is not zero.
    Sparse { bytes: u64 },
}
