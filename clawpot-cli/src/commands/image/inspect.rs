//! `clawpot image inspect`.

use clawpot_common::v1::GetImageRequest;
use clawpot_types::ImageRef;

use crate::args::vm::image;
use crate::cli::{Format, Global};
use crate::commands::Outcome;
use crate::failure::Failure;
use crate::output;
use crate::view::image::{ImageDetailView, detail};

/// Show everything about an image
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Name or digest
    #[arg(value_parser = image)]
    image: ImageRef,
}

pub async fn run(global: &Global, args: Args) -> Outcome {
    let request = GetImageRequest { image: args.image.to_string() };
    let answer = global.api().await?.images().get_image(request).await;
    let image = answer.map_err(|status| Failure::status(&format!("image {}: looking at it", args.image), &status))?;
    let view = ImageDetailView::from(image.get_ref());
    match global.output {
        Format::Table => output::line(&detail(&view))?,
        Format::Json => output::json(&view)?,
    }
    Ok(0)
}
