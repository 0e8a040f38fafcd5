//! `clawpot image rm`.

use clawpot_common::v1::RemoveImageRequest;
use clawpot_types::ImageRef;

use crate::api::Api;
use crate::args::vm::image;
use crate::cli::{Format, Global};
use crate::commands::{Outcome, each};
use crate::failure::Failure;
use crate::output;

/// Take names of images away
///
/// VMs that were made of them keep what they have. What no name and no VM uses stays on disk until `clawpot image gc`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Names
    #[arg(required = true, value_name = "NAME", value_parser = image)]
    names: Vec<ImageRef>,
}

#[derive(serde::Serialize)]
struct Removed<'a> {
    name: &'a str,
    digest: &'a str,
}

pub async fn run(global: &Global, args: Args) -> Outcome {
    let api = global.api().await?;
    let names: Vec<String> = args.names.iter().map(ToString::to_string).collect();
    each(&names, |name| one(global, &api, name)).await
}

async fn one(global: &Global, api: &Api, name: String) -> Result<(), Failure> {
    let answer = api.images().remove_image(RemoveImageRequest { name: name.clone() }).await;
    let answer = answer.map_err(|status| Failure::status(&format!("image {name}: taking its name away"), &status))?;
    match global.output {
        Format::Table => output::line(&name),
        Format::Json => output::json(&Removed { name: &name, digest: &answer.get_ref().digest }),
    }
}
