//! `clawpot image gc`.

use clawpot_common::v1::CollectImagesRequest;

use crate::cli::{Format, Global};
use crate::commands::Outcome;
use crate::failure::Failure;
use crate::output;
use crate::view::image::{CollectedView, collected};

/// Remove what no name, no VM and no running pull uses
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Only show what would go
    #[arg(short = 'n', long)]
    dry_run: bool,
    /// Also layers of images that are there, and half-done downloads of today
    #[arg(long)]
    all: bool,
}

pub async fn run(global: &Global, args: Args) -> Outcome {
    let request = CollectImagesRequest { dry_run: args.dry_run, all: args.all };
    let answer = global.api().await?.images().collect_images(request).await;
    let answer = answer.map_err(|status| Failure::status("collecting images", &status))?.into_inner();
    let view = CollectedView::new(&answer, args.dry_run);
    match global.output {
        Format::Table => output::line(&collected(&view))?,
        Format::Json => output::json(&view)?,
    }
    Ok(0)
}
