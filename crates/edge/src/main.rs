//! `clawpot-edge resolver --address A --fd N [--fd N …]`: started by the server, which passes bound sockets. It needs no
//! privilege and takes none.

use std::os::fd::{FromRawFd as _, OwnedFd, RawFd};
use std::path::PathBuf;
use std::process::ExitCode;

use clawpot_edge::resolver::{self, RESOLV_CONF, Settings};
use clawpot_types::{Error, Kind, Result};

const USAGE: &str = "usage: clawpot-edge resolver --address ADDRESS --fd N [--fd N ...] [--resolv-conf FILE]";

fn main() -> ExitCode {
    clawpot_edge::log::start();
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(error = error.chain(), "the resolver ends");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let arguments = Arguments::parse(std::env::args().skip(1))?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Error::io("starting the runtime", error))?;
    runtime.block_on(resolver::serve(arguments.fds, arguments.settings))
}

#[derive(Debug)]
struct Arguments {
    fds: Vec<OwnedFd>,
    settings: Settings,
}

impl Arguments {
    fn parse(mut words: impl Iterator<Item = String>) -> Result<Self> {
        let bad = |what: String| Error::new(Kind::InvalidArgument, what).hint(USAGE);
        if words.next().as_deref() != Some("resolver") {
            return Err(bad("clawpot-edge: it has one room, `resolver`".to_owned()));
        }
        let mut fds: Vec<RawFd> = Vec::new();
        let mut settings = Settings { resolv_conf: PathBuf::from(RESOLV_CONF) };
        while let Some(flag) = words.next() {
            let value = words.next().ok_or_else(|| bad(format!("{flag}: a value is missing")))?;
            match flag.as_str() {
                // For whoever reads the list of processes, and for the keeper who compares it.
                "--address" => {}
                "--fd" => {
                    let number = value.parse().ok().filter(|n| *n > 2 && !fds.contains(n));
                    fds.push(number.ok_or_else(|| bad(format!("--fd {value}: not a descriptor, or given twice")))?);
                }
                "--resolv-conf" => settings.resolv_conf = value.into(),
                _ => return Err(bad(format!("{flag}: no such flag"))),
            }
        }
        if fds.is_empty() {
            return Err(bad("no socket was passed".to_owned()));
        }
        // SAFETY: the caller opened these for us; each is taken once, before anything else in this process opens files.
        let fds = fds.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }).collect();
        Ok(Self { fds, settings })
    }
}
