//! `clawpot volume ls`.

use std::time::SystemTime;

use clawpot_common::v1::ListVolumesRequest;

use crate::cli::{Format, Global};
use crate::commands::Outcome;
use crate::failure::Failure;
use crate::output;
use crate::view::volume::{VolumeView, list};

/// List volumes
#[derive(Debug, clap::Args)]
pub struct Args {}

pub async fn run(global: &Global, _: Args) -> Outcome {
    let answer = global.api().await?.volumes().list_volumes(ListVolumesRequest {}).await;
    let volumes = answer.map_err(|status| Failure::status("listing volumes", &status))?.into_inner().volumes;
    match global.output {
        Format::Table => output::line(&list(&volumes, SystemTime::now()))?,
        Format::Json => output::json(&volumes.iter().map(VolumeView::from).collect::<Vec<_>>())?,
    }
    Ok(0)
}
