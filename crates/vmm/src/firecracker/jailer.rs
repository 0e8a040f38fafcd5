//! The jailer's command line: how a Firecracker gets into its chroot, netns, uid.
//!
//! Its cgroup is not the jailer's business: the child is born in it. Asked to join a group (`--cgroup-version 2
//! --parent-cgroup`), the jailer writes its own pid to `cgroup.procs` of the group it is in already, and the kernel makes
//! it wait for an RCU grace period all the same: 7–28 ms measured. Without `--cgroup` flags and with its default version 1
//! it leaves cgroups alone (read in its source, 1.16.1); the driver verifies the membership once the process runs.
//!
//! Never `--daemonize` (the console would go to /dev/null), never `--new-pid-ns` (the process we hold would not be the VMM).

use std::ffi::OsString;
use std::path::Path;

use clawpot_core::MachineId;
use clawpot_core::ports::Seat;

use super::api::API_SOCKET;
use super::libs::Toolbox;

/// Open files of a VMM: a handful of devices and a descriptor for each vsock connection, of which Firecracker's own limit
/// is 1023.
const OPEN_FILES: u32 = 2048;

/// `base`: below it the jail is made, as [`root`] says.
pub fn arguments(toolbox: &Toolbox, base: &Path, id: &MachineId, seat: &Seat) -> Vec<OsString> {
    let text = |text: String| OsString::from(text);
    let mut args: Vec<OsString> = Vec::with_capacity(24);
    let mut flag = |name: &str, value: OsString| args.extend([OsString::from(name), value]);
    flag("--id", text(id.to_string()));
    flag("--exec-file", toolbox.program.clone().into());
    flag("--uid", text(seat.uid.to_string()));
    flag("--gid", text(seat.gid.to_string()));
    flag("--chroot-base-dir", base.into());
    flag("--netns", seat.netns.clone().into());
    flag("--resource-limit", text(format!("no-file={OPEN_FILES}")));
    // What follows is Firecracker's.
    args.push("--".into());
    args.extend(["--api-sock", API_SOCKET, "--level", "Error"].map(OsString::from));
    args
}

#[cfg(test)]
mod tests {
    use clawpot_types::{Incarnation, Slot};

    use super::*;

    #[test]
    fn the_command_line() {
        let toolbox = Toolbox::for_tests("/state/firecracker/firecracker", "/opt/jailer");
        let id = MachineId { vm: "abcdefghijklmnop".parse().unwrap(), incarnation: Incarnation(3) };
        let seat = Seat {
            slot: Slot(7),
            uid: 1_900_000_007,
            gid: 1_900_000_007,
            netns: "/run/netns/cp3f-7".into(),
            address: [10, 0, 0, 7].into(),
        };
        let args = arguments(&toolbox, Path::new("/state/jail"), &id, &seat);
        let text: Vec<_> = args.iter().map(|arg| arg.to_str().unwrap()).collect();
        insta::assert_snapshot!(text.join("\n"));
    }
}
