//! Exec frames. Every length that a client sends is bounded here.

use bytes::Bytes;
use clawpot_common::v1;
use clawpot_core::exec::{
    ExecAttach, ExecEnd, ExecExited, ExecFailedReason, ExecInput, ExecOutput, ExecStart, Stream, TerminalSize,
};
use clawpot_core::ports::BoxStream;
use clawpot_types::{Error, ExecId, Kind, Millis, Result};
use futures_util::StreamExt as _;
use tokio::sync::oneshot;
use tonic::{Status, Streaming};

use super::status::status;
use crate::limits;

/// Which VM, and its first frame.
pub struct Opening {
    pub vm: String,
    pub first: ExecInput,
}

pub fn opening(frame: Option<v1::ExecInput>) -> Result<Opening> {
    use v1::exec_input::Frame;
    match frame.and_then(|frame| frame.frame) {
        Some(Frame::Start(start)) => {
            let vm = start.vm.clone();
            Ok(Opening { vm, first: ExecInput::Start(start_of(start)?) })
        }
        Some(Frame::Attach(attach)) => {
            let first = ExecAttach {
                id: exec_id("attach", &attach.exec_id)?,
                stdout: attach.stdout_offset,
                stderr: attach.stderr_offset,
            };
            Ok(Opening { vm: attach.vm, first: ExecInput::Attach(first) })
        }
        _ => Err(bad("the first frame must be start or attach")),
    }
}

/// Why the client's frames are no longer taken.
pub type Refusal = oneshot::Receiver<Status>;

/// The frames after the first. Only a client that closes its side in order ends them: after a lost connection, or a frame
/// that is none, nothing comes any more, so that the guest sees the attachment break off and not its input end well.
pub fn rest(frames: Streaming<v1::ExecInput>) -> (BoxStream<ExecInput>, Refusal) {
    let (refuse, refusal) = oneshot::channel();
    let frames = futures_util::stream::unfold((frames, refuse), |(mut frames, refuse)| async move {
        match frames.message().await {
            Ok(None) => None,
            Ok(Some(frame)) => match input(frame) {
                Ok(input) => Some((input, (frames, refuse))),
                Err(error) => {
                    // Without a receiver the client is gone already.
                    refuse.send(status(error)).unwrap_or_default();
                    std::future::pending().await
                }
            },
            // Too large, or no message at all. Where the client is gone, nobody hears it.
            Err(broken) => {
                refuse.send(broken).unwrap_or_default();
                std::future::pending().await
            }
        }
    });
    (Box::pin(frames), refusal)
}

/// The guest's frames, until one of the client's is refused.
pub fn answers(output: BoxStream<Result<ExecOutput>>, refusal: Refusal) -> BoxStream<Result<v1::ExecOutput, Status>> {
    // A sender that is gone refused nothing.
    let refused = async move {
        match refusal.await {
            Ok(refused) => Err(refused),
            Err(_) => std::future::pending().await,
        }
    };
    let refused = futures_util::stream::once(Box::pin(refused));
    let frames = output.map(self::output).map(Some).chain(futures_util::stream::once(async { None }));
    let both = futures_util::stream::select(frames, refused.map(Some));
    // Ends with the guest's frames, or after the first error.
    let ended = both.scan(false, |failed, frame| {
        let next = if *failed { None } else { frame };
        *failed = matches!(next, Some(Err(_)));
        async move { next }
    });
    Box::pin(ended)
}

