//! `clawpot rm`.

use clawpot_common::v1::{DeleteVmRequest, DeleteVmResponse};
use tonic::{Code, Response};

use super::Outcome;
use crate::api::{Api, retrying};
use crate::cli::{Format, Global};
use crate::failure::Failure;
use crate::output;
use crate::output::progress::Progress;
use crate::view::vm::{called, phase};
use crate::watch::{Goal, Wait};

/// Delete VMs with their disks, in any phase
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Also those in quarantine, whose record or identity cannot be trusted; no guest is asked to unmount its volumes
    #[arg(short, long)]
    force: bool,
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
    let id = delete(api, &name, args.force).await?;
    if !args.no_wait {
        until_gone(api, &id, args.force).await?;
    }
    match global.output {
        Format::Table => output::line(&output::text::printable(&name)),
        Format::Json => output::json(&Deleted { id: &id }),
    }
}

/// What `-o json` shows of a deletion.
#[derive(serde::Serialize)]
struct Deleted<'a> {
    id: &'a str,
}

/// Asks for the deletion; the id of what is deleted. Asked again after a lost answer, a server that knows no such VM has
/// done what the first one was asked for.
pub(super) async fn delete(api: &Api, vm: &str, force: bool) -> Result<String, Failure> {
    let request = DeleteVmRequest { vm: vm.to_owned(), force };
    let asked = std::cell::Cell::new(false);
    let answer = retrying(&format!("VM {vm}: deleting it"), || {
        let (mut client, request, again) = (api.vms(), request.clone(), asked.replace(true));
        async move {
            let id = request.vm.clone();
            match client.delete_vm(request).await {
                Err(status) if again && status.code() == Code::NotFound => Ok(Response::new(DeleteVmResponse { id })),
                answer => answer,
            }
        }
    })
    .await?;
    Ok(answer.id)
}

pub(super) async fn until_gone(api: &Api, id: &str, force: bool) -> Result<(), Failure> {
    let progress = Progress::new();
    // A quarantined VM that is being forced out is no failure of the deletion.
    let goal = if force { Goal::ForcedGone } else { Goal::Gone };
    let wait = Wait { api, vm: id, goal, before: None };
    wait.until_reached(|vm| progress.show(&format!("{}: {}", called(vm), phase(vm)))).await?;
    Ok(())
}
