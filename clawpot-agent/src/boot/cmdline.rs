//! What the host says on the kernel's command line.

use std::io;

use clawpot_types::guest::{CMDLINE_HOSTNAME, CMDLINE_INCARNATION, CMDLINE_TRANSPORT, CMDLINE_VM};

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
}

/// Of this machine.
pub fn read() -> Result<CommandLine, BootError> {
    parse(&std::fs::read_to_string("/proc/cmdline").doing("reading /proc/cmdline")?)
}

fn parse(text: &str) -> Result<CommandLine, BootError> {
    let value = |key: &str| {
        text.split_ascii_whitespace()
            .filter_map(|word| word.split_once('='))
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
    })
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
        let want = CommandLine { vm: "abc".into(), incarnation: 7, hostname: "web".into(), transport: Transport::Tcp };
        assert_eq!(parse(text).unwrap(), want);
    }

    #[test]
    fn what_is_wrong_is_named() {
        let whole = "clawpot.vm=abc clawpot.incarnation=7 clawpot.hostname=web clawpot.transport=tcp";
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
