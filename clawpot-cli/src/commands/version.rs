//! `clawpot version`.

use serde::Serialize;

use super::Outcome;
use crate::cli::{Format, Global};
use crate::output;

/// Show the versions of this program and of the server
#[derive(Debug, clap::Args)]
pub struct Args {}

/// The versions as `-o json` shows them.
#[derive(Debug, Serialize)]
struct Versions {
    client: &'static str,
    /// `null` when no server answers.
    server: Option<String>,
    vmm: Option<String>,
}

pub async fn run(global: &Global, _: Args) -> Outcome {
    let host = async { global.api().await?.host().await }.await;
    let missing = host.as_ref().err().map(|failure| failure.first_cause().to_owned());
    let host = host.ok();
    let versions = Versions {
        client: env!("CARGO_PKG_VERSION"),
        vmm: host.as_ref().map(|host| format!("{} {}", host.vmm, host.vmm_version)),
        server: host.map(|host| host.version),
    };
    match global.output {
        Format::Json => output::json(&versions)?,
        Format::Table => {
            let none = || format!("not reached on {}: {}", global.socket.display(), missing.unwrap_or_default());
            output::line(&output::table::pairs([
                ("clawpot".to_owned(), versions.client.to_owned()),
                ("clawpot-server".to_owned(), versions.server.unwrap_or_else(none)),
            ]))?;
        }
    }
    Ok(0)
}
