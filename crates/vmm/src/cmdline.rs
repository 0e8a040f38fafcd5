//! The kernel's command line: what is the same for both VMMs, and who the guest is.

use clawpot_core::ports::Machine;
use clawpot_types::guest::{
    CMDLINE_DISK, CMDLINE_HOSTNAME, CMDLINE_INCARNATION, CMDLINE_MOUNT, CMDLINE_TRANSPORT, CMDLINE_VM, disk_device,
};

/// How the host reaches the agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    Vsock,
    Tcp,
}

impl Transport {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Vsock => "vsock",
            Self::Tcp => "tcp",
        }
    }
}

/// Firecracker has one serial port, no PCI bus and no ACPI reset: `reboot=k` ends it through the keyboard controller.
/// `i8042.*`: that controller has nothing else to probe.
pub const FIRECRACKER: &str = "pci=off reboot=k i8042.noaux i8042.nomux i8042.nopnp i8042.dumbkbd tsc=reliable";

/// `tsc=reliable`: under load the watchdog would take an emulated TSC for broken, and without `no_timer_check` the
/// kernel panics when the emulator was not run for the 10 ms in which it counts timer interrupts ("IO-APIC + timer doesn't
/// work"; seen with eight VMs booting on two cores). `i8042.*`: nothing to probe there.
pub const QEMU: &str = "tsc=reliable no_timer_check i8042.noaux i8042.nomux i8042.nopnp i8042.dumbkbd";

/// `console=ttyS0`: what a guest prints is the log of a failed boot. `panic=-1`: a panic is a reboot, which ends the VMM.
/// `loglevel=4`: warnings and worse; a full boot log costs 0.5 s on an emulated serial port.
/// `cryptomgr.notests`: the kernel's ciphers were tested when it was built; 0.2–0.4 s of an emulated boot.
/// `random.trust_cpu=on`: the pool is ready at boot, and the virtio device adds to it.
const COMMON: &str = "console=ttyS0 loglevel=4 panic=-1 cryptomgr.notests random.trust_cpu=on";

/// The whole line; `vmm` is one of this module's constants. Every part is of a checked type: nothing needs quoting.
#[must_use]
pub fn line(machine: &Machine, vmm: &str, transport: Transport) -> String {
    let mut line = format!(
        "{COMMON} {vmm} {CMDLINE_VM}={} {CMDLINE_INCARNATION}={} {CMDLINE_HOSTNAME}={} {CMDLINE_TRANSPORT}={}",
        machine.id.vm,
        machine.id.incarnation,
        machine.name,
        transport.as_str()
    );
    line.extend(disks(machine));
    line
}

/// Which disk is the VM's own, and where the others belong. Nothing where there are no others.
fn disks(machine: &Machine) -> Vec<String> {
    let extra_disks = &machine.extra_disks;
    if extra_disks.is_empty() {
        return Vec::new();
    }
    let own = format!(" {CMDLINE_DISK}={}", disk_device(extra_disks.len()));
    let mounts = extra_disks.iter().enumerate().filter_map(|(index, disk)| {
        let mode = if disk.read_only { "ro" } else { "rw" };
        disk.mount.as_ref().map(|path| format!(" {CMDLINE_MOUNT}={}:{mode}:{path}", disk_device(index)))
    });
    std::iter::once(own).chain(mounts).collect()
}
