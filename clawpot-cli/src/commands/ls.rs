//! `clawpot ls`.

use std::time::SystemTime;

use clawpot_common::v1::{ListVmsRequest, Vm};
use clawpot_types::Label;

use super::Outcome;
use crate::api::retrying;
use crate::args::labels;
use crate::cli::{Format, Global};
use crate::failure::Failure;
use crate::output;
use crate::view::vm::{VmView, list};

/// VMs asked for at once; the most that the server gives.
const PAGE: u32 = 1_000;

/// List VMs
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Only VMs with this label; may be repeated, and all must match
    #[arg(short, long = "label", value_name = "KEY=VALUE", value_parser = labels::label)]
    labels: Vec<(Label, Label)>,
    /// Only ids, one a line
    #[arg(short, long)]
    quiet: bool,
}

pub async fn run(global: &Global, args: Args) -> Outcome {
    let vms = all(global, &args).await?;
    match (global.output, args.quiet) {
        (_, true) => vms.iter().try_for_each(|vm| output::line(&vm.id))?,
        (Format::Table, false) => output::line(&list(&vms, SystemTime::now()))?,
        (Format::Json, false) => output::json(&vms.iter().map(VmView::from).collect::<Vec<_>>())?,
    }
    Ok(0)
}

async fn all(global: &Global, args: &Args) -> Result<Vec<Vm>, Failure> {
    let labels = labels::wire(&args.labels)?;
    let api = global.api().await?;
    let mut vms = Vec::new();
    let mut page_token = String::new();
    loop {
        let request = ListVmsRequest { labels: labels.clone(), page_size: PAGE, page_token };
        let page = retrying("listing VMs", || {
            let (mut client, request) = (api.vms(), request.clone());
            async move { client.list_vms(request).await }
        })
        .await?;
        vms.extend(page.vms);
        page_token = page.next_page_token;
        if page_token.is_empty() {
            return Ok(vms);
        }
    }
}
