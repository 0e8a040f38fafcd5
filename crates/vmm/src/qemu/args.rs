//! QEMU's command line. Everything it names is relative to the machine's own directory or an open descriptor, so that it
//! is the same for every VM of one size.

use std::os::fd::RawFd;

use clawpot_core::ports::Machine;
use clawpot_types::guest::{GUEST_MAC, MANAGEMENT_MAC, disk_device, mac_text};

use super::Accel;
use crate::cmdline::{self, Transport};
use crate::jail::{DISK, INITRAMFS, KERNEL, ROOTFS};

/// Where the child finds its taps: [`clawpot_types::guest::TAP`] and [`clawpot_types::guest::MANAGEMENT_TAP`].
pub(super) const TAP_FD: RawFd = 3;
pub(super) const MANAGEMENT_FD: RawFd = 4;
/// And the socket it is to be told what to do by: listening already, so that it need not be able to make a file.
pub(super) const QMP_FD: RawFd = 5;

/// Cache of translated code, MiB. QEMU's default of 1 GiB would let every idle guest grow to it; boots under 32 are slower
/// (1.54 s instead of 1.39 s), above 128 no faster.
const TB_SIZE: u32 = 128;

/// Places on the PCI bus. The guest numbers its disks in this order: rootfs is `/dev/vda`, the extra disks `/dev/vdb`,
/// `/dev/vdc`, …, and the VM's own disk comes last.
const ROOTFS_SLOT: &str = "0x02";
const FIRST_EXTRA_SLOT: usize = 0x08;
const DISK_SLOT: &str = "0x1e";
const NET_SLOT: &str = "0x04";
const MANAGEMENT_SLOT: &str = "0x05";
const RNG_SLOT: &str = "0x06";

pub(super) fn args(machine: &Machine, accel: Accel) -> Vec<String> {
    let mut args = Vec::with_capacity(64);
    let mut put = |parts: &[&str]| args.extend(parts.iter().map(|&part| part.to_owned()));
    let accel = match accel {
        Accel::Tcg => format!("tcg,thread=multi,tb-size={TB_SIZE}"),
        Accel::Kvm => "kvm".to_owned(),
    };
    // PIT and HPET of `pc` spare the hang in TSC calibration that `microvm` has.
    put(&["-machine", "pc,acpi=on,usb=off,vmport=off,dump-guest-core=off", "-accel", &accel, "-cpu", "max"]);
    put(&["-m", &machine.memory.0.to_string(), "-smp", &machine.vcpus.get().to_string()]);
    put(&["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"]);
    put(&["-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"]);
    put(&["-kernel", KERNEL, "-initrd", INITRAMFS]);
    put(&["-append", &cmdline::line(machine, cmdline::QEMU, Transport::Tcp)]);
    // Standard output is the machine's console, standard input is empty.
    put(&["-chardev", "stdio,id=console,signal=off,mux=off", "-serial", "chardev:console"]);
    put(&["-chardev", &format!("socket,id=qmp,fd={QMP_FD},server=on,wait=off"), "-mon", "chardev=qmp,mode=control"]);
    put(&["-blockdev", &format!("driver=raw,node-name=rootfs,read-only=on,file.driver=file,file.filename={ROOTFS}")]);
    put(&["-device", &device("virtio-blk", ROOTFS_SLOT, "drive=rootfs")]);
    for (index, disk) in machine.extra_disks.iter().enumerate() {
        put(&extra_disk(index, disk.read_only).each_ref().map(String::as_str));
    }
    put(&[
        "-blockdev",
        &format!("driver=raw,node-name=disk,discard=unmap,file.driver=file,file.filename={DISK},file.discard=unmap"),
    ]);
    put(&["-device", &device("virtio-blk", DISK_SLOT, "drive=disk,discard=on")]);
    for (id, fd, slot, mac) in
        [("net", TAP_FD, NET_SLOT, GUEST_MAC), ("mgmt", MANAGEMENT_FD, MANAGEMENT_SLOT, MANAGEMENT_MAC)]
    {
        put(&["-netdev", &format!("tap,id={id},fd={fd}")]);
        // No ROM: it would offer to boot from the network.
        put(&["-device", &device("virtio-net", slot, &format!("netdev={id},mac={},romfile=", mac_text(mac)))]);
    }
    put(&["-object", "rng-builtin,id=entropy", "-device", &device("virtio-rng", RNG_SLOT, "rng=entropy")]);
    args
}

fn extra_disk(index: usize, read_only: bool) -> [String; 4] {
    let name = disk_device(index);
    let (host, guest) = match read_only {
        true => ("read-only=on,file.driver=file", ""),
        false => ("discard=unmap,file.driver=file,file.discard=unmap", ",discard=on"),
    };
    let node = format!("driver=raw,node-name={name},{host},file.filename={name}");
    let slot = format!("{:#04x}", FIRST_EXTRA_SLOT + index);
    ["-blockdev".to_owned(), node, "-device".to_owned(), device("virtio-blk", &slot, &format!("drive={name}{guest}"))]
}

/// Without the legacy interface, which our kernels do not use.
fn device(kind: &str, slot: &str, rest: &str) -> String {
    format!("{kind}-pci-non-transitional,addr={slot},{rest}")
}
