//! The [`Vmm`] port.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use async_trait::async_trait;
use clawpot_core::admission::Footprint;
use clawpot_core::ports::{Capabilities, GuestEndpoint, Machine, Seat, Vmm};
use clawpot_core::{Fact, MachineId, VmmFact, VmmKind};
use clawpot_host::process::{Rlimits, Spawn, find_program};
use clawpot_types::{Error, InstanceId, MiB, Result};

use super::api::Boot;
use super::boot::{self, Site};
use super::libs::{PROGRAM, Toolbox};
use super::{jailer, probe};
use crate::cmdline::{self, Transport};
use crate::console::Consoles;
use crate::jail::{Jail, Jails, Overhead, VSOCK};

/// What an operator may say about Firecracker.
#[derive(Clone, Debug, Default)]
pub struct Config {
    /// Absolute path; `firecracker` in `path` when unset.
    pub program: Option<PathBuf>,
    /// Absolute path; when unset `jailer` beside the program, else in `path`.
    pub jailer: Option<PathBuf>,
    /// Directories to look in, as `$PATH` has them; then the system's own.
    pub path: Option<OsString>,
    /// How long a probe VM's kernel may take until it speaks; [`probe::LIMIT`] when unset. A slow host is told from one that
    /// runs no guests by this alone.
    pub probe_limit: Option<Duration>,
}

impl Config {
    fn find(&self) -> Result<(PathBuf, PathBuf)> {
        let find = |given: &Option<PathBuf>, name: &str| {
            let wanted = given.as_deref().map_or(name.into(), Path::to_string_lossy);
            find_program(&wanted, self.path.as_deref())
                .map_err(|error| error.hint(format!("install Firecracker's release, or configure the path of {name}")))
        };
        let program = find(&self.program, PROGRAM)?;
        let beside = program.with_file_name("jailer");
        let jailer = if self.jailer.is_none() && beside.exists() { beside } else { find(&self.jailer, "jailer")? };
        Ok((program, jailer))
    }
}

/// Its own memory beside the guest's is little (below), and it has two threads beside one for each CPU. What it reads
/// and writes of its disks counts as well, though it is given up under the limit.
const OVERHEAD: Overhead = Overhead { footprint: FOOTPRINT, memory: MiB(184), memory_per_vcpu: MiB(7), threads: 64 };
/// Resident beside the guest's memory, of 1.16.1: 4.8 to 5.0 MiB of most, 6.8 to 7.0 of one that had served many tests; idle or at
/// work, with 1 or 2 CPUs, made no difference (guests of 256 MiB and 1 GiB). What the kernel keeps for it (page tables of such a
/// guest, stacks, buffers) was 1.0 to 1.6 MiB more. The rest is reserve.
const FOOTPRINT: Footprint = Footprint { memory: MiB(10), memory_per_vcpu: MiB(1) };

/// Runs each VM in a Firecracker inside the jailer's chroot. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Firecracker {
    jails: Jails,
    toolbox: Toolbox,
    state: PathBuf,
    instance: InstanceId,
    probe_limit: Duration,
}

impl Firecracker {
    /// Finds the programs and keeps a copy of what is run in `state/firecracker`.
    /// `NotFound`, `InvalidArgument`: no such program; `Unsupported`: too old a release; `FailedPrecondition`: program and
    /// jailer are of two releases, or a library is missing.
    pub async fn new(state: &Path, instance: &InstanceId, consoles: Consoles, config: &Config) -> Result<Self> {
        let (program, jailer) = config.find().map_err(|error| error.context("looking for Firecracker"))?;
        let toolbox = Toolbox::install(&program, &jailer, &state.join("firecracker")).await?;
        let jails = Jails::new(state, instance, VmmKind::Firecracker, consoles)?;
        let probe_limit = config.probe_limit.unwrap_or(probe::LIMIT);
        let driver = Self { jails, toolbox, state: state.to_owned(), instance: instance.clone(), probe_limit };
        for warning in driver.warnings() {
            tracing::warn!(firecracker = %program.display(), "{warning}");
        }
        Ok(driver)
    }

