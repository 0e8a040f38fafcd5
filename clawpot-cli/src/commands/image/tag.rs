//! `clawpot image tag`.

use clawpot_common::v1::TagImageRequest;
use clawpot_types::ImageRef;

use crate::args::vm::image;
use crate::cli::{Format, Global};
use crate::commands::Outcome;
use crate::failure::Failure;
use crate::output;

/// Give an image another name
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Name or digest
    #[arg(value_parser = image)]
    image: ImageRef,
    /// The new name
    #[arg(value_parser = image)]
    name: ImageRef,
    /// Let the name mean this image where it means another
    #[arg(long)]
    replace: bool,
}

#[derive(serde::Serialize)]
struct Tagged<'a> {
    name: &'a str,
    digest: &'a str,
}

pub async fn run(global: &Global, args: Args) -> Outcome {
    let name = args.name.to_string();
    let request = TagImageRequest { image: args.image.to_string(), name: name.clone(), replace: args.replace };
    let answer = global.api().await?.images().tag_image(request).await;
    let answer =
        answer.map_err(|status| Failure::status(&format!("image {}: naming it {name}", args.image), &status))?;
    match global.output {
        Format::Table => output::line(&name)?,
        Format::Json => output::json(&Tagged { name: &name, digest: &answer.get_ref().digest })?,
    }
    Ok(0)
}
