//! Measures a running server from a client's side. Prints one JSON value: samples in microseconds, in the order taken.
//! `tests/integration/bench.py` starts the server, calls this, and makes the table.
//!
//! - [`creates`] create, first output, delete · [`execs`] warm execs · [`raw`] the baseline: connect and one round trip

mod creates;
mod execs;
mod raw;

use std::net::SocketAddrV4;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::{Parser, Subcommand};
use clawpot_common::client;
use clawpot_common::v1::vm_service_client::VmServiceClient;
use tonic::transport::Channel;

/// Whatever went wrong ends the bench; there is nobody to tell but a person.
type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

#[derive(Debug, Parser)]
#[command(about = "Measures a running clawpot-server")]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Create a VM, wait for a command's first output, delete it; one after the other
    Creates {
        #[arg(long)]
        socket: PathBuf,
        #[arg(long, default_value = "debian")]
        image: String,
        #[arg(long, default_value_t = 5)]
        rounds: u32,
    },
    /// `/bin/true` in a VM that runs, over one connection
    Execs {
        #[arg(long)]
        socket: PathBuf,
        #[arg(long)]
        vm: String,
        #[arg(long, default_value_t = 200)]
        rounds: u32,
    },
    /// Connect to a guest's agent and exchange one HTTP/2 ping, from inside the netns
    Raw {
        #[arg(long)]
        address: SocketAddrV4,
        #[arg(long, default_value_t = 200)]
        rounds: u32,
    },
    /// Return as soon as an agent answers there
    Answers {
        #[arg(long)]
        address: SocketAddrV4,
        #[arg(long, default_value_t = 120)]
        within_secs: u64,
    },
}

fn main() -> ExitCode {
    match run(Cli::parse().verb) {
        Ok(value) => {
            println!("{value}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(verb: Verb) -> Outcome<serde_json::Value> {
    match verb {
        Verb::Raw { address, rounds } => Ok(serde_json::to_value(raw::round_trips(address, rounds)?)?),
        Verb::Answers { address, within_secs } => {
            Ok(serde_json::to_value(raw::until_answer(address, Duration::from_secs(within_secs))?)?)
        }
        Verb::Creates { socket, image, rounds } => {
            let measured =
                runtime()?.block_on(async { creates::measure(connect(&socket).await?, &image, rounds).await })?;
            Ok(serde_json::to_value(measured)?)
        }
        Verb::Execs { socket, vm, rounds } => {
            let measured = runtime()?.block_on(async { execs::measure(connect(&socket).await?, &vm, rounds).await })?;
            Ok(serde_json::to_value(measured)?)
        }
    }
}

/// One thread, as in the command line.
fn runtime() -> Outcome<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_current_thread().enable_all().build()?)
}

async fn connect(socket: &std::path::Path) -> Outcome<VmServiceClient<Channel>> {
    Ok(VmServiceClient::new(client::connect(socket).await?))
}

/// Whole microseconds since `begun`.
fn micros(begun: Instant) -> u64 {
    u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX)
}
