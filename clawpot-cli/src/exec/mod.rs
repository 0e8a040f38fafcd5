//! A process in a guest as if it ran here: its streams, its signals, its terminal, its exit code.
//!
//! - [`session`] keeps the process attached, through losses of the server, until it ends
//! - [`outbox`] what is to be sent and resent, [`inbox`] what has arrived: pure, they prove that no byte is lost unsaid
//! - [`wires`] what can be waited for while attached
//! - [`stdin`], [`writer`] the threads that read and write this program's own streams
//! - [`signals`], [`terminal`] what the person at the keyboard does
//! - [`end`] exit codes
//!
//! Memory is constant: every channel and buffer is bounded, and what is full is not read from.

pub mod end;
mod inbox;
mod outbox;
mod session;
mod signals;
mod stdin;
pub mod terminal;
mod wires;
mod writer;

pub use signals::Signals;

use clawpot_common::v1::{EnvVar, ExecStart};
use clawpot_types::ExecId;

use crate::api::Api;
use crate::args::process::Process;
use crate::args::time::millis;
use crate::failure::Failure;

/// What is to be run, where, and how.
#[derive(Debug)]
pub struct Call {
    /// Id, name or prefix; and as it is called in messages.
    pub vm: String,
    pub called: String,
    pub process: Process,
    pub env: Vec<EnvVar>,
    pub cwd: String,
    pub user: String,
}

/// Runs it to its end; the exit code that it or its end stands for.
/// `signals` were listened to from before there was anything to undo or to leave: none is lost.
pub async fn run(api: Api, call: Call, signals: Signals) -> Result<u8, Failure> {
    let reconnect = call.process.reconnect_timeout;
    let program = call.process.argv.first().map(|word| String::from_utf8_lossy(word).into_owned()).unwrap_or_default();
    let called = format!("VM {}: {program}", call.called);
    let start = call.start(random_id()?);
    let raw = terminal::Raw::enter_if(start.tty);
    let end = session::Session::new(api, start, called, reconnect, signals)?.until_end().await;
    drop(raw);
    end.map_err(|failure| failure.code(end::OWN_FAILURE)).and_then(end::End::exit_code)
}

impl Call {
    fn start(self, id: ExecId) -> ExecStart {
        let Self { vm, called: _, process, mut env, cwd, user } = self;
        for var in process.terminal_env {
            if !env.iter().any(|given| given.name == var.name) {
                env.push(var);
            }
        }
        ExecStart {
            vm,
            exec_id: id.to_string(),
            argv: process.argv,
            env,
            cwd,
            user,
            timeout_ms: process.timeout.map(millis).unwrap_or_default(),
            stdin: process.stdin,
            tty: process.tty,
            size: process.tty.then(terminal::size),
        }
    }
}

/// A new id for something of ours: an exec, or a request that may have to be repeated.
pub fn random_id() -> Result<ExecId, Failure> {
    let mut bytes = [0; ExecId::LEN];
    let got = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty());
    // Up to 256 bytes are never given in part (getrandom(2)).
    got.map_err(|errno| Failure::new("this program: asking the kernel for random bytes").because(errno.to_string()))?;
    Ok(ExecId::from_random(bytes))
}
