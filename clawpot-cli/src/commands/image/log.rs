//! `clawpot image log`.

use std::io::IsTerminal as _;

use clawpot_common::v1::GetBuildLogRequest;

use crate::cli::Global;
use crate::commands::Outcome;
use crate::failure::Failure;
use crate::output;

/// Show what the build of an image said, also of a build that failed or that is not done yet
///
/// The server keeps the logs of the last 64 builds. On a terminal control characters are shown, not obeyed.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Name or digest of an image, or name of a build (build-…, as `clawpot events` and a failed build tell it)
    #[arg(value_name = "IMAGE|BUILD")]
    of: String,
}

pub async fn run(global: &Global, args: Args) -> Outcome {
    let doing = format!("{}: reading the log of its build", args.of);
    let failure = |status| Failure::status(&doing, &status);
    let request = GetBuildLogRequest { of: args.of };
    let mut chunks = global.api().await?.builds().get_build_log(request).await.map_err(failure)?.into_inner();
    let terminal = std::io::stdout().is_terminal();
    while let Some(chunk) = chunks.message().await.map_err(failure)? {
        match terminal {
            true => output::raw(output::text::printable_bytes(&chunk.data).as_bytes())?,
            false => output::raw(&chunk.data)?,
        }
    }
    Ok(0)
}
