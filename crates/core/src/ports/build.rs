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
    async fn lay_out(&self, build: &VmId, size: MiB) -> Result<Vec<PathBuf>>;

    /// Makes an image of what a guest left on the disk of results; no machine has it any more.
    /// `FailedPrecondition`: something is missing there or is not what it should be.
    async fn take(&self, build: &VmId, revision: Revision, name: &BuildName) -> Result<ImageDetail>;

    /// Nothing of the build is left when it returns. No machine has its disks.
    async fn clear(&self, build: &VmId) -> Result<()>;

    /// Every build of which there are files.
    async fn left(&self) -> Result<Vec<VmId>>;
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
    /// By which the same build is known again; `None`: it never is.
    pub key: Option<Digest>,
}
