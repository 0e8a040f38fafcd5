//! `clawpot run`.

use std::ffi::OsString;
use std::time::Duration;

use clawpot_common::v1::{GetImageRequest, ImageDetail, Vm};
use clawpot_types::ImageRef;
use tonic::{Code, Response};

use super::Outcome;
use crate::api::{Api, retrying};
use crate::args::{ProcessArgs, VmArgs, process::Process, vm::image};
use crate::cli::Global;
use crate::exec::{self, Call, Signals, end::OWN_FAILURE};
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
    /// The command, put behind the image's entrypoint where it has one [default: the image's, else on a terminal a shell]
    #[arg(trailing_var_arg = true, value_name = "COMMAND")]
    command: Vec<OsString>,
    /// Program to run in the place of the image's entrypoint; its own command is then left out. Empty for none
    #[arg(long, value_name = "PROGRAM", help_heading = "The command")]
    entrypoint: Option<OsString>,
    #[command(flatten)]
    vm: VmArgs,
    #[command(flatten)]
    process: ProcessArgs,
}

pub async fn run(global: &Global, args: Args) -> Outcome {
    let mut request = args.vm.request(&args.image, exec::random_id()?.to_string())?;
    request.remove_when_done = args.rm;
    let own = |failure: Failure| failure.code(OWN_FAILURE);
    let api = global.api().await.map_err(own)?;
    let image = describe(&api, &args.image.to_string()).await.map_err(own)?;
    let process = args.process(&image)?;
    // From before there is a VM that could be left behind.
    let mut signals = Signals::listen().map_err(own)?;
    let vm = tokio::select! {
        vm = super::create::create(&api, request) => vm.map_err(own)?,
        code = signals.asked_to_end() => {
            note(if args.rm { "if the VM was made, the server deletes it" } else { super::create::UNKNOWN });
            return Ok(code);
        }
    };
    let ready = async {
        let running = super::create::until_running(&api, &vm).await.map_err(own)?;
        // Between the two the name may have come to mean another image.
        let known = image.image.as_ref().is_none_or(|image| image.digest == running.image_digest);
        if known || running.image_digest.is_empty() {
            return Ok(process);
        }
        args.process(&describe(&api, &running.image_digest).await.map_err(own)?)
    };
    let outcome = tokio::select! {
        process = ready => match process {
            Ok(process) => exec(&api, &vm, process, signals).await,
            Err(failure) => Err(failure),
        },
        code = signals.asked_to_end() => Ok(code),
    };
    match args.rm {
        true => remove(&api, &vm).await,
        false => note(&format!("VM {} stays; `clawpot rm {0}` deletes it", called(&vm))),
    }
    outcome
}

impl Args {
    /// Docker's rule: the entrypoint, and behind it what was typed, or else the image's own command.
    fn process(&self, image: &ImageDetail) -> Result<Process, Failure> {
        let config = image.config.clone().unwrap_or_default();
        let words = |words: Vec<String>| words.into_iter().map(OsString::from);
        let mut argv: Vec<OsString> = match &self.entrypoint {
            None => words(config.entrypoint).collect(),
            Some(program) if program.is_empty() => Vec::new(),
            Some(program) => vec![program.clone()],
        };
        if !self.command.is_empty() {
            argv.extend(self.command.iter().cloned());
        } else if self.entrypoint.is_none() {
            argv.extend(words(config.cmd));
        }
        self.process.process(argv, self.command.is_empty())
    }
}

/// What the image says. One that is not there says nothing: creating the VM tells it in full.
async fn describe(api: &Api, image: &str) -> Result<ImageDetail, Failure> {
    retrying(&format!("image {image}: looking at it"), || {
        let (mut client, request) = (api.images(), GetImageRequest { image: image.to_owned() });
        async move {
            match client.get_image(request).await {
                Err(status) if matches!(status.code(), Code::NotFound | Code::Unimplemented) => {
                    Ok(Response::new(ImageDetail::default()))
                }
                answer => answer,
            }
        }
    })
    .await
}

async fn exec(api: &Api, vm: &Vm, process: Process, signals: Signals) -> Outcome {
    // Environment, directory and user are the VM's own: each of its commands has them.
    let called = called(vm).to_owned();
    let call = Call { vm: vm.id.clone(), called, process, env: Vec::new(), cwd: String::new(), user: String::new() };
    exec::run(api.clone(), call, signals).await
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
