//! `clawpot volume inspect`.

use clawpot_common::v1::GetVolumeRequest;
use clawpot_types::VolumeName;

use super::name;
use crate::cli::{Format, Global};
use crate::commands::Outcome;
use crate::failure::Failure;
use crate::output;
use crate::view::volume::{VolumeView, detail};

/// Show everything about a volume
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Name
    #[arg(value_parser = name)]
    name: VolumeName,
}

pub async fn run(global: &Global, args: Args) -> Outcome {
    let answer = global.api().await?.volumes().get_volume(GetVolumeRequest { name: args.name.to_string() }).await;
    let volume = answer.map_err(|status| Failure::status(&format!("volume {}: looking at it", args.name), &status))?;
    let view = VolumeView::from(volume.get_ref());
    match global.output {
        Format::Table => output::line(&detail(&view))?,
        Format::Json => output::json(&view)?,
    }
    Ok(0)
}
