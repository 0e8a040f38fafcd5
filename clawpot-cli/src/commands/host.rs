//! `clawpot host`.

use clawpot_common::v1::GetHostRequest;

use super::Outcome;
use crate::cli::{Format, Global};
use crate::failure::Failure;
use crate::output;
use crate::view::host::{HostView, detail};

/// Show the server, the VMM that it uses and why, and what room is left
#[derive(Debug, clap::Args)]
pub struct Args {}

pub async fn run(global: &Global, _: Args) -> Outcome {
    let answer = global.api().await?.hosts().get_host(GetHostRequest {}).await;
    let host = answer.map_err(|status| Failure::status("host: reading it", &status))?.into_inner();
    let view = HostView::from(&host);
    match global.output {
        Format::Table => output::line(&detail(&view))?,
        Format::Json => output::json(&view)?,
    }
    Ok(0)
}
