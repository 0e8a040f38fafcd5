//! `clawpot volume resize`.

use clawpot_common::v1::ResizeVolumeRequest;
use clawpot_types::{MiB, VolumeName};

use super::{name, show};
use crate::args::size;
use crate::cli::Global;
use crate::commands::Outcome;
use crate::failure::Failure;

/// Make a volume larger
///
/// VMs that have it must be stopped. A volume never becomes smaller.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Name
    #[arg(value_parser = name)]
    name: VolumeName,
    /// New size: MiB, or like 512M, 20G
    #[arg(long, value_name = "SIZE", value_parser = size::disk, allow_negative_numbers = true)]
    size: MiB,
}

pub async fn run(global: &Global, args: Args) -> Outcome {
    let request = ResizeVolumeRequest { name: args.name.to_string(), size_mib: args.size.0 };
    let answer = global.api().await?.volumes().resize_volume(request).await;
    let volume = answer.map_err(|status| Failure::status(&format!("volume {}: resizing it", args.name), &status))?;
    show(global, volume.get_ref())?;
    Ok(0)
}
