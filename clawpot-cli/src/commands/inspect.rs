//! `clawpot inspect`.

use std::time::SystemTime;

use clawpot_common::v1::GetVmRequest;

use super::Outcome;
use crate::cli::{Format, Global};
use crate::failure::Failure;
use crate::output;
use crate::view::vm::{VmView, detail};

/// Show all of a VM, and how long each phase of its last boot took
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Name, id, or the beginning of an id
    vm: String,
}

pub async fn run(global: &Global, args: Args) -> Outcome {
    let doing = format!("VM {}: reading it", args.vm);
    let answer = global.api().await?.vms().get_vm(GetVmRequest { vm: args.vm }).await;
    let vm = answer.map_err(|status| Failure::status(&doing, &status))?.into_inner();
    match global.output {
        Format::Table => output::line(&detail(&vm, SystemTime::now()))?,
        Format::Json => output::json(&VmView::from(&vm))?,
    }
    Ok(0)
}
