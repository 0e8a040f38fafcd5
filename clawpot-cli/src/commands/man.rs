//! `clawpot man`, for those who package it.

use std::path::PathBuf;

use clap::CommandFactory as _;

use super::Outcome;
use crate::failure::Failure;

/// Write the manual pages of this program into a directory
#[derive(Debug, clap::Args)]
#[command(hide = true)]
pub struct Args {
    /// Must exist; gets one file for each verb
    directory: PathBuf,
}

pub fn run(args: &Args) -> Outcome {
    clap_mangen::generate_to(crate::cli::Cli::command(), &args.directory).map_err(|error| {
        Failure::new(format!("{}: writing manual pages into it", args.directory.display())).because(error.to_string())
    })?;
    Ok(0)
}
