//! `clawpot image ls`.

use std::time::SystemTime;

use clawpot_common::v1::ListImagesRequest;

use crate::cli::{Format, Global};
use crate::commands::Outcome;
use crate::failure::Failure;
use crate::output;
use crate::view::image::{ImageView, list};

/// List images
#[derive(Debug, clap::Args)]
pub struct Args {}

pub async fn run(global: &Global, _: Args) -> Outcome {
    let answer = global.api().await?.images().list_images(ListImagesRequest {}).await;
    let images = answer.map_err(|status| Failure::status("listing images", &status))?.into_inner().images;
    match global.output {
        Format::Table => output::line(&list(&images, SystemTime::now()))?,
        Format::Json => output::json(&images.iter().map(ImageView::from).collect::<Vec<_>>())?,
    }
    Ok(0)
}
