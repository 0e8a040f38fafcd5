//! `clawpot ttl`.

use std::time::Duration;

use clawpot_common::v1::SetTtlRequest;

use super::Outcome;
use crate::api::retrying;
use crate::args::time;
use crate::cli::Global;

/// Give a VM this long to live from now on, also after each start
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Name, id, or the beginning of an id
    vm: String,
    /// Seconds, or like 90s, 30m, 12h; or `never`
    #[arg(value_name = "TIME", value_parser = life)]
    life: Life,
}

#[derive(Clone, Copy, Debug)]
enum Life {
    For(Duration),
    Ever,
}

fn life(text: &str) -> Result<Life, String> {
    if text == "never" {
        return Ok(Life::Ever);
    }
    time::positive(text).map(Life::For).map_err(|why| format!("{why}; or `never`"))
}

pub async fn run(global: &Global, args: Args) -> Outcome {
    let ttl_ms = match args.life {
        Life::For(life) => time::millis(life),
        Life::Ever => 0,
    };
    let request = SetTtlRequest { vm: args.vm.clone(), ttl_ms };
    let api = global.api().await?;
    // Again from a moment later: no harm.
    let vm = retrying(&format!("VM {}: setting its time to live", args.vm), || {
        let (mut client, request) = (api.vms(), request.clone());
        async move { client.set_ttl(request).await }
    })
    .await?;
    global.show_vm(&vm)?;
    Ok(0)
}
