//! `clawpot volume cp`.

use clawpot_common::v1::CopyVolumeRequest;
use clawpot_types::{MiB, VolumeName};
use serde::Serialize;

use super::name;
use crate::cli::{Format, Global};
use crate::commands::Outcome;
use crate::failure::Failure;
use crate::output;
use crate::view::volume::VolumeView;

/// Make a volume that is a copy of another
///
/// Where the host's file system can, both share their blocks until one changes them (reflink); elsewhere what is not zero is
/// copied. Which of the two it was is said. A VM that writes to the source must be stopped.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Volume to copy
    #[arg(value_name = "SRC", value_parser = name)]
    from: VolumeName,
    /// Name of the copy
    #[arg(value_name = "DST", value_parser = name)]
    to: VolumeName,
}

#[derive(Debug, Serialize)]
struct Copied<'a> {
    #[serde(flatten)]
    volume: VolumeView,
    /// "reflink" or "sparse".
    copied: &'a str,
    /// Null for a reflink.
    copied_bytes: Option<u64>,
}

pub async fn run(global: &Global, args: Args) -> Outcome {
    let request = CopyVolumeRequest { from: args.from.to_string(), name: args.to.to_string() };
    let answer = global.api().await?.volumes().copy_volume(request).await;
    let what = format!("volume {}: copying it to {}", args.from, args.to);
    let answer = answer.map_err(|status| Failure::status(&what, &status))?.into_inner();
    let volume = answer.volume.unwrap_or_default();
    let sparse = answer.how != "reflink";
    match global.output {
        Format::Table if sparse => {
            let bytes = MiB::from_bytes(answer.copied_bytes);
            output::line(&format!("{} (sparse copy, {bytes} copied)", output::text::printable(&volume.name)))?;
        }
        Format::Table => output::line(&format!("{} (reflink)", output::text::printable(&volume.name)))?,
        Format::Json => output::json(&Copied {
            volume: VolumeView::from(&volume),
            copied: &answer.how,
            copied_bytes: sparse.then_some(answer.copied_bytes),
        })?,
    }
    Ok(0)
}