    /// What is wrong with the programs, though they are used.
    #[must_use]
    pub fn warnings(&self) -> Vec<String> {
        let version = &self.toolbox.version;
        let flaws = version.flaws().map(|flaw| format!("Firecracker {version} has {}: {}", flaw.name, flaw.what));
        let dynamic = (!self.toolbox.is_static()).then(|| {
            "this Firecracker is dynamically linked: it is no official release and has no default seccomp filter; its \
             libraries are linked into each jail"
                .to_owned()
        });
        flaws.chain(dynamic).collect()
    }

    /// Boots `kernel` once, without devices, and tells whether it ran: see [`probe`].
    pub async fn probe(&self, kernel: &Path, initramfs: &Path) -> Result<probe::Probed> {
        let subject = probe::Subject { kernel, initramfs, limit: self.probe_limit };
        probe::run(&self.toolbox, &self.state, &self.instance, &subject).await
    }

    /// The copy of the program that machines are started with; its digest is the VMM's.
    #[must_use]
    pub fn program(&self) -> &Path {
        &self.toolbox.program
    }

    async fn boot(&self, id: &MachineId, seat: &Seat) -> Result<()> {
        let jail = self.jails.jail(id)?;
        let name = id.to_string();
        let site = Site { id: &name, dir: jail.dir(), cgroup: jail.cgroup() };
        boot::boot(&site, seat).await.map_err(|error| error.context(format!("machine {id}: booting its guest")))
    }
}

/// What [`Jails::start`] runs.
fn spawn(toolbox: &Toolbox, base: &Path, jail: &Jail, machine: &Machine) -> Result<Spawn> {
    toolbox.furnish(&jail.root())?;
    let boot = Boot {
        vcpus: machine.vcpus,
        memory: machine.memory,
        boot_args: cmdline::line(machine, cmdline::FIRECRACKER, Transport::Vsock),
        devices: true,
        read_only: machine.extra_disks.iter().map(|disk| disk.read_only).collect(),
    };
    boot::write(jail.dir(), &boot)?;
    let id = machine.id.to_string();
    let inmate = jailer::Inmate::of(&machine.seat, jail.largest_disk(machine)?);
    Ok(jailer_with(toolbox, jailer::arguments(toolbox, base, &id, &inmate)))
}

/// Firecracker's own socket under the name that every VM's has. It cannot put another in its place: its root is taken from
/// it before the guest runs.
fn link_socket(jail: &Jail) -> Result<()> {
    std::os::unix::fs::symlink(Path::new("root").join(VSOCK), jail.socket())
        .map_err(|error| Error::io(format!("linking {} to its socket", jail.socket().display()), error))
}

/// The jailer starts as root and becomes the inmate itself.
pub(super) fn jailer_with(toolbox: &Toolbox, args: Vec<OsString>) -> Spawn {
    let rlimits = Rlimits { nofile: jailer::OPEN_FILES, ..Rlimits::default() };
    Spawn::new(&toolbox.jailer).args(args).rlimits(rlimits)
}

#[async_trait]
impl Vmm for Firecracker {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            kind: VmmKind::Firecracker,
            version: self.toolbox.version.to_string(),
            // Of this driver, so far.
            snapshots: false,
            footprint: FOOTPRINT,
        }
    }

    async fn prepare(&self, machine: &Machine) -> Result<()> {
        self.jails.prepare_with(machine, link_socket).await
    }

    async fn start(&self, machine: &Machine) -> Result<()> {
        let (toolbox, base, described) = (self.toolbox.clone(), self.state.join("jail"), machine.clone());
        let limits = OVERHEAD.of(machine);
        self.jails.start(&machine.id, limits, move |jail| spawn(&toolbox, &base, jail, &described)).await?;
        self.boot(&machine.id, &machine.seat).await
    }

    async fn attach(&self, id: &MachineId, seat: &Seat) -> Result<GuestEndpoint> {
        self.jails.attach(id)?;
        self.boot(id, seat).await?;
        Ok(GuestEndpoint::Vsock(self.jails.jail(id)?.file(VSOCK)))
    }

    async fn inspect(&self, id: &MachineId) -> Fact<VmmFact> {
        self.jails.inspect(id).await
    }

    async fn exited(&self, id: &MachineId) {
        self.jails.exited(id).await;
    }

    async fn stop(&self, id: &MachineId) -> Result<()> {
        self.jails.stop(id)
    }

    async fn destroy(&self, id: &MachineId) -> Result<()> {
        self.jails.destroy(id).await
    }

    async fn list(&self) -> Result<Vec<MachineId>> {
        self.jails.list()
    }
}
