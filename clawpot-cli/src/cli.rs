//! Everything that can be typed.

use std::path::PathBuf;

use clap::error::{ContextKind, ContextValue};
use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::commands as c;
use crate::output::color::ColorWhen;

/// Self-hosted computers for AI agents and untrusted code.
///
/// Exit codes: of `run` and `exec` the one of the command inside, 128+n when signal n ended it, 124 when its timeout
/// did, 126 when it could not be executed, 127 when it was not found, 125 when clawpot itself failed. Otherwise 0, or 1
/// when it failed, or 2 when the command line was wrong.
#[derive(Debug, Parser)]
#[command(name = "clawpot", version, arg_required_else_help = true, disable_help_subcommand = true)]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub verb: Verb,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Global options")]
pub struct Global {
    /// Unix socket of the server
    #[arg(long, global = true, env = "CLAWPOT_SOCKET", value_name = "PATH", default_value = "/run/clawpot/api.sock")]
    pub socket: PathBuf,
    /// How results are written: for people, or as JSON with stable fields; errors are text on stderr in both
    #[arg(short, long, global = true, value_enum, value_name = "FORMAT", default_value = "table")]
    pub output: Format,
    /// When to use colours; NO_COLOR is honoured
    #[arg(long, global = true, value_enum, value_name = "WHEN", default_value = "auto")]
    pub color: ColorWhen,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    Table,
    Json,
}

#[derive(Debug, Subcommand)]
pub enum Verb {
    Run(c::run::Args),
    Create(c::create::Args),
    Ls(c::ls::Args),
    Inspect(c::inspect::Args),
    Exec(c::exec::Args),
    Wait(c::wait::Args),
    Stop(c::stop::Args),
    Start(c::start::Args),
    Ttl(c::ttl::Args),
    Rm(c::rm::Args),
    Logs(c::logs::Args),
    Events(c::events::Args),
    Build(c::build::Args),
    Image(c::image::Args),
    Volume(c::volume::Args),
    Host(c::host::Args),
    Doctor(c::doctor::Args),
    Version(c::version::Args),
    Completions(c::completions::Args),
    Man(c::man::Args),
}

/// A value of any length is told in one line. A socket that the environment names was not typed, and is no part of the usage.
#[must_use]
pub fn shortened(mut error: clap::Error) -> clap::Error {
    if let Some(ContextValue::StyledStr(usage)) = error.get(ContextKind::Usage) {
        let usage = usage.to_string().replace(" --socket <PATH>", "");
        error.insert(ContextKind::Usage, ContextValue::StyledStr(usage.into()));
    }
    if let Some(ContextValue::String(value)) = error.get(ContextKind::InvalidValue)
        && value.chars().count() > 60
    {
        let head: String = value.chars().take(40).collect();
        error.insert(ContextKind::InvalidValue, ContextValue::String(format!("{head}…")));
    }
    error
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    #[test]
    fn the_command_line_is_sound() {
        super::Cli::command().debug_assert();
    }
}
