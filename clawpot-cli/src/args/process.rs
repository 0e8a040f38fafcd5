//! What `run` and `exec` say about the process and how it is attached.

use std::ffi::OsString;
use std::io::IsTerminal as _;
use std::os::unix::ffi::OsStringExt as _;
use std::time::Duration;

use bytes::Bytes;
use clap::Args;
use clawpot_common::v1::EnvVar;

use super::time;
use crate::failure::Failure;

#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "The command")]
pub struct ProcessArgs {
    /// Give it a terminal
    #[arg(short, long)]
    tty: bool,
    /// Forward standard input even from a terminal; from a pipe or file it always is: in a `while read` loop give it </dev/null
    #[arg(short, long)]
    interactive: bool,
    /// Kill it with all its descendants after this time: seconds, or like 1500ms, 30s, 5m, 2h
    #[arg(long, value_name = "TIME", value_parser = time::positive, allow_negative_numbers = true)]
    timeout: Option<Duration>,
    /// How long to try to reach a server that went away meanwhile; 0 for not at all
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = time::duration, allow_negative_numbers = true)]
    pub reconnect_timeout: Duration,
}

/// A process to be run, and how.
#[derive(Clone, Debug)]
pub struct Process {
    pub argv: Vec<Bytes>,
    /// What the terminal here adds to the environment there.
    pub terminal_env: Vec<EnvVar>,
    pub stdin: bool,
    pub tty: bool,
    pub timeout: Option<Duration>,
    pub reconnect_timeout: Duration,
}

impl ProcessArgs {
    /// Without a command a terminal gets a login shell. `implied`: nobody typed the command, the image says it; on a terminal
    /// it then gets one.
    pub fn process(&self, command: Vec<OsString>, implied: bool) -> Result<Process, Failure> {
        let terminal = std::io::stdin().is_terminal();
        let both = terminal && std::io::stdout().is_terminal();
        let shell = command.is_empty();
        if shell && !both {
            return Err(Failure::new("no command given, and no terminal for a shell")
                .hint("write it after `--`, like `-- uname -a`")
                .code(2));
        }
        let tty = self.tty || shell || (implied && both);
        let argv = match shell {
            true => vec![Bytes::from_static(b"/bin/sh"), Bytes::from_static(b"-l")],
            false => command.into_iter().map(|word| Bytes::from(word.into_vec())).collect(),
        };
        Ok(Process {
            argv,
            terminal_env: if tty { term() } else { Vec::new() },
            stdin: self.interactive || tty || !terminal,
            tty,
            timeout: self.timeout,
            reconnect_timeout: self.reconnect_timeout,
        })
    }
}

fn term() -> Vec<EnvVar> {
    let value = std::env::var_os("TERM").map(|term| Bytes::from(term.into_vec()));
    value.into_iter().map(|value| EnvVar { name: Bytes::from_static(b"TERM"), value }).collect()
}
