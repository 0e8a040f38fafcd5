//! `clawpot doctor`.

use std::path::PathBuf;

use super::Outcome;
use crate::cli::{Format, Global};
use crate::doctor::check::{Level, report};
use crate::doctor::{Places, examine};
use crate::output;

/// Check what this host has and lacks for VMs, and say how to mend it
///
/// Nothing is changed. Without root or a server less can be seen, which is said. Exit code 1 if VMs cannot run.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The server's state directory
    #[arg(long, env = "CLAWPOT_STATE_DIR", value_name = "DIR", default_value = "/var/lib/clawpot")]
    state_dir: PathBuf,
    /// Where images are kept [default: images in the state directory]
    #[arg(long, env = "CLAWPOT_IMAGE_DIR", value_name = "DIR")]
    image_dir: Option<PathBuf>,
}

pub async fn run(global: &Global, args: Args) -> Outcome {
    let images = args.image_dir.unwrap_or_else(|| args.state_dir.join("images"));
    let checks = examine(global.api().await, &Places { state: args.state_dir, images }).await;
    match global.output {
        Format::Table => output::line(&report(&checks))?,
        Format::Json => output::json(&checks)?,
    }
    Ok(u8::from(checks.iter().any(|check| check.level == Level::Fail)))
}
