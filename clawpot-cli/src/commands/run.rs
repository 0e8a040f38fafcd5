//! `clawpot run`.

use std::ffi::OsString;
use std::time::Duration;

use clawpot_common::v1::Vm;
use clawpot_types::ImageRef;

use super::{INTERRUPTED, Outcome};
use crate::api::Api;
use crate::args::{ProcessArgs, VmArgs, process::Process, vm::image};
use crate::cli::Global;
use crate::exec::{self, Call, end::OWN_FAILURE};
use crate::failure::Failure;
use crate::output::note;
use crate::view::vm::called;

/// How long to wait for the VM of `--rm` to be gone; after that the server goes on by itself.
const REMOVAL: Duration = Duration::from_secs(10);

/// Run a command in a new VM
///
/// The command's exit code is this program's. Without --rm the VM stays, and its name is told on stderr.
#[derive(Debug, clap::Args)]
#[command(override_usage = "clawpot run [OPTIONS] <IMAGE> [--] [COMMAND]...")]
pub struct Args {
    /// Delete the VM when the command has ended, or when this program goes away
    #[arg(long)]
    rm: bool,
    /// Name or digest of an image; `clawpot image ls` shows them
    #[arg(value_parser = image)]
    image: ImageRef,
    /// The command; on a terminal a shell by default
    #[arg(trailing_var_arg = true, value_name = "COMMAND")]
    command: Vec<OsString>,
    #[command(flatten)]
    vm: VmArgs,
    #[command(flatten)]
    process: ProcessArgs,
}

pub async fn run(global: &Global, args: Args) -> Outcome {
    let process = args.process.process(args.command)?;
    let mut request = args.vm.request(&args.image, exec::random_id()?.to_string())?;
    request.remove_when_done = args.rm;
    let own = |failure: Failure| failure.code(OWN_FAILURE);
    let api = global.api().await.map_err(own)?;
    let vm = super::create::create(&api, request).await.map_err(own)?;
    let outcome = boot_and_exec(&api, &vm, process).await;
    match args.rm {
        true => remove(&api, &vm).await,
        false => note(&format!("VM {} stays; `clawpot rm {0}` deletes it", called(&vm))),
    }
    outcome
}

async fn boot_and_exec(api: &Api, vm: &Vm, process: Process) -> Outcome {
    tokio::select! {
        running = super::create::until_running(api, vm) => running.map_err(|failure| failure.code(OWN_FAILURE))?,
        _ = tokio::signal::ctrl_c() => return Ok(INTERRUPTED),
    };
    // Environment, directory and user are the VM's own: each of its commands has them.
    let called = called(vm).to_owned();
    let call = Call { vm: vm.id.clone(), called, process, env: Vec::new(), cwd: String::new(), user: String::new() };
    exec::run(api.clone(), call).await
}

/// The server deletes it by itself too; we ask so that it is gone when we are. What goes wrong does not change how the
/// command ended.
async fn remove(api: &Api, vm: &Vm) {
    let gone = async {
        // Not found: the server was faster.
        match api.vms().delete_vm(clawpot_common::v1::DeleteVmRequest { vm: vm.id.clone(), force: false }).await {
            Err(status) if status.code() == tonic::Code::NotFound => Ok(()),
            Err(status) => Err(Failure::status(&format!("VM {}: deleting it", called(vm)), &status)),
            Ok(_) => super::rm::until_gone(api, &vm.id, false).await,
        }
    };
    match tokio::time::timeout(REMOVAL, gone).await {
        Ok(Ok(())) => {}
        Ok(Err(failure)) => {
            failure.report();
        }
        Err(_) => note(&format!("VM {} is still being deleted", called(vm))),
    }
}
