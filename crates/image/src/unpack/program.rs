//! `clawpot-unpack program USER PROGRAM ARGS…`: becomes a program that works on one open file whose content nobody trusts, `e2fsck`
//! on a volume that a guest wrote. See [`super::sandbox::confine`] for what it cannot do. The file is USER's while it runs.

use std::os::fd::RawFd;
use std::process::ExitCode;

use clawpot_types::{Error, Kind, Result};

use super::{QUIET, become_program, sandbox};

/// The word that asks for this.
pub const VERB: &str = "program";
/// Where the program finds its file, open to read and write, also by name.
pub const FILE: RawFd = 3;
pub const FILE_NAME: &str = "/proc/self/fd/3";
/// Open as long as the program lives: the lock on its user's number.
pub const OWN: RawFd = 4;

/// Comes back only with a failure.
#[must_use]
pub fn run(arguments: &[String]) -> ExitCode {
    let error = match confined(arguments) {
        Ok(program) => become_program(&program, &QUIET),
        Err(error) => error,
    };
    eprintln!("clawpot-unpack: {}", error.chain());
    // As of no program of e2fsprogs.
    ExitCode::from(125)
}

fn confined(arguments: &[String]) -> Result<Vec<&str>> {
    let usage = || Error::new(Kind::InvalidArgument, format!("{VERB}: a user's number, a program and its arguments"));
    let [user, program @ ..] = arguments else { return Err(usage()) };
    // Root would be confined by nothing.
    let user = user.parse().ok().filter(|user| *user != 0).ok_or_else(usage)?;
    sandbox::confine(user, FILE)?;
    Ok(program.iter().map(String::as_str).collect())
}
