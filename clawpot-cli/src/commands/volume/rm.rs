//! `clawpot volume rm`.

use clawpot_common::v1::DeleteVolumeRequest;
use clawpot_types::VolumeName;

use super::name;
use crate::api::Api;
use crate::cli::{Format, Global};
use crate::commands::{Outcome, each};
use crate::failure::Failure;
use crate::output;

/// Remove volumes with all that is in them
///
/// Refused while a VM has it, also a stopped one.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Names
    #[arg(required = true, value_name = "NAME", value_parser = name)]
    names: Vec<VolumeName>,
    /// Also one whose record cannot be read: its name is free again, and its file stays
    #[arg(short, long)]
    force: bool,
}

#[derive(serde::Serialize)]
struct Removed<'a> {
    name: &'a str,
}

pub async fn run(global: &Global, args: Args) -> Outcome {
    let api = global.api().await?;
    let names: Vec<String> = args.names.iter().map(ToString::to_string).collect();
    each(&names, |name| one(global, &api, name, args.force)).await
}

async fn one(global: &Global, api: &Api, name: String, force: bool) -> Result<(), Failure> {
    let answer = api.volumes().delete_volume(DeleteVolumeRequest { name: name.clone(), force }).await;
    answer.map_err(|status| Failure::status(&format!("volume {name}: removing it"), &status))?;
    match global.output {
        Format::Table => output::line(&name),
        Format::Json => output::json(&Removed { name: &name }),
    }
}
