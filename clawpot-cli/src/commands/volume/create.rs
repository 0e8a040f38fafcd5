//! `clawpot volume create`.

use clawpot_common::v1::CreateVolumeRequest;
use clawpot_types::{MiB, VolumeName};

use super::{name, show};
use crate::args::size;
use crate::cli::Global;
use crate::commands::Outcome;
use crate::failure::Failure;

/// Make an empty volume
///
/// It is an ext4 file system in a sparse file: it takes on the host what is written to it.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Name: 1 to 63 of [a-z0-9._-]
    #[arg(value_parser = name)]
    name: VolumeName,
    /// Size: MiB, or like 512M, 20G
    #[arg(long, value_name = "SIZE", value_parser = size::disk, allow_negative_numbers = true)]
    size: MiB,
}

pub async fn run(global: &Global, args: Args) -> Outcome {
    let request = CreateVolumeRequest { name: args.name.to_string(), size_mib: args.size.0 };
    let answer = global.api().await?.volumes().create_volume(request).await;
    let volume = answer.map_err(|status| Failure::status(&format!("volume {}: creating it", args.name), &status))?;
    show(global, volume.get_ref())?;
    Ok(0)
}
