//! `clawpot stop`.

use std::time::Duration;

use clawpot_common::v1::{Phase, StopVmRequest};

use super::Outcome;
use crate::api::{Api, retrying};
use crate::args::time;
use crate::cli::Global;
use crate::failure::Failure;
use crate::output::progress::Progress;
use crate::view::vm::{called, phase};
use crate::watch::{Goal, Wait};

/// Stop VMs; their disks stay
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Time for an orderly shutdown before it is cut off: seconds, or like 1500ms, 30s [default: the server's]
    #[arg(long, value_name = "TIME", value_parser = time::positive, allow_negative_numbers = true)]
    grace: Option<Duration>,
    /// Return when it is asked for, not when it is done
    #[arg(long)]
    no_wait: bool,
    /// Names, ids, or the beginnings of ids
    #[arg(required = true, value_name = "VM")]
    vms: Vec<String>,
}

pub async fn run(global: &Global, args: Args) -> Outcome {
    let api = global.api().await?;
    super::each(&args.vms, |vm| one(global, &api, &args, vm)).await
}

async fn one(global: &Global, api: &Api, args: &Args, name: String) -> Result<(), Failure> {
    let request = StopVmRequest { vm: name.clone(), grace_ms: args.grace.map(time::millis).unwrap_or_default() };
    let mut vm = retrying(&format!("VM {name}: stopping it"), || {
        let (mut client, request) = (api.vms(), request.clone());
        async move { client.stop_vm(request).await }
    })
    .await?;
    if !args.no_wait {
        let progress = Progress::new();
        let wait = Wait { api, vm: &vm.id, goal: Goal::Phase(Phase::Stopped), before: Some(&vm) };
        vm = wait.until_reached(|vm| progress.show(&format!("{}: {}", called(vm), phase(vm)))).await?;
    }
    global.show_vm(&vm)
}
