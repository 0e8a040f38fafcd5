//! `clawpot create`.

use clawpot_common::v1::{CreateVmRequest, Phase, Vm};
use clawpot_types::ImageRef;

use super::Outcome;
use crate::api::{Api, retrying};
use crate::args::{VmArgs, vm::image};
use crate::cli::Global;
use crate::exec::Signals;
use crate::failure::Failure;
use crate::output::note;
use crate::output::progress::Progress;
use crate::view::vm::{called, phase};
use crate::watch::{Goal, Wait};

/// The server was asked, and its answer not waited for.
pub(super) const UNKNOWN: &str = "whether the VM was made is not known; `clawpot ls` tells";

/// Create a VM and start it; its name is printed
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Wait until it runs, and fail if it does not
    #[arg(long)]
    wait: bool,
    /// Name or digest of an image; `clawpot image ls` shows them
    #[arg(value_parser = image)]
    image: ImageRef,
    #[command(flatten)]
    vm: VmArgs,
}

pub async fn run(global: &Global, args: Args) -> Outcome {
    let request = args.vm.request(&args.image, crate::exec::random_id()?.to_string())?;
    let api = global.api().await?;
    // From before there is a VM of whose name nobody would know.
    let mut signals = Signals::listen()?;
    let mut vm = tokio::select! {
        vm = create(&api, request) => vm?,
        code = signals.asked_to_end() => {
            note(UNKNOWN);
            return Ok(code);
        }
    };
    if args.wait {
        tokio::select! {
            running = until_running(&api, &vm) => vm = running?,
            // Its name may be known to nobody but us.
            code = signals.asked_to_end() => {
                note(&format!("VM {} boots on; `clawpot rm {0}` deletes it", called(&vm)));
                return Ok(code);
            }
        }
    }
    global.show_vm(&vm)?;
    Ok(0)
}

/// Creates it once: when the answer is lost the same `request_id` is sent again.
pub(super) async fn create(api: &Api, request: CreateVmRequest) -> Result<Vm, Failure> {
    retrying("creating a VM", || {
        let (mut client, request) = (api.vms(), request.clone());
        async move { client.create_vm(request).await }
    })
    .await
}

/// Waits for a VM that was just created, with progress on a terminal.
pub(super) async fn until_running(api: &Api, vm: &Vm) -> Result<Vm, Failure> {
    let progress = Progress::new();
    let wait = Wait { api, vm: &vm.id, goal: Goal::Phase(Phase::Running), before: None };
    wait.until_reached(|vm| progress.show(&format!("{}: {}", called(vm), phase(vm)))).await
}
