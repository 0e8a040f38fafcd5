//! `clawpot image`: one file per verb.

mod export;
mod gc;
mod import;
mod inspect;
mod log;
mod ls;
mod pull;
mod rm;
mod tag;
mod transfer;

use clap::Subcommand;
use clawpot_common::v1::ImageDetail;

use super::Outcome;
use crate::cli::{Format, Global};
use crate::failure::Failure;
use crate::output;
use crate::view::image::ImageDetailView;

/// Images that VMs are made of
#[derive(Debug, clap::Args)]
#[command(arg_required_else_help = true)]
pub struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    Ls(ls::Args),
    Inspect(inspect::Args),
    Log(log::Args),
    Pull(pull::Args),
    Import(import::Args),
    Export(export::Args),
    Tag(tag::Args),
    Rm(rm::Args),
    Gc(gc::Args),
}

pub async fn run(global: &Global, args: Args) -> Outcome {
    match args.verb {
        Verb::Ls(args) => ls::run(global, args).await,
        Verb::Inspect(args) => inspect::run(global, args).await,
        Verb::Log(args) => log::run(global, args).await,
        Verb::Pull(args) => pull::run(global, args).await,
        Verb::Import(args) => import::run(global, args).await,
        Verb::Export(args) => export::run(global, args).await,
        Verb::Tag(args) => tag::run(global, args).await,
        Verb::Rm(args) => rm::run(global, args).await,
        Verb::Gc(args) => gc::run(global, args).await,
    }
}

/// An image that has come: its name, or all of it as JSON.
fn show(global: &Global, image: &ImageDetail) -> Result<(), Failure> {
    let view = ImageDetailView::from(image);
    match global.output {
        Format::Table => output::line(&output::text::printable(view.called())),
        Format::Json => output::json(&view),
    }
}
