//! How an exec ended, and the exit code that says it. The codes are those of shells, of `timeout` and of Docker.

use clawpot_common::v1::exec_exited::End as Exit;
use clawpot_common::v1::exec_failed::Reason;
use clawpot_common::v1::{ExecExited, ExecFailed};

use crate::failure::Failure;
use crate::output;

/// `run` or `exec` itself failed.
pub const OWN_FAILURE: u8 = 125;
const TIMED_OUT: u8 = 124;
const NOT_EXECUTABLE: u8 = 126;
const NOT_FOUND: u8 = 127;
const SIGNALLED: u8 = 128;

#[derive(Debug)]
pub enum End {
    Exited(ExecExited),
    /// It never ran.
    Failed {
        program: String,
        failed: ExecFailed,
    },
    /// We left it, because of this signal or as if.
    Left {
        signal: i32,
    },
}

impl End {
    pub fn exit_code(self) -> Result<u8, Failure> {
        match self {
            Self::Exited(exited) if exited.timed_out => {
                output::note("the command was killed: its --timeout is over");
                Ok(TIMED_OUT)
            }
            Self::Exited(exited) => Ok(match exited.end {
                // A code that no Linux process can have is a failure all the same.
                Some(Exit::Code(code)) => u8::try_from(code).unwrap_or(u8::MAX),
                Some(Exit::Signal(number)) => of_signal(number),
                None => OWN_FAILURE,
            }),
            Self::Failed { program, failed } => Err(failure(&program, &failed)),
            Self::Left { signal } => Ok(of_signal(signal)),
        }
    }
}

/// As shells tell of it.
pub fn of_signal(number: i32) -> u8 {
    u8::try_from(number).ok().and_then(|number| SIGNALLED.checked_add(number)).unwrap_or(u8::MAX)
}

fn failure(program: &str, failed: &ExecFailed) -> Failure {
    let (code, why, hint) = match failed.reason() {
        Reason::NotFound => (NOT_FOUND, "not found", Some("is it installed in the image, and in the PATH there?")),
        Reason::NotExecutable => (NOT_EXECUTABLE, "cannot be executed", None),
        Reason::TooLong => (
            NOT_EXECUTABLE,
            "its arguments and environment are too long",
            Some("Linux takes 128 KiB in one argument and about 2 MiB in all: pass more through standard input"),
        ),
        Reason::BadCwd => (NOT_EXECUTABLE, "its working directory cannot be used", Some("see --workdir")),
        Reason::BadUser => (OWN_FAILURE, "its user is unknown", Some("see --user")),
        Reason::Resources => (OWN_FAILURE, "the guest has no room for it", None),
        Reason::UnknownExec => (
            OWN_FAILURE,
            "the guest no longer knows it",
            Some("the VM was restarted meanwhile, or the command ended long ago: its exit code is lost"),
        ),
        Reason::BadRequest | Reason::Unspecified => (OWN_FAILURE, "the guest refused it", None),
    };
    let failure = Failure::new(format!("{program}: {why}")).code(code);
    let failure = if failed.message.is_empty() { failure } else { failure.because(failed.message.clone()) };
    match hint {
        Some(hint) => failure.hint(hint),
        None => failure,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn code(end: Exit) -> u8 {
        End::Exited(ExecExited { end: Some(end), ..Default::default() }).exit_code().unwrap()
    }

    #[test]
    fn the_exit_code_inside_is_the_exit_code_outside() {
        assert_eq!([code(Exit::Code(0)), code(Exit::Code(7)), code(Exit::Code(255))], [0, 7, 255]);
        assert_eq!([code(Exit::Signal(9)), code(Exit::Signal(15))], [137, 143]);
        assert_eq!(
            [code(Exit::Code(256)), code(Exit::Code(-1)), code(Exit::Signal(200)), code(Exit::Signal(-9))],
            [255; 4]
        );
        assert_eq!(End::Left { signal: 2 }.exit_code().unwrap(), 130);
    }

    #[test]
    fn what_never_ran_says_why() {
        let codes: Vec<u8> =
            (0..=8).map(|reason| failure("x", &ExecFailed { reason, message: String::new() }).exit_code()).collect();
        assert_eq!(codes, [125, 127, 126, 126, 126, 125, 125, 125, 125]);
    }
}
