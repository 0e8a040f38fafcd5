//! The daemon.
//!
//! - [`config`] settings · [`app`] the composition root: the only place that names a driver · [`api`] the doors
//! - [`vmms`] Firecracker or QEMU · [`resolver`] kept alive · [`room`] what the host has · [`serve`] what listens, and how it ends
//! - [`socket`] Unix sockets · [`entrance`] connections · [`limits`] what clients may send and hold · [`shares`] who holds how much
//! - [`metrics`] · [`chance`] clock and randomness

mod api;
mod app;
mod chance;
mod config;
mod entrance;
mod limits;
mod metrics;
mod resolver;
mod room;
mod serve;
mod shares;
mod socket;
mod vmms;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{CommandFactory as _, Parser, Subcommand};
use clawpot_types::{Error, Result};
use tracing_subscriber::EnvFilter;

/// Runs microVMs and answers the API of `clawpot`.
#[derive(Debug, Parser)]
#[command(name = "clawpot-server", version)]
struct Cli {
    /// Settings: a TOML file with the names of these options, as memory_percent = 120; options and environment win
    /// [default: /etc/clawpot/server.toml, where it exists]
    #[arg(long, global = true, env = "CLAWPOT_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(flatten)]
    options: config::Options,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the server (what happens without a subcommand, too)
    Serve,
    /// Write this program's manual page to standard output
    #[command(hide = true)]
    Man,
    /// Copy records and events of the state directory to FILE, while a server runs or not
    Backup { file: PathBuf },
    /// Take away what stays on this host for VMs that are stopped: the resolver, addresses, rules and prepared network slots.
    /// Records, disks and images stay, and the next server makes the rest anew. Refused while a server or a VM runs
    ClearHost,
    /// Name every point at which a test can let the server die
    #[cfg(feature = "failpoints")]
    Failpoints,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            print(&error);
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> Result<()> {
    if matches!(cli.command, Some(Command::Man)) {
        return man();
    }
    let config = config::load(cli.config.as_deref(), cli.options)?;
    match cli.command.unwrap_or(Command::Serve) {
        Command::Backup { file } => app::backup(&config, &file),
        #[cfg(feature = "failpoints")]
        Command::Failpoints => {
            clawpot_failpoint::Point::ALL.iter().for_each(|point| println!("{}", point.name()));
            Ok(())
        }
        Command::Man => man(),
        Command::ClearHost => {
            init_logs(config.log_format);
            runtime()?.block_on(app::clear_host(&config))
        }
        Command::Serve => {
            init_logs(config.log_format);
            clawpot_host::process::raise_open_files()?;
            runtime()?.block_on(serve::serve(config))
        }
    }
}

fn runtime() -> Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|error| Error::io("starting the runtime", error))
}

fn man() -> Result<()> {
    // Section 8: programs for administrators.
    let page = clap_mangen::Man::new(Cli::command()).section("8");
    page.render(&mut std::io::stdout().lock()).map_err(|error| Error::io("writing the manual page", error))
}

/// `CLAWPOT_LOG` takes a filter such as `info,clawpot_control=debug`; the default is `info`.
fn init_logs(format: config::LogFormat) {
    let filter = EnvFilter::try_from_env("CLAWPOT_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let logs = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match format {
        config::LogFormat::Json => logs.json().init(),
        config::LogFormat::Text => logs.with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr())).init(),
    }
}

/// The one place where a chain is printed.
fn print(error: &Error) {
    eprintln!("error: {}", error.what());
    let mut cause = std::error::Error::source(error);
    while let Some(next) = cause {
        eprintln!("cause: {next}");
        cause = next.source();
    }
    if let Some(cleanup) = error.cleanup() {
        eprintln!("and cleaning up failed: {}", cleanup.chain());
    }
    if let Some(hint) = error.next_step() {
        eprintln!("hint: {hint}");
    }
}
