//! `clawpot image`.

use std::time::SystemTime;

use clap::Subcommand;
use clawpot_common::v1::ListImagesRequest;

use super::Outcome;
use crate::cli::{Format, Global};
use crate::failure::Failure;
use crate::output;
use crate::view::image::{ImageView, list};

/// Images that VMs are made of
#[derive(Debug, clap::Args)]
#[command(arg_required_else_help = true)]
pub struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// List images
    Ls,
}

pub async fn run(global: &Global, args: Args) -> Outcome {
    match args.verb {
        Verb::Ls => ls(global).await,
    }
}

async fn ls(global: &Global) -> Outcome {
    let answer = global.api().await?.images().list_images(ListImagesRequest {}).await;
    let images = answer.map_err(|status| Failure::status("listing images", &status))?.into_inner().images;
    match global.output {
        Format::Table => output::line(&list(&images, SystemTime::now()))?,
        Format::Json => output::json(&images.iter().map(ImageView::from).collect::<Vec<_>>())?,
    }
    Ok(0)
}
