//! `clawpot-unpack program PROGRAM ARGS…`: becomes a program that works on one open file whose content nobody trusts, `e2fsck` on
//! a volume that a guest wrote. See [`super::sandbox::confine`] for what it cannot do.

use std::os::fd::RawFd;
use std::process::ExitCode;

use super::{become_program, sandbox};

/// The word that asks for this.
pub const VERB: &str = "program";
/// Where the program finds its file, open to read and write, also by name.
pub const FILE: RawFd = 3;
pub const FILE_NAME: &str = "/proc/self/fd/3";
/// Whom it becomes, below the first slot's user and below the probe's: nobody's. The file is this user's while it runs.
pub const USER: u32 = 1_899_999_998;

/// Comes back only with a failure.
#[must_use]
pub fn run(arguments: &[String]) -> ExitCode {
    let error = match sandbox::confine(USER, FILE) {
        Ok(()) => {
            let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
            become_program(&arguments, &["LC_ALL=C".to_owned()])
        }
        Err(error) => error,
    };
    eprintln!("clawpot-unpack: {}", error.chain());
    // As of no program of e2fsprogs.
    ExitCode::from(125)
}
