//! `clawpot volume`: one file per verb.

mod check;
mod cp;
mod create;
mod inspect;
mod ls;
mod resize;
mod rm;

use clap::Subcommand;
use clawpot_common::v1::Volume;
use clawpot_types::VolumeName;

use super::Outcome;
use crate::cli::{Format, Global};
use crate::failure::Failure;
use crate::output;
use crate::view::volume::VolumeView;

/// Disks that outlive VMs
///
/// A VM gets them by --volume NAME:/PATH of `create` and `run`. One VM may write to a volume, or any number may read it; a VM
/// has it until it is deleted, also while it is stopped.
#[derive(Debug, clap::Args)]
#[command(arg_required_else_help = true)]
pub struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    Create(create::Args),
    Ls(ls::Args),
    Inspect(inspect::Args),
    Cp(cp::Args),
    Resize(resize::Args),
    Check(check::Args),
    Rm(rm::Args),
}

pub async fn run(global: &Global, args: Args) -> Outcome {
    match args.verb {
        Verb::Create(args) => create::run(global, args).await,
        Verb::Ls(args) => ls::run(global, args).await,
        Verb::Inspect(args) => inspect::run(global, args).await,
        Verb::Cp(args) => cp::run(global, args).await,
        Verb::Resize(args) => resize::run(global, args).await,
        Verb::Check(args) => check::run(global, args).await,
        Verb::Rm(args) => rm::run(global, args).await,
    }
}

/// The parser of NAME.
fn name(text: &str) -> Result<VolumeName, String> {
    text.parse().map_err(|error: clawpot_types::Error| error.to_string())
}

/// A volume that something was done to: its name, or all of it as JSON.
fn show(global: &Global, volume: &Volume) -> Result<(), Failure> {
    match global.output {
        Format::Table => output::line(&output::text::printable(&volume.name)),
        Format::Json => output::json(&VolumeView::from(volume)),
    }
}
