//! What every guest sees of its machine. The same in each, so that a snapshot restores anywhere (DESIGN §7, §9).

use std::net::Ipv4Addr;

/// The guest's NIC and its gateway, the netns's `tap0`. A constant gateway MAC keeps a restored guest's ARP entry valid.
pub const GUEST_MAC: [u8; 6] = [0x02, 0xca, 0x00, 0x00, 0x00, 0x02];
pub const GATEWAY_MAC: [u8; 6] = [0x02, 0xca, 0x00, 0x00, 0x00, 0x01];
pub const GUEST_ADDRESS: Ipv4Addr = Ipv4Addr::new(172, 31, 255, 2);
/// Gateway and name server.
pub const GATEWAY_ADDRESS: Ipv4Addr = Ipv4Addr::new(172, 31, 255, 1);
/// Both links are /30.
pub const LINK_PREFIX: u8 = 30;

/// The management NIC that only QEMU guests have, and the host's end, the netns's `mgmt0`: agent's TCP port, nothing else.
pub const MANAGEMENT_MAC: [u8; 6] = [0x02, 0xca, 0x00, 0x00, 0x00, 0x06];
pub const MANAGEMENT_HOST_MAC: [u8; 6] = [0x02, 0xca, 0x00, 0x00, 0x00, 0x05];
pub const MANAGEMENT_ADDRESS: Ipv4Addr = Ipv4Addr::new(172, 31, 254, 2);
pub const MANAGEMENT_HOST_ADDRESS: Ipv4Addr = Ipv4Addr::new(172, 31, 254, 1);

/// The agent's port: vsock, or TCP on the management NIC.
pub const AGENT_PORT: u16 = 10_051;

/// Names of the taps inside each netns.
pub const TAP: &str = "tap0";
pub const MANAGEMENT_TAP: &str = "mgmt0";

/// vsock context id of every guest.
pub const CID: u32 = 3;

/// Block devices: the read-only image, then the extra disks in order ([`disk_device`]), and last the VM's own writable disk:
/// [`DISK_DEVICE`] where there is no extra disk, else what [`CMDLINE_DISK`] says.
pub const IMAGE_DEVICE: &str = "/dev/vda";
pub const DISK_DEVICE: &str = "/dev/vdb";

/// Extra disks of one machine: with each a mount of the longest path the kernel's command line stays below its 2 KiB, and
/// Firecracker's 19 interrupts for devices are enough.
pub const MAX_EXTRA_DISKS: usize = 8;

/// The kernel's name of the `index`-th disk after the image: "vdb" is 0. Extra disks come first, the VM's own after the last.
#[must_use]
pub fn disk_device(index: usize) -> String {
    let letter = u8::try_from(index).ok().and_then(|index| b'b'.checked_add(index)).filter(u8::is_ascii_lowercase);
    // Beyond `vdz` nothing is asked: see `MAX_EXTRA_DISKS`.
    format!("vd{}", char::from(letter.unwrap_or(b'z')))
}

/// Keys of the kernel command line that the agent reads: `clawpot.vm=ID clawpot.incarnation=N clawpot.hostname=NAME
/// clawpot.transport=vsock|tcp`, and where there are extra disks `clawpot.disk=vdX`, which is the VM's own, and for each that is to
/// be mounted `clawpot.mount=vdX:ro|rw:/PATH`.
pub const CMDLINE_VM: &str = "clawpot.vm";
pub const CMDLINE_INCARNATION: &str = "clawpot.incarnation";
pub const CMDLINE_HOSTNAME: &str = "clawpot.hostname";
pub const CMDLINE_TRANSPORT: &str = "clawpot.transport";
pub const CMDLINE_DISK: &str = "clawpot.disk";
pub const CMDLINE_MOUNT: &str = "clawpot.mount";

/// `02:ca:00:00:00:02`.
#[must_use]
pub fn mac_text(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}
