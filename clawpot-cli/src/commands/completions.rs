//! `clawpot completions`.

use clap::CommandFactory as _;
use clap_complete::Shell;

use super::Outcome;
use crate::output;

/// Print a completion script for a shell
#[derive(Debug, clap::Args)]
pub struct Args {
    shell: Shell,
}

pub fn run(args: Args) -> Outcome {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut crate::cli::Cli::command(), "clawpot", &mut script);
    output::raw(&script)?;
    Ok(0)
}
