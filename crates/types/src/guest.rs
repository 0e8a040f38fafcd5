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

/// Block devices: the read-only image and the VM's writable disk.
pub const IMAGE_DEVICE: &str = "/dev/vda";
pub const DISK_DEVICE: &str = "/dev/vdb";

/// Keys of the kernel command line that the agent reads: `clawpot.vm=ID clawpot.incarnation=N clawpot.hostname=NAME
/// clawpot.transport=vsock|tcp`.
pub const CMDLINE_VM: &str = "clawpot.vm";
pub const CMDLINE_INCARNATION: &str = "clawpot.incarnation";
pub const CMDLINE_HOSTNAME: &str = "clawpot.hostname";
pub const CMDLINE_TRANSPORT: &str = "clawpot.transport";

/// `02:ca:00:00:00:02`.
#[must_use]
pub fn mac_text(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}
