//! Frames between a caller and a process in a guest (`proto/clawpot/v1/exec.proto` tells the rules).

use bytes::Bytes;
use clawpot_types::{ExecId, Millis};

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ExecInput {
    Start(ExecStart),
    Attach(ExecAttach),
    Stdin {
        offset: u64,
        data: Bytes,
    },
    StdinEnd {
        offset: u64,
    },
    Ack {
        stdout: u64,
        stderr: u64,
    },
    Resize(TerminalSize),
    Signal(i32),
    /// The caller goes for good: the process tree is killed.
    Hangup,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExecStart {
    pub id: ExecId,
    pub argv: Vec<Bytes>,
    pub env: Vec<(Bytes, Bytes)>,
    pub cwd: String,
    pub user: String,
    /// 0: never.
    pub timeout: Millis,
    pub stdin: bool,
    pub tty: Option<TerminalSize>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExecAttach {
    pub id: ExecId,
    pub stdout: u64,
    pub stderr: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TerminalSize {
    pub rows: u16,
    pub columns: u16,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ExecOutput {
    Started { id: ExecId, pid: i32, stdin: u64 },
    Stdout { offset: u64, data: Bytes },
    Stderr { offset: u64, data: Bytes },
    Lost { stream: Stream, from: u64, to: u64 },
    StdinAck { offset: u64 },
    Exited(ExecExited),
    Failed { reason: ExecFailedReason, message: String },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    Stdout,
    Stderr,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExecExited {
    pub end: ExecEnd,
    pub timed_out: bool,
    /// On the guest's monotonic clock.
    pub spawn_to_exit_us: u64,
    pub stdout_bytes: u64,
    pub stderr_bytes: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExecEnd {
    Code(i32),
    Signal(i32),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExecFailedReason {
    NotFound,
    NotExecutable,
    TooLong,
    BadCwd,
    BadUser,
    Resources,
    UnknownExec,
    BadRequest,
}
