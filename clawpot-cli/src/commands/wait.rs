//! `clawpot wait`.

use std::time::Duration;

use clap::ValueEnum;
use clawpot_common::v1::Phase;

use super::Outcome;
use crate::args::time;
use crate::cli::Global;
use crate::output::progress::Progress;
use crate::view::vm::{called, phase};
use crate::watch::{Goal, Wait};

/// Wait until a VM is in a phase
#[derive(Debug, clap::Args)]
pub struct Args {
    /// What to wait for; a VM that fails on the way ends the waiting with exit code 1
    #[arg(long = "for", value_enum, value_name = "PHASE", default_value = "running")]
    goal: For,
    /// How long at most: seconds, or like 1500ms, 30s, 5m, 2h; exit code 124 when it is over [default: no limit]
    #[arg(long, value_name = "TIME", value_parser = time::positive, allow_negative_numbers = true)]
    timeout: Option<Duration>,
    /// Name, id, or the beginning of an id
    vm: String,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum For {
    Running,
    // No request leads there yet.
    #[value(hide = true)]
    Paused,
    #[value(hide = true)]
    Asleep,
    Stopped,
    Failed,
    Gone,
}

impl From<For> for Goal {
    fn from(goal: For) -> Self {
        match goal {
            For::Running => Self::Phase(Phase::Running),
            For::Paused => Self::Phase(Phase::Paused),
            For::Asleep => Self::Phase(Phase::Asleep),
            For::Stopped => Self::Phase(Phase::Stopped),
            For::Failed => Self::Phase(Phase::Failed),
            For::Gone => Self::Gone,
        }
    }
}

pub async fn run(global: &Global, args: Args) -> Outcome {
    let api = global.api().await?;
    let progress = Progress::new();
    let wait = Wait { api: &api, vm: &args.vm, goal: args.goal.into(), before: None };
    wait.within(args.timeout, |vm| progress.show(&format!("{}: {}", called(vm), phase(vm)))).await?;
    Ok(0)
}
