//! `clawpot volume check`.

use clawpot_common::v1::CheckVolumeRequest;
use clawpot_types::VolumeName;
use serde::Serialize;

use super::name;
use crate::cli::{Format, Global};
use crate::commands::Outcome;
use crate::failure::Failure;
use crate::output;
use crate::view::volume::VolumeView;

/// Look a volume's file system through
///
/// What is safe to correct is corrected. VMs that have the volume must be stopped. A server checks by itself what was not unmounted
/// in order, before a VM gets it; this is for what such a check leaves, and for whoever wants to be sure.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Volume
    #[arg(value_parser = name)]
    name: VolumeName,
    /// Do whatever it takes: files may lose their names (see lost+found in the volume) or their content. Copy the volume first
    #[arg(long)]
    repair: bool,
}

#[derive(Debug, Serialize)]
struct Checked<'a> {
    #[serde(flatten)]
    volume: VolumeView,
    /// What was found and done, in a few words.
    outcome: &'a str,
}

pub async fn run(global: &Global, args: Args) -> Outcome {
    let request = CheckVolumeRequest { name: args.name.to_string(), repair: args.repair };
    let answer = global.api().await?.volumes().check_volume(request).await;
    let answer = answer.map_err(|status| Failure::status(&format!("volume {}: checking it", args.name), &status))?;
    let answer = answer.into_inner();
    let volume = answer.volume.unwrap_or_default();
    match global.output {
        Format::Table => output::line(&output::text::printable(&format!("{}: {}", volume.name, answer.outcome)))?,
        Format::Json => output::json(&Checked { volume: VolumeView::from(&volume), outcome: &answer.outcome })?,
    }
    Ok(0)
}
