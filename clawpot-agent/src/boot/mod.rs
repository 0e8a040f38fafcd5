//! From the kernel's first process in the initramfs to a root file system with network and identity.
//!
//! In order: [`cmdline`] what the host says → [`modules`] drivers → [`devices`] the disks → [`mounts`] the overlay as root →
//! [`volumes`] extra disks at their places → [`identity`] names → [`network`] addresses. Whatever fails ends the boot with one
//! line on the console.

pub mod cmdline;
pub mod devices;
pub mod identity;
pub mod modules;
pub mod mounts;
pub mod network;
pub mod volumes;

use std::fmt::Display;
use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use clawpot_types::GuestPath;
use rustix::process::{Resource, Rlimit, setrlimit};

use crate::console::say;
use crate::exec::FileLimit;
use crate::since_kernel_start;
use cmdline::{CommandLine, Transport};

/// Open files: for us, who hold several for each exec, as many as the kernel lets anyone have by default.
const OWN_FILES: u64 = 1 << 20;
/// For processes: what systemd gives its services.
pub const PROCESS_FILES: FileLimit = FileLimit { soft: 1024, hard: 524_288 };

/// Why the machine cannot be used: what was being done to which thing, and what came of it.
#[derive(Debug, thiserror::Error)]
#[error("{doing}")]
pub struct BootError {
    doing: String,
    #[source]
    source: io::Error,
}

/// Says what was being done when an error came.
pub trait Doing<T> {
    fn doing(self, what: impl Display) -> Result<T, BootError>;
}

impl<T, E: Into<io::Error>> Doing<T> for Result<T, E> {
    fn doing(self, what: impl Display) -> Result<T, BootError> {
        self.map_err(|source| BootError { doing: what.to_string(), source: source.into() })
    }
}

/// A machine that is ready to be listened on.
#[derive(Debug)]
pub struct Booted {
    pub commands: CommandLine,
    /// Root of the VM's disk, which has no path any more.
    pub disk: OwnedFd,
    /// Extra disks that are written to, in the order in which they are made clean at the end.
    pub volumes: Vec<Volume>,
    /// Name of the management NIC; only under [`Transport::Tcp`].
    pub management: Option<String>,
    pub rootfs_ready: Duration,
    /// What took how long, for the console.
    pub phases: Phases,
}

/// An extra disk that is written to.
#[derive(Debug)]
pub struct Volume {
    pub path: GuestPath,
    /// Of its root directory.
    pub root: OwnedFd,
}

/// Durations since the kernel's start at the end of each phase.
#[derive(Debug, Default)]
pub struct Phases(Vec<(&'static str, Duration)>);

impl Phases {
    pub fn reached(&mut self, phase: &'static str) -> Duration {
        let now = since_kernel_start();
        self.0.push((phase, now));
        now
    }
}

impl Display for Phases {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut before = Duration::ZERO;
        for (phase, end) in &self.0 {
            write!(f, " {phase} {:.1}", (*end - before).as_secs_f64() * 1e3)?;
            before = *end;
        }
        f.write_str(" ms")
    }
}

/// Boots. Only as PID 1, and once.
pub fn boot() -> Result<Booted, BootError> {
    let mut phases = Phases::default();
    phases.reached("kernel");
    mounts::kernel_file_systems()?;
    let commands = cmdline::read()?;
    modules::load(&commands)?;
    phases.reached("modules");
    devices::wait_for(clawpot_types::guest::IMAGE_DEVICE)?;
    let extra = commands.mounts.iter().map(|mount| &mount.device);
    extra.chain([&commands.disk]).try_for_each(|device| devices::wait_for(device))?;
    let (disk, fresh) = mounts::root_file_system(&commands.disk)?;
    let volumes = volumes::mount(&commands.mounts)?;
    let rootfs_ready = phases.reached("rootfs");
    identity::set(&commands.hostname, &commands.vm, &fresh)?;
    network::loopback()?;
    network::guest()?;
    let management = match commands.transport {
        Transport::Vsock => None,
        Transport::Tcp => Some(network::management()?),
    };
    raise_file_limit();
    phases.reached("network");
    Ok(Booted { commands, disk, volumes, management, rootfs_ready, phases })
}

/// Fewer files than wished for still serve.
fn raise_file_limit() {
    let all = Rlimit { current: Some(OWN_FILES), maximum: Some(OWN_FILES) };
    if let Err(errno) = setrlimit(Resource::Nofile, all) {
        say(format_args!("raising the limit of open files to {OWN_FILES}: {errno}"));
    }
}
