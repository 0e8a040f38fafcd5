//! `clawpot exec`.

use std::ffi::OsString;

use clap::builder::NonEmptyStringValueParser;
use clawpot_common::v1::EnvVar;

use super::Outcome;
use crate::args::{ProcessArgs, env};
use crate::cli::Global;
use crate::exec::{self, Call, Signals};
use crate::failure::Failure;

/// Run a command in a VM, waiting for it if it is on its way
///
/// The command's exit code is this program's. Ctrl-C is sent to the command; a second one within 2 s ends it.
#[derive(Debug, clap::Args)]
#[command(override_usage = "clawpot exec [OPTIONS] <VM> [--] [COMMAND]...")]
pub struct Args {
    /// Name, id, or the beginning of an id
    vm: String,
    /// The command; on a terminal a shell by default
    #[arg(trailing_var_arg = true, value_name = "COMMAND")]
    command: Vec<OsString>,
    #[command(flatten)]
    process: ProcessArgs,
    /// Environment variable, or its NAME alone to take the value from here; may be repeated
    #[arg(short, long, value_name = "NAME=VALUE", value_parser = env::parser())]
    env: Vec<EnvVar>,
    /// Working directory [default: the VM's, else the user's home]
    #[arg(short, long, value_name = "DIR", value_parser = NonEmptyStringValueParser::new())]
    workdir: Option<String>,
    /// NAME, UID, NAME:GROUP or UID:GID [default: the VM's, else root]
    #[arg(short, long, value_name = "USER", value_parser = NonEmptyStringValueParser::new())]
    user: Option<String>,
}

pub async fn run(global: &Global, args: Args) -> Outcome {
    let process = args.process.process(args.command, false)?;
    let own = |failure: Failure| failure.code(exec::end::OWN_FAILURE);
    let api = global.api().await.map_err(own)?;
    let signals = Signals::listen().map_err(own)?;
    let call = Call {
        called: args.vm.clone(),
        vm: args.vm,
        process,
        env: args.env,
        cwd: args.workdir.unwrap_or_default(),
        user: args.user.unwrap_or_default(),
    };
    exec::run(api, call, signals).await
}
