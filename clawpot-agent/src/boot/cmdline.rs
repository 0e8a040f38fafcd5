//! What the host says on the kernel's command line.

use std::io;

use clawpot_types::GuestPath;
use clawpot_types::guest::{
    CMDLINE_DISK, CMDLINE_HOSTNAME, CMDLINE_INCARNATION, CMDLINE_MOUNT, CMDLINE_TRANSPORT, CMDLINE_VM, DISK_DEVICE,
    MAX_EXTRA_DISKS, disk_device,
};

use super::{BootError, Doing};

/// How the host reaches the agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    Vsock,
    Tcp,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CommandLine {
    pub vm: String,
    pub incarnation: u64,
    pub hostname: String,
    pub transport: Transport,
    /// Extra disks: how many there are before the VM's own, and what of them is to be mounted.
    pub disk: String,
    pub mounts: Vec<Mount>,
}

/// An extra disk's place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// `/dev/vdb`.
    pub device: String,
    pub read_only: bool,
    pub path: GuestPath,
}

/// Of this machine.
pub fn read() -> Result<CommandLine, BootError> {
    parse(&std::fs::read_to_string("/proc/cmdline").doing("reading /proc/cmdline")?)
}

fn parse(text: &str) -> Result<CommandLine, BootError> {
    let words = || text.split_ascii_whitespace().filter_map(|word| word.split_once('='));
    let value = |key: &str| {
        words()
            .find_map(|(name, value)| (name == key).then_some(value))
            .ok_or_else(|| invalid("is not there; the host passes it"))
            .doing(format_args!("kernel command line: {key}"))
    };
    let incarnation = value(CMDLINE_INCARNATION)?;
    let transport = value(CMDLINE_TRANSPORT)?;
    Ok(CommandLine {
        vm: value(CMDLINE_VM)?.to_owned(),
        incarnation: incarnation
            .parse()
            .map_err(invalid)
            .doing(format_args!("kernel command line: {CMDLINE_INCARNATION}={incarnation:?}"))?,
        hostname: value(CMDLINE_HOSTNAME)?.to_owned(),
        transport: match transport {
            "vsock" => Ok(Transport::Vsock),
            "tcp" => Ok(Transport::Tcp),
            _ => Err(invalid("must be vsock or tcp")),
        }
        .doing(format_args!("kernel command line: {CMDLINE_TRANSPORT}={transport:?}"))?,
        disk: match words().find(|(name, _)| *name == CMDLINE_DISK) {
            Some((_, name)) => device(name).doing(format_args!("kernel command line: {CMDLINE_DISK}={name:?}"))?,
            None => DISK_DEVICE.to_owned(),
        },
        mounts: words()
            .filter(|(name, _)| *name == CMDLINE_MOUNT)
            .map(|(_, text)| mount(text).doing(format_args!("kernel command line: {CMDLINE_MOUNT}={text:?}")))
            .collect::<Result<_, _>>()?,
    })
}

/// `vdX:ro|rw:/PATH`.
fn mount(text: &str) -> io::Result<Mount> {
    let mut parts = text.splitn(3, ':');
    let (Some(name), Some(mode), Some(path)) = (parts.next(), parts.next(), parts.next()) else {
        return Err(invalid("must be vdX:ro|rw:/PATH"));
    };
    let read_only = match mode {
        "ro" => true,
        "rw" => false,
        _ => return Err(invalid("must be ro or rw")),
    };
    Ok(Mount { device: device(name)?, read_only, path: path.parse().map_err(invalid)? })
}

fn device(name: &str) -> io::Result<String> {
    let known = (0..=MAX_EXTRA_DISKS).any(|index| disk_device(index) == name);
    if known { Ok(format!("/dev/{name}")) } else { Err(invalid("is no disk that a machine has")) }
}

fn invalid(why: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::console::chain;

    #[test]
    fn the_four_keys_among_others() {
        let text = "quiet console=ttyS0 clawpot.vm=abc clawpot.incarnation=7 clawpot.hostname=web clawpot.transport=tcp panic=-1\n";
        let want = CommandLine {
            vm: "abc".into(),
            incarnation: 7,
            hostname: "web".into(),
            transport: Transport::Tcp,
            disk: "/dev/vdb".into(),
            mounts: Vec::new(),
        };
        assert_eq!(parse(text).unwrap(), want);
    }

    #[test]
    fn extra_disks() {
        let text = "clawpot.vm=abc clawpot.incarnation=7 clawpot.hostname=web clawpot.transport=tcp clawpot.disk=vde \
                    clawpot.mount=vdb:rw:/data clawpot.mount=vdd:ro:/srv/models";
        let parsed = parse(text).unwrap();
        let mount = |device: &str, read_only, path: &str| Mount {
            device: device.into(),
            read_only,
            path: path.parse().unwrap(),
        };
        assert_eq!(parsed.disk, "/dev/vde");
        assert_eq!(parsed.mounts, [mount("/dev/vdb", false, "/data"), mount("/dev/vdd", true, "/srv/models")]);
    }

    #[test]
    fn what_is_wrong_is_named() {
        let whole = "clawpot.vm=abc clawpot.incarnation=7 clawpot.hostname=web clawpot.transport=tcp";
        for (word, want) in [
            ("clawpot.disk=sda", "clawpot.disk=\"sda\": is no disk"),
            ("clawpot.disk=vda", "is no disk"),
            ("clawpot.mount=vdb:rw", "must be vdX:ro|rw:/PATH"),
            ("clawpot.mount=vdb:wo:/a", "must be ro or rw"),
            ("clawpot.mount=vdb:rw:/a/../b", "must not have '.' or '..'"),
        ] {
            let error = parse(&format!("{whole} {word}")).unwrap_err();
            assert!(chain(&error).contains(want), "{}", chain(&error));
        }
        for (from, to, want) in [
            ("clawpot.vm=abc", "", "clawpot.vm: is not there"),
            ("=7", "=x", "clawpot.incarnation=\"x\": invalid digit"),
            ("=tcp", "=ip", "clawpot.transport=\"ip\": must be vsock or tcp"),
        ] {
            let error = parse(&whole.replace(from, to)).unwrap_err();
            assert!(chain(&error).contains(want), "{}", chain(&error));
        }
    }
}