fn start_of(start: v1::ExecStart) -> Result<ExecStart> {
    if start.argv.is_empty() || start.argv[0].is_empty() {
        return Err(bad("start.argv: a program is needed"));
    }
    if start.argv.len() > limits::WORDS || start.env.len() > limits::WORDS {
        return Err(bad(&format!(
            "start: {} arguments, {} variables: at most {} of each",
            start.argv.len(),
            start.env.len(),
            limits::WORDS
        )));
    }
    if start.cwd.len() > limits::CWD || start.user.len() > limits::USER {
        let (cwd, user) = (start.cwd.len(), start.user.len());
        let (most, user_most) = (limits::CWD, limits::USER);
        return Err(bad(&format!("start: cwd of {cwd} bytes, user of {user}: at most {most} and {user_most}")));
    }
    if start.cwd.contains('\0') || start.user.contains('\0') {
        return Err(bad("start: neither cwd nor user may contain a NUL byte"));
    }
    if start.argv.iter().any(|arg| arg.contains(&0)) {
        return Err(bad("start.argv: an argument contains a NUL byte"));
    }
    let mut env = Vec::with_capacity(start.env.len());
    for var in start.env {
        if var.name.is_empty() || var.name.iter().any(|byte| matches!(byte, b'=' | 0)) || var.value.contains(&0) {
            return Err(bad("start.env: a name must not be empty nor contain '='; neither part a NUL"));
        }
        env.push((var.name, var.value));
    }
    let tty = match start.tty {
        true => Some(size(start.size.unwrap_or(v1::TerminalSize { rows: 24, columns: 80 }))?),
        false => None,
    };
    Ok(ExecStart {
        id: exec_id("start", &start.exec_id)?,
        argv: start.argv,
        env,
        cwd: start.cwd,
        user: start.user,
        timeout: Millis(start.timeout_ms),
        stdin: start.stdin,
        tty,
    })
}

fn exec_id(of: &str, id: &str) -> Result<ExecId> {
    id.parse().map_err(|error: Error| bad(&format!("{of}.exec_id: {}", error.chain())))
}

fn input(frame: v1::ExecInput) -> Result<ExecInput> {
    use v1::exec_input::Frame;
    Ok(match frame.frame.ok_or_else(|| bad("an empty frame"))? {
        Frame::Start(_) | Frame::Attach(_) => return Err(bad("only the first frame may be start or attach")),
        Frame::Stdin(data) if data.data.len() > limits::STDIN => return Err(bad("stdin: a frame of over 128 KiB")),
        Frame::Stdin(data) => ExecInput::Stdin { offset: data.offset, data: data.data },
        Frame::StdinEnd(end) => ExecInput::StdinEnd { offset: end.offset },
        Frame::Ack(ack) => ExecInput::Ack { stdout: ack.stdout_offset, stderr: ack.stderr_offset },
        Frame::Resize(to) => ExecInput::Resize(size(to)?),
        Frame::Signal(signal) if !(1..=64).contains(&signal.number) => return Err(bad("signal: must be 1 to 64")),
        Frame::Signal(signal) => ExecInput::Signal(signal.number),
        Frame::Hangup(_) => ExecInput::Hangup,
    })
}

fn size(size: v1::TerminalSize) -> Result<TerminalSize> {
    let cells = |value: u32| u16::try_from(value).map_err(|_| bad("a terminal has at most 65,535 rows and columns"));
    Ok(TerminalSize { rows: cells(size.rows)?, columns: cells(size.columns)? })
}

pub fn output(output: Result<ExecOutput>) -> Result<v1::ExecOutput, Status> {
    use v1::exec_output::Frame;
    let data = |offset: u64, data: Bytes| v1::ExecData { offset, data };
    let frame = match output.map_err(status)? {
        ExecOutput::Started { id, pid, stdin } => {
            Frame::Started(v1::ExecStarted { exec_id: id.to_string(), pid, stdin_offset: stdin })
        }
        ExecOutput::Stdout { offset, data: bytes } => Frame::Stdout(data(offset, bytes)),
        ExecOutput::Stderr { offset, data: bytes } => Frame::Stderr(data(offset, bytes)),
        ExecOutput::Lost { stream, from, to } => {
            let stream = match stream {
                Stream::Stdout => v1::exec_lost::Stream::Stdout,
                Stream::Stderr => v1::exec_lost::Stream::Stderr,
            };
            Frame::Lost(v1::ExecLost { stream: stream.into(), from, to })
        }
        ExecOutput::StdinAck { offset } => Frame::StdinAck(v1::ExecStdinAck { offset }),
        ExecOutput::Exited(exited) => Frame::Exited(exited_of(&exited)),
        ExecOutput::Failed { reason: why, message } => {
            Frame::Failed(v1::ExecFailed { reason: reason(why).into(), message })
        }
    };
    Ok(v1::ExecOutput { frame: Some(frame) })
}

