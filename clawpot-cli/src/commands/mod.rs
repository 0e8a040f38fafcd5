//! One file per verb: what can be given to it, and what it does.

pub mod build;
pub mod completions;
pub mod create;
pub mod doctor;
pub mod events;
pub mod exec;
pub mod host;
pub mod image;
pub mod inspect;
pub mod logs;
pub mod ls;
pub mod man;
pub mod rm;
pub mod run;
pub mod start;
pub mod stop;
pub mod ttl;
pub mod version;
pub mod volume;
pub mod wait;

use clawpot_common::v1::Vm;

use crate::api::Api;
use crate::cli::{Cli, Format, Global, Verb};
use crate::failure::Failure;
use crate::output;
use crate::view::vm::VmView;

/// The exit code, or why there is none of its own.
pub type Outcome = Result<u8, Failure>;

/// Exit code of an interrupted program: 128 + SIGINT.
const INTERRUPTED: u8 = 130;

pub async fn dispatch(cli: Cli) -> Outcome {
    let global = &cli.global;
    match cli.verb {
        Verb::Run(args) => run::run(global, args).await,
        Verb::Create(args) => create::run(global, args).await,
        Verb::Ls(args) => ls::run(global, args).await,
        Verb::Inspect(args) => inspect::run(global, args).await,
        Verb::Exec(args) => exec::run(global, args).await,
        Verb::Wait(args) => wait::run(global, args).await,
        Verb::Stop(args) => stop::run(global, args).await,
        Verb::Start(args) => start::run(global, args).await,
        Verb::Ttl(args) => ttl::run(global, args).await,
        Verb::Rm(args) => rm::run(global, args).await,
        Verb::Logs(args) => logs::run(global, args).await,
        Verb::Events(args) => events::run(global, args).await,
        Verb::Build(args) => build::run(global, args).await,
        Verb::Image(args) => image::run(global, args).await,
        Verb::Volume(args) => volume::run(global, args).await,
        Verb::Host(args) => host::run(global, args).await,
        Verb::Doctor(args) => doctor::run(global, args).await,
        Verb::Version(args) => version::run(global, args).await,
        Verb::Completions(args) => completions::run(args),
        Verb::Man(args) => man::run(&args),
    }
}

impl Global {
    async fn api(&self) -> Result<Api, Failure> {
        Api::connect(&self.socket).await
    }

    /// A VM that was acted on: its name, or all of it as JSON.
    fn show_vm(&self, vm: &Vm) -> Result<(), Failure> {
        match self.output {
            Format::Table => output::line(&output::text::printable(crate::view::vm::called(vm))),
            Format::Json => output::json(&VmView::from(vm)),
        }
    }
}

/// Several VMs: one that fails does not keep the others from their turn. Fails as the last failure did, the earlier
/// ones are printed.
async fn each<F>(vms: &[String], mut act: impl FnMut(String) -> F) -> Outcome
where
    F: Future<Output = Result<(), Failure>>,
{
    let mut failed: Option<Failure> = None;
    for vm in vms {
        if let Err(failure) = act(vm.clone()).await
            && let Some(earlier) = failed.replace(failure)
        {
            earlier.report();
        }
    }
    failed.map_or(Ok(0), Err)
}
