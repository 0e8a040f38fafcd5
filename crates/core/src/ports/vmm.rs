use async_trait::async_trait;
use clawpot_types::{GuestPath, MiB, Result, Vcpus, VmName};

use super::{BootFiles, BoxStream, GuestEndpoint, Seat};
use crate::admission::Footprint;
use crate::record::VmmChoice;
use crate::{Fact, MachineId, VmmFact, VmmKind};

/// Starts and ends virtual machines. One implementation per VMM.
///
/// Order: `prepare` → `start` → `attach` (again after each restart of the daemon) → `stop` → `destroy` → `erase`.
#[async_trait]
pub trait Vmm: Send + Sync {
    fn capabilities(&self) -> Capabilities;

    /// Makes the machine's directory and links its files in. No process yet.
    async fn prepare(&self, machine: &Machine) -> Result<()>;

    /// Forks the VMM into its cgroup, netns, uid and directory and starts the guest. Does not wait for the guest.
    /// A second call for a living machine does nothing.
    async fn start(&self, machine: &Machine) -> Result<()>;

    /// This daemon's side of a living machine: the console is drained, the way to the guest is open.
    async fn attach(&self, id: &MachineId, seat: &Seat) -> Result<GuestEndpoint>;

    /// What is there of the machine. Proves identity by cgroup; never signals.
    async fn inspect(&self, id: &MachineId) -> Fact<VmmFact>;

    /// Returns once no process of the machine is left; at once if there is none. Cancellation is harmless.
    async fn exited(&self, id: &MachineId);

    /// Kills every process of the machine; does not wait.
    async fn stop(&self, id: &MachineId) -> Result<()>;

    /// Removes cgroup and directory of a machine without processes; its console log stays. `FailedPrecondition`: processes live.
    async fn destroy(&self, id: &MachineId) -> Result<()>;

    /// Every machine of which a cgroup or a directory exists, whether or not anyone knows it.
    async fn list(&self) -> Result<Vec<MachineId>>;
}

/// Console logs: one place for all VMMs, kept from boot to boot until the VM is deleted.
#[async_trait]
pub trait Console: Send + Sync {
    /// The last `lines` lines, each cut at 500 characters, control characters replaced.
    async fn tail(&self, vm: &clawpot_types::VmId, lines: usize) -> Result<Vec<String>>;

    /// What is kept (the last `lines` lines of it, 0: all), then, with `follow`, what comes.
    async fn read(
        &self,
        vm: &clawpot_types::VmId,
        lines: usize,
        follow: bool,
    ) -> Result<BoxStream<Result<bytes::Bytes>>>;

    /// Whether anything is kept.
    async fn look(&self, vm: &clawpot_types::VmId) -> Result<Option<()>>;

    /// Removes all that is kept of the VM.
    async fn erase(&self, vm: &clawpot_types::VmId) -> Result<()>;
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Capabilities {
    pub kind: VmmKind,
    pub version: String,
    pub snapshots: bool,
    /// What it takes beside its guests' memory.
    pub footprint: Footprint,
}

impl Capabilities {
    #[must_use]
    pub fn choice(&self) -> VmmChoice {
        VmmChoice { kind: self.kind, version: self.version.clone() }
    }
}

/// All that a VMM is told.
#[derive(Clone, Debug)]
pub struct Machine {
    pub id: MachineId,
    /// The guest's hostname.
    pub name: VmName,
    pub vcpus: Vcpus,
    pub memory: MiB,
    pub files: BootFiles,
    /// The VM's writable disk.
    pub disk: std::path::PathBuf,
    /// At most [`clawpot_types::guest::MAX_EXTRA_DISKS`]: `/dev/vdb`, `/dev/vdc`, …; the VM's own disk comes after them.
    pub extra_disks: Vec<DiskFile>,
    pub seat: Seat,
}

/// A disk that a machine has beside image and its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskFile {
    /// On one file system with the jails. While a machine has it, it is the slot's user's where it may be written, and root's
    /// where not; a driver gives it back to root when the machine is removed. Never in two machines where either may write.
    pub file: std::path::PathBuf,
    pub read_only: bool,
    /// Where the agent mounts it (ext4). `None`: it is left as it is, a block device.
    pub mount: Option<GuestPath>,
}
