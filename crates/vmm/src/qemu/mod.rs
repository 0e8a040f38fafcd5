//! QEMU: the same product where there is no usable hardware virtualisation (DESIGN §7).
//!
//! - [`args`] its command line
//! - [`qmp`] a client of its machine protocol
//! - here: the driver
//!
//! It gets its taps and its control socket as open descriptors and everything else by names relative to its directory, in
//! which it can make no file. The agent is reached over
//! TCP on a second NIC that carries nothing but the host's connections; over it the daemon serves the VM's `CONNECT` socket.

mod args;
pub mod qmp;

use std::ffi::OsString;
use std::net::SocketAddrV4;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use async_trait::async_trait;
use clawpot_core::admission::Footprint;
use clawpot_core::ports::{Capabilities, GuestEndpoint, Machine, Seat, Vmm};
use clawpot_core::{Fact, MachineId, VmmFact, VmmKind};
use clawpot_host::process::{Rlimits, Spawn, Tool, User, find_program};
use clawpot_types::guest::{AGENT_PORT, MANAGEMENT_ADDRESS, MANAGEMENT_TAP, TAP};
use clawpot_types::{Error, InstanceId, Kind, MiB, Result};

use crate::console::Consoles;
use crate::jail::{API_SOCKET, Jail, Jails, Overhead};
use crate::relay::Guest;

/// What an operator may say about QEMU.
#[derive(Clone, Debug, Default)]
pub struct Config {
    /// Absolute path, or a name to be looked for; `qemu-system-x86_64` when unset.
    pub program: Option<String>,
    /// Directories to look in first, as `$PATH` has them.
    pub path: Option<OsString>,
    pub accel: Accel,
}

/// Who executes the guest's instructions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Accel {
    /// QEMU itself: works everywhere.
    #[default]
    Tcg,
    /// The host's CPU, where `/dev/kvm` is known to work; the slots' users must be allowed to open it.
    Kvm,
}

/// Beside a guest's memory 180–310 MiB were measured (program and libraries 70, the cache of translated code 128, the rest
/// its heap and stacks), with 1 to 4 CPUs under TCG and guests of 0.5 to 4 GiB that filled it; the emulated TLBs may grow
/// with CPUs and memory. Threads: two of its own and up to 64 for its disks' input and output; 12 were seen.
const OVERHEAD: Overhead = Overhead { footprint: FOOTPRINT, memory: MiB(288), memory_per_vcpu: MiB(48), threads: 128 };
/// Of small guests, under TCG: 152–157 MiB when they have just booted; 240 with 1 or 2 CPUs (256 MiB) and 265 with 4 (512) after
/// minutes of work of several kinds, and it does not go back when they idle.
const FOOTPRINT: Footprint = Footprint { memory: MiB(256), memory_per_vcpu: MiB(16) };

/// The driver. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Qemu {
    program: PathBuf,
    version: String,
    accel: Accel,
    jails: Jails,
}

impl Qemu {
    /// Finds QEMU and asks its version. `NotFound`: there is none.
    pub async fn new(state: &Path, instance: &InstanceId, consoles: Consoles, config: &Config) -> Result<Self> {
        let name = config.program.as_deref().unwrap_or("qemu-system-x86_64");
        let program = find_program(name, config.path.as_deref()).map_err(|error| {
            error
                .context("looking for QEMU")
                .hint("install it: apt-get install --no-install-recommends qemu-system-x86")
        })?;
        let said = Tool::new(&program).args(["--version"]).timeout(Duration::from_secs(10)).run().await?;
        let said = String::from_utf8_lossy(&said);
        let version = version_in(&said).ok_or_else(|| {
            let said: String = said.chars().take(100).collect();
            Error::new(Kind::Unsupported, format!("{}: does not tell QEMU's version: {said:?}", program.display()))
        })?;
        let jails = Jails::new(state, instance, VmmKind::Qemu, consoles)?;
        Ok(Self { program, version: version.to_owned(), accel: config.accel, jails })
    }

    /// Where it was found.
    #[must_use]
    pub fn program(&self) -> &Path {
        &self.program
    }

    /// Everything but the group and the console, which every VMM gets.
    fn spawn(&self, jail: &Jail, machine: &Machine) -> Result<Spawn> {
        let seat = &machine.seat;
        let rlimits = Rlimits { fsize: Some(jail.largest_disk(machine)?), ..Rlimits::default() };
        let mut spawn = Spawn::new(&self.program)
            .rlimits(rlimits)
            .fd(qmp_socket(jail)?, args::QMP_FD)
            .args(args::args(machine, self.accel))
            .cwd(jail.root())
            .netns(clawpot_host::netns::open(&seat.netns)?)
            .user(User { uid: seat.uid, gid: seat.gid });
        let taps = clawpot_host::tap::open(&seat.netns, &[TAP, MANAGEMENT_TAP])?;
        for (tap, at) in taps.into_iter().zip([args::TAP_FD, args::MANAGEMENT_FD]) {
            spawn = spawn.fd(tap, at);
        }
        Ok(spawn)
    }
}

/// Must be called where a runtime is at hand, as blocking threads of one have it.
fn qmp_socket(jail: &Jail) -> Result<OwnedFd> {
    let path = jail.file(API_SOCKET);
    // Of an attempt that failed.
    clawpot_host::fs::remove_file_if_exists(&path)?;
    let listener = clawpot_host::unix::listen(&path)?.into_std();
    listener.map(OwnedFd::from).map_err(|error| Error::io(format!("listening at {}", path.display()), error))
}

#[async_trait]
impl Vmm for Qemu {
    fn capabilities(&self) -> Capabilities {
        Capabilities { kind: VmmKind::Qemu, version: self.version.clone(), snapshots: false, footprint: FOOTPRINT }
    }

    async fn prepare(&self, machine: &Machine) -> Result<()> {
        self.jails.prepare(machine).await
    }

    async fn start(&self, machine: &Machine) -> Result<()> {
        let (this, told) = (self.clone(), machine.clone());
        self.jails.start(&machine.id, OVERHEAD.of(machine), move |jail| this.spawn(jail, &told)).await
    }

    async fn attach(&self, id: &MachineId, seat: &Seat) -> Result<GuestEndpoint> {
        self.jails.attach(id)?;
        self.jails.serve(id, Guest { netns: seat.netns.clone(), address: MANAGEMENT_ADDRESS })?;
        let address = SocketAddrV4::new(MANAGEMENT_ADDRESS, AGENT_PORT);
        Ok(GuestEndpoint::Tcp { netns: seat.netns.clone(), address })
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

/// "7.2.22" of "QEMU emulator version 7.2.22 (Debian …)".
fn version_in(said: &str) -> Option<&str> {
    let version = said.lines().next()?.strip_prefix("QEMU emulator version ")?.split_whitespace().next()?;
    version.starts_with(|c: char| c.is_ascii_digit()).then_some(version)
}

#[cfg(test)]
mod tests;