fn exited_of(exited: &ExecExited) -> v1::ExecExited {
    use v1::exec_exited::End;
    v1::ExecExited {
        end: Some(match exited.end {
            ExecEnd::Code(code) => End::Code(code),
            ExecEnd::Signal(signal) => End::Signal(signal),
        }),
        timed_out: exited.timed_out,
        spawn_to_exit_us: exited.spawn_to_exit_us,
        stdout_bytes: exited.stdout_bytes,
        stderr_bytes: exited.stderr_bytes,
    }
}

const fn reason(reason: ExecFailedReason) -> v1::exec_failed::Reason {
    use v1::exec_failed::Reason;
    match reason {
        ExecFailedReason::NotFound => Reason::NotFound,
        ExecFailedReason::NotExecutable => Reason::NotExecutable,
        ExecFailedReason::TooLong => Reason::TooLong,
        ExecFailedReason::BadCwd => Reason::BadCwd,
        ExecFailedReason::BadUser => Reason::BadUser,
        ExecFailedReason::Resources => Reason::Resources,
        ExecFailedReason::UnknownExec => Reason::UnknownExec,
        ExecFailedReason::BadRequest => Reason::BadRequest,
    }
}

fn bad(what: &str) -> Error {
    Error::new(Kind::InvalidArgument, format!("exec: {what}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(change: impl FnOnce(&mut v1::ExecStart)) -> String {
        let mut start =
            v1::ExecStart { exec_id: "a".repeat(16), argv: vec!["true".into()], ..v1::ExecStart::default() };
        change(&mut start);
        let frame = v1::ExecInput { frame: Some(v1::exec_input::Frame::Start(start)) };
        opening(Some(frame)).map_or_else(|error| error.chain(), |_| "accepted".to_owned())
    }

    #[test]
    fn every_bad_frame_is_told() {
        use v1::exec_input::Frame;
        let var = v1::EnvVar { name: "A".into(), value: "b".into() };
        let frame =
            |frame| input(v1::ExecInput { frame: Some(frame) }).map_or_else(|e| e.chain(), |_| "accepted".into());
        let cases: Vec<(&str, String)> = vec![
            ("nothing", refused(|_| {})),
            ("no program", refused(|start| start.argv.clear())),
            ("an empty program", refused(|start| start.argv = vec![Bytes::new()])),
            ("65,537 arguments", refused(|start| start.argv = vec!["a".into(); limits::WORDS + 1])),
            ("65,537 variables", refused(|start| start.env = vec![var.clone(); limits::WORDS + 1])),
            ("an argument with a NUL", refused(|start| start.argv.push(Bytes::from_static(b"a\0b")))),
            ("a variable without a name", refused(|start| start.env.push(v1::EnvVar::default()))),
            ("a cwd of 4097", refused(|start| start.cwd = "/".repeat(4097))),
            ("a cwd with a NUL", refused(|start| start.cwd = "\0".into())),
            ("a user of 513", refused(|start| start.user = "u".repeat(513))),
            ("an id of 17", refused(|start| start.exec_id = "a".repeat(17))),
            (
                "a terminal of 65,536 rows",
                refused(|start| {
                    start.tty = true;
                    start.size = Some(v1::TerminalSize { rows: 65_536, columns: 80 });
                }),
            ),
            ("stdin of 128 KiB", frame(Frame::Stdin(v1::ExecData { offset: 0, data: vec![0; limits::STDIN].into() }))),
            ("a byte more", frame(Frame::Stdin(v1::ExecData { offset: 0, data: vec![0; limits::STDIN + 1].into() }))),
            ("signal 65", frame(Frame::Signal(v1::ExecSignal { number: 65 }))),
            ("a second start", frame(Frame::Start(v1::ExecStart::default()))),
        ];
        let told: Vec<String> = cases.iter().map(|(case, told)| format!("{case:26} {told}")).collect();
        insta::assert_snapshot!(told.join("\n"));
        assert!(opening(None).is_err(), "an empty stream");
    }
}
