//! `clawpot logs`.

use std::io::IsTerminal as _;

use clawpot_common::v1::GetConsoleRequest;
use tonic::Status;

use super::Outcome;
use crate::api::{Api, Backoff, RECONNECT, is_lost};
use crate::cli::Global;
use crate::failure::Failure;
use crate::output;

mod seam;
use seam::Seam;

/// Show a VM's console: what its kernel, its agent and its VMM said
///
/// It is kept when a boot fails. On a terminal control characters are shown, not obeyed.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Go on with what is written, until Ctrl-C
    #[arg(short, long)]
    follow: bool,
    /// Only the last N lines
    #[arg(short = 'n', long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    tail: Option<u32>,
    /// Name, id, or the beginning of an id
    vm: String,
}

pub async fn run(global: &Global, args: Args) -> Outcome {
    let console = Console { api: global.api().await?, vm: args.vm, terminal: std::io::stdout().is_terminal() };
    let tail_lines = args.tail.unwrap_or_default();
    let mut seam = Seam::default();
    if !args.follow {
        return match console.read(false, tail_lines, &mut seam).await? {
            None => Ok(0),
            Some(status) => Err(console.failure(&status)),
        };
    }
    tokio::select! {
        result = console.follow(tail_lines, seam) => result,
        _ = tokio::signal::ctrl_c() => Ok(0),
    }
}

struct Console {
    api: Api,
    vm: String,
    terminal: bool,
}

impl Console {
    /// Ends when the VM's console does. A lost server is looked for again, and what was shown is not shown again.
    async fn follow(&self, tail_lines: u32, mut seam: Seam) -> Outcome {
        let mut backoff = Backoff::new(RECONNECT);
        let mut lines = tail_lines;
        loop {
            let Some(status) = self.read(true, lines, &mut seam).await? else { return Ok(0) };
            if seam.advanced() {
                backoff = Backoff::new(RECONNECT);
                // All that is kept, to find in it where we were.
                lines = 0;
            }
            match backoff.pause().filter(|_| is_lost(&status)) {
                Some(pause) => tokio::time::sleep(pause).await,
                None => return Err(self.failure(&status)),
            }
            seam.begin();
        }
    }

    /// Shows one stream; the status with which it ended, if not in good order.
    async fn read(&self, follow: bool, tail_lines: u32, seam: &mut Seam) -> Result<Option<Status>, Failure> {
        let request = GetConsoleRequest { vm: self.vm.clone(), follow, tail_lines };
        let mut chunks = match self.api.vms().get_console(request).await {
            Ok(stream) => stream.into_inner(),
            Err(status) => return Ok(Some(status)),
        };
        loop {
            let next = match seam.is_searching() {
                true => tokio::time::timeout(seam::SILENCE, chunks.message()).await,
                false => Ok(chunks.message().await),
            };
            let Ok(message) = next else {
                seam.give_up();
                continue;
            };
            match message {
                Ok(Some(chunk)) => self.show(&seam.fresh(&chunk.data))?,
                Ok(None) => return Ok(None),
                Err(status) => return Ok(Some(status)),
            }
        }
    }

    fn show(&self, data: &[u8]) -> Result<(), Failure> {
        match self.terminal {
            true => output::raw(output::text::printable_bytes(data).as_bytes()),
            false => output::raw(data),
        }
    }

    fn failure(&self, status: &Status) -> Failure {
        Failure::status(&format!("VM {}: reading its console", self.vm), status)
    }
}
