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

use clawpot_core::ports::Seat;

use super::libs::Toolbox;
use crate::jail::API_SOCKET;

/// Open files of a VMM: a handful of devices, and a descriptor for each vsock connection, of which it allows 1023
/// (`MAX_CONNECTIONS` in its source).
pub const OPEN_FILES: u64 = 2048;

/// Whom the VMM becomes, and where.
#[derive(Clone, Copy, Debug)]
pub struct Inmate<'a> {
    pub uid: u32,
    pub gid: u32,
    /// `None`: for a guest without network.
    pub netns: Option<&'a Path>,
    /// How far into a file it may write, bytes. `None`: for a guest without disk.
    pub fsize: Option<u64>,
}

impl<'a> Inmate<'a> {
    /// `disk`: its size, bytes.
    pub fn of(seat: &'a Seat, disk: u64) -> Self {
        Self { uid: seat.uid, gid: seat.gid, netns: Some(&seat.netns), fsize: Some(disk) }
    }
}

/// The chroot will be `<base>/firecracker/<id>/root`.
pub fn arguments(toolbox: &Toolbox, base: &Path, id: &str, inmate: &Inmate<'_>) -> Vec<OsString> {
    let mut args: Vec<OsString> = Vec::with_capacity(21);
    let mut flag = |name: &str, value: OsString| args.extend([OsString::from(name), value]);
    flag("--id", id.into());
    flag("--exec-file", toolbox.program.clone().into());
    flag("--uid", inmate.uid.to_string().into());
    flag("--gid", inmate.gid.to_string().into());
    flag("--chroot-base-dir", base.into());
    if let Some(netns) = inmate.netns {
        flag("--netns", netns.into());
    }
    flag("--resource-limit", format!("no-file={OPEN_FILES}").into());
    if let Some(bytes) = inmate.fsize {
        flag("--resource-limit", format!("fsize={bytes}").into());
    }
    // What follows is Firecracker's.
    args.push("--".into());
    args.extend(["--api-sock", API_SOCKET, "--level", "Error"].map(OsString::from));
    args
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line() {
        let toolbox = Toolbox::for_tests("/state/firecracker/firecracker", "/opt/jailer");
        let netns = Path::new("/run/netns/cp3f-7");
        let inmate = Inmate { uid: 1_900_000_007, gid: 1_900_000_007, netns: Some(netns), fsize: Some(4 << 30) };
        let args = arguments(&toolbox, Path::new("/state/jail"), "abcdefghijklmnop-3", &inmate);
        let text: Vec<_> = args.iter().map(|arg| arg.to_str().unwrap()).collect();
        insta::assert_snapshot!(text.join("\n"));
    }
}
