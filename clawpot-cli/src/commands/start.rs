//! `clawpot start`.

use clawpot_common::v1::{Phase, StartVmRequest};

use super::Outcome;
use crate::api::{Api, retrying};
use crate::cli::Global;
use crate::failure::Failure;
use crate::output::progress::Progress;
use crate::view::vm::{called, phase};
use crate::watch::{Goal, Wait};

/// Start stopped or failed VMs
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Return when it is asked for, not when it runs
    #[arg(long)]
    no_wait: bool,
    /// Names, ids, or the beginnings of ids
    #[arg(required = true, value_name = "VM")]
    vms: Vec<String>,
}

pub async fn run(global: &Global, args: Args) -> Outcome {
    let api = global.api().await?;
    super::each(&args.vms, |vm| one(global, &api, args.no_wait, vm)).await
}

async fn one(global: &Global, api: &Api, no_wait: bool, name: String) -> Result<(), Failure> {
    let request = StartVmRequest { vm: name.clone() };
    let mut vm = retrying(&format!("VM {name}: starting it"), || {
        let (mut client, request) = (api.vms(), request.clone());
        async move { client.start_vm(request).await }
    })
    .await?;
    if !no_wait {
        let progress = Progress::new();
        let wait = Wait { api, vm: &vm.id, goal: Goal::Phase(Phase::Running), before: Some(&vm) };
        vm = wait.until_reached(|vm| progress.show(&format!("{}: {}", called(vm), phase(vm)))).await?;
    }
    global.show_vm(&vm)
}
