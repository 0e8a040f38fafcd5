//! `clawpot`: the command line of a Clawpot server.
//!
//! - [`cli`] everything that can be typed; [`args`] the words in it, checked before anything is sent
//! - [`commands`] one file per verb
//! - [`api`] the connection to the server, [`watch`] waiting for a VM's phase
//! - [`exec`] a process in a guest as if it ran here
//! - [`doctor`] what this host lacks
//! - [`view`] what is shown: our own JSON and tables, never the wire's types
//! - [`output`] how it is shown; [`failure`] how it is told that it went wrong, [`field`] in
//!   the words of the command line

mod api;
mod args;
mod cli;
mod commands;
mod doctor;
mod exec;
mod failure;
mod field;
mod output;
mod view;
mod watch;

use std::process::ExitCode;

use clap::Parser as _;

use crate::failure::Failure;

fn main() -> ExitCode {
    exec::terminal::restore_on_panic();
    let cli = match cli::Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => cli::shortened(error).exit(),
    };
    output::color::choose(cli.global.color);
    match start(cli) {
        Ok(code) => code.into(),
        Err(failure) => failure.report().into(),
    }
}

/// One thread is enough to relay a process, and starts in a tenth of the time of a pool.
fn start(cli: cli::Cli) -> commands::Outcome {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::new("this program: starting its event loop").because(error.to_string()))?
        .block_on(commands::dispatch(cli))
}
