use std::path::PathBuf;

use async_trait::async_trait;
use bytes::Bytes;
use clawpot_types::{Digest, ImageRef, MiB, Result, Timestamp, VmId};
use serde::{Deserialize, Serialize};

use super::{BoxStream, GuestEndpoint, ImageDetail};

/// The builder's agent in a guest made from the builder image. Hostile: whatever comes from it is bounded and checked.
#[async_trait]
pub trait BuilderGuest: Send + Sync {
    /// Asks for one build. What it says is read only as it is polled; dropping it hangs up, on which the guest ends the build.
    /// `Unavailable`, `Timeout`: its agent is not up yet, or no builder's.
    async fn build(&self, endpoint: &GuestEndpoint, order: BuildOrder) -> Result<BoxStream<Result<BuilderSays>>>;
}

/// What a guest is to build.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BuildOrder {
    pub flake: FlakeSource,
    /// What stands behind the `#`; empty: the flake's default.
    pub attr: String,
    /// For `nix build` in the guest.
    pub timeout_secs: u64,
    /// nix asks the public cache for what it has built already.
    pub substitute: bool,
}

/// Where a flake comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FlakeSource {
    /// The disk of sources.
    Local,
    /// Whatever nix takes before the `#`.
    Remote(String),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BuilderSays {
    /// A line of the build's output, cut and cleaned.
    Log(String),
    /// The last word: it is built and on the disk of results. A build that failed is an error of the stream.
    Built { out_path: String },
}

/// The host's side of builds' files: sources, the two disks of each, and what becomes an image. A build's files are named by
/// its id, below the state directory.
///
/// Order: `receive` → `known` → `lay_out` → (the VM) → `take` → `clear`; `clear` from everywhere.
#[async_trait]
pub trait Workbench: Send + Sync {
    /// Early, when it is not known yet what will be built. `AlreadyExists`: the name means another image and must not change.
    async fn may_call(&self, name: &BuildName) -> Result<()>;

    /// Keeps the archive (tar) of a flake's directory, not yet unpacked. `InvalidArgument`: no flake, or no such archive;
    /// `Exhausted`: too large.
    async fn receive(&self, build: &VmId, archive: BoxStream<Result<Bytes>>) -> Result<Source>;

    /// By which a build of this source and attribute is known again.
    fn key(&self, source: &Source, attr: &str) -> Digest;

    /// The image that was built of the same source and attribute before, under the name now; with `None` there is none.
    /// `AlreadyExists`: the name means another.
    async fn known(&self, key: Option<&Digest>, name: &BuildName) -> Result<Option<ImageDetail>>;

    /// Makes the disk of results, of `size`, and that of sources where some were received: in this order, as the guest
    /// numbers them.
    async fn lay_out(&self, build: &VmId, size: MiB) -> Result<LaidOut>;

    /// Makes an image of what a guest left on the disk of results; no machine has it any more.
    /// `FailedPrecondition`: something is missing there or is not what it should be.
    async fn take(&self, build: &VmId, revision: Revision, name: &BuildName) -> Result<ImageDetail>;

    /// Nothing of the build is left when it returns. No machine has its disks.
    async fn clear(&self, build: &VmId) -> Result<()>;

    /// Every build of which there are files.
    async fn left(&self) -> Result<Vec<VmId>>;

    /// Adds to the build's log, which [`Self::clear`] leaves. What is beyond a log's largest size is left out; those of the
    /// oldest builds go when there are too many.
    async fn write_log(&self, build: &VmId, text: String) -> Result<()>;

    /// What was written so far. `NotFound`: nothing, or it has gone.
    async fn read_log(&self, build: &VmId) -> Result<BoxStream<Result<Bytes>>>;
}

/// A flake's directory is text that people wrote, and now and then a picture: the largest archive of one, and the largest disk of
/// sources, which is made of no more than it.
pub const LARGEST_SOURCE: MiB = MiB(1024);

/// The disks of a build.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LaidOut {
    /// Results, then sources, where there are any: as the guest numbers them.
    pub disks: Vec<PathBuf>,
    /// What that of sources takes.
    pub sources: MiB,
}

/// What the image is to be called.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BuildName {
    pub name: ImageRef,
    /// The name may mean another image now.
    pub replace: bool,
}

/// A flake's directory as it was received.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// Of the archive.
    pub digest: Digest,
    /// Of `flake.lock`. `None`: it has none.
    pub lock: Option<Digest>,
}

/// How an image came to be, as it is written down with it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Revision {
    /// As it was asked for.
    pub flake: String,
    pub attr: String,
    /// Of `flake.lock`; `None`: it has none, or the flake is not of this host.
    pub lock: Option<Digest>,
    /// Of the archive of the flake's directory; `None`: the flake is not of this host.
    pub source: Option<Digest>,
    /// The image of the builder.
    pub builder: Digest,
    /// Whom the builder reached: "none" or "default".
    pub network: String,
    /// The release that the built kernel says it is, found in it; `None`: it does not say.
    pub kernel_release: Option<String>,
    /// Where nix had the result: `/nix/store/…`.
    pub out_path: String,
    #[serde(rename = "started_at_us")]
    pub started_at: Timestamp,
    #[serde(rename = "finished_at_us")]
    pub finished_at: Timestamp,
    /// Which one it was: its log bears this name. `None`: of before there were logs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub build: Option<VmId>,
    /// By which the same build is known again; `None`: it never is.
    pub key: Option<Digest>,
}
