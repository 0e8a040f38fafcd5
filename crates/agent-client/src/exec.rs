//! Exec frames as messages. What comes from the guest is checked: sizes, and that offsets neither jump nor run back.

use bytes::Bytes;
use clawpot_common::{EXEC_CHUNK, v1};
use clawpot_core::exec::{ExecAttach, ExecEnd, ExecExited, ExecFailedReason, ExecInput, ExecOutput, ExecStart, Stream};
use clawpot_core::ports::BoxStream;
use clawpot_types::{Error, Kind, Result};
use futures_core::Stream as FrameStream;
use futures_util::StreamExt as _;
use tonic::Streaming;

use crate::client::{clean, told};

/// Where each output stream stands: what the host has, as far as this attachment knows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offsets {
    pub stdout: u64,
    pub stderr: u64,
}

/// The caller's frames on the wire, and what [`incoming`] needs: from where output is expected, told by the first of them.
///
/// They end with the caller's, or when nobody holds the output any more: an input that stays open keeps its HTTP/2 stream,
/// that its connection, and that the guest's network namespace.
pub fn outgoing(input: BoxStream<ExecInput>) -> (impl FrameStream<Item = v1::ExecInput> + Send + 'static, Attachment) {
    let (tell, expected) = tokio::sync::watch::channel(Offsets::default());
    let (held, dropped) = tokio::sync::oneshot::channel();
    let frames = input.map(move |input| {
        if let ExecInput::Attach(attach) = &input {
            tell.send_replace(Offsets { stdout: attach.stdout, stderr: attach.stderr });
        }
        v1::ExecInput { frame: Some(frame(input)) }
    });
    (frames.take_until(dropped), Attachment { expected, held })
}

/// What the output of an exec has to do with its input.
#[derive(Debug)]
pub struct Attachment {
    expected: tokio::sync::watch::Receiver<Offsets>,
    /// Never sent on: the input ends when it is dropped.
    held: tokio::sync::oneshot::Sender<()>,
}

/// The guest's frames. Ends after the last one of an exec, with an error at the first that breaks the rules.
pub fn incoming(frames: Streaming<v1::ExecOutput>, attachment: Attachment) -> BoxStream<Result<ExecOutput>> {
    let Attachment { expected, held } = attachment;
    let state = Some((frames, expected, None));
    let mut checked = Box::pin(futures_util::stream::unfold(state, |state| async move {
        let (mut frames, expected, offsets) = state?;
        let checked = match frames.message().await {
            Ok(Some(message)) => {
                // Known by now: the guest answers nothing before the first frame.
                let offsets = offsets.unwrap_or_else(|| *expected.borrow());
                output(message, offsets)
            }
            Ok(None) => return None,
            Err(status) => Err(told("in an exec", &status)),
        };
        match checked {
            Ok((output, _)) if matches!(output, ExecOutput::Exited(_) | ExecOutput::Failed { .. }) => {
                Some((Ok(output), None))
            }
            Ok((output, offsets)) => Some((Ok(output), Some((frames, expected, Some(offsets))))),
            Err(error) => Some((Err(error), None)),
        }
    }));
    Box::pin(futures_util::stream::poll_fn(move |cx| {
        // Held as long as this stream, also after its last frame: the caller may still acknowledge that.
        let _held = &held;
        checked.poll_next_unpin(cx)
    }))
}

fn frame(input: ExecInput) -> v1::exec_input::Frame {
    use v1::exec_input::Frame;
    match input {
        ExecInput::Start(start) => Frame::Start(start_message(start)),
        ExecInput::Attach(ExecAttach { id, stdout, stderr }) => Frame::Attach(v1::ExecAttach {
            vm: String::new(),
            exec_id: id.into(),
            stdout_offset: stdout,
            stderr_offset: stderr,
        }),
        ExecInput::Stdin { offset, data } => Frame::Stdin(v1::ExecData { offset, data }),
        ExecInput::StdinEnd { offset } => Frame::StdinEnd(v1::ExecStdinEnd { offset }),
        ExecInput::Ack { stdout, stderr } => Frame::Ack(v1::ExecAck { stdout_offset: stdout, stderr_offset: stderr }),
        ExecInput::Resize(size) => {
            Frame::Resize(v1::TerminalSize { rows: size.rows.into(), columns: size.columns.into() })
        }
        ExecInput::Signal(number) => Frame::Signal(v1::ExecSignal { number }),
        ExecInput::Hangup => Frame::Hangup(v1::ExecHangup {}),
    }
}

fn start_message(start: ExecStart) -> v1::ExecStart {
    v1::ExecStart {
        vm: String::new(),
        exec_id: start.id.into(),
        argv: start.argv,
        env: start.env.into_iter().map(|(name, value)| v1::EnvVar { name, value }).collect(),
        cwd: start.cwd,
        user: start.user,
        timeout_ms: start.timeout.0,
        stdin: start.stdin,
        tty: start.tty.is_some(),
        size: start.tty.map(|size| v1::TerminalSize { rows: size.rows.into(), columns: size.columns.into() }),
    }
}

/// One frame, checked against where its stream stands. `Corrupt`: it breaks the protocol, and is the last that is read.
pub fn output(message: v1::ExecOutput, mut at: Offsets) -> Result<(ExecOutput, Offsets)> {
    use v1::exec_output::Frame;
    let frame = message.frame.ok_or_else(|| broken("an unknown frame"))?;
    let output = match frame {
        Frame::Started(started) => {
            let id = started.exec_id.parse().map_err(|_| broken("an exec id that is none"))?;
            ExecOutput::Started { id, pid: started.pid, stdin: started.stdin_offset }
        }
        Frame::Stdout(data) => {
            let (offset, data) = advance(&mut at.stdout, data)?;
            ExecOutput::Stdout { offset, data }
        }
        Frame::Stderr(data) => {
            let (offset, data) = advance(&mut at.stderr, data)?;
            ExecOutput::Stderr { offset, data }
        }
        Frame::Lost(lost) => lost_frame(&lost, &mut at)?,
        Frame::StdinAck(ack) => ExecOutput::StdinAck { offset: ack.offset },
        Frame::Exited(exited) => ExecOutput::Exited(exited_frame(&exited)?),
        Frame::Failed(failed) => {
            ExecOutput::Failed { reason: reason(failed.reason())?, message: clean(&failed.message) }
        }
    };
    Ok((output, at))
}

fn advance(at: &mut u64, data: v1::ExecData) -> Result<(u64, Bytes)> {
    let length = u64::try_from(data.data.len()).unwrap_or(u64::MAX);
    if data.data.len() > EXEC_CHUNK * 2 {
        return Err(broken("a frame of over 128 KiB"));
    }
    if data.offset != *at {
        return Err(broken(&format!("output at offset {} where {at} was due", data.offset)));
    }
    *at = at.checked_add(length).ok_or_else(|| broken("offsets beyond 64 bits"))?;
    Ok((data.offset, data.data))
}

fn lost_frame(lost: &v1::ExecLost, at: &mut Offsets) -> Result<ExecOutput> {
    let (stream, at) = match lost.stream() {
        v1::exec_lost::Stream::Stdout => (Stream::Stdout, &mut at.stdout),
        v1::exec_lost::Stream::Stderr => (Stream::Stderr, &mut at.stderr),
        v1::exec_lost::Stream::Unspecified => return Err(broken("a loss in no stream")),
    };
    if lost.from != *at || lost.to < lost.from {
        return Err(broken("a loss that does not begin where its stream stands"));
    }
    *at = lost.to;
    Ok(ExecOutput::Lost { stream, from: lost.from, to: lost.to })
}

fn exited_frame(exited: &v1::ExecExited) -> Result<ExecExited> {
    use v1::exec_exited::End;
    let end = match exited.end {
        Some(End::Code(code)) => ExecEnd::Code(code),
        Some(End::Signal(signal)) => ExecEnd::Signal(signal),
        None => return Err(broken("an end that is none")),
    };
    Ok(ExecExited {
        end,
        timed_out: exited.timed_out,
        spawn_to_exit_us: exited.spawn_to_exit_us,
        stdout_bytes: exited.stdout_bytes,
        stderr_bytes: exited.stderr_bytes,
    })
}

fn reason(reason: v1::exec_failed::Reason) -> Result<ExecFailedReason> {
    use v1::exec_failed::Reason;
    Ok(match reason {
        Reason::NotFound => ExecFailedReason::NotFound,
        Reason::NotExecutable => ExecFailedReason::NotExecutable,
        Reason::TooLong => ExecFailedReason::TooLong,
        Reason::BadCwd => ExecFailedReason::BadCwd,
        Reason::BadUser => ExecFailedReason::BadUser,
        Reason::Resources => ExecFailedReason::Resources,
        Reason::UnknownExec => ExecFailedReason::UnknownExec,
        Reason::BadRequest => ExecFailedReason::BadRequest,
        Reason::Unspecified => return Err(broken("a failure without a reason")),
    })
}

fn broken(what: &str) -> Error {
    Error::new(Kind::Corrupt, format!("guest agent: it broke the exec protocol: {what}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use v1::exec_output::Frame;

    fn told(frame: Frame, stdout: u64) -> Result<u64, String> {
        let at = Offsets { stdout, stderr: 0 };
        output(v1::ExecOutput { frame: Some(frame) }, at).map(|(_, at)| at.stdout).map_err(|error| error.chain())
    }

    fn data(offset: u64, length: usize) -> Frame {
        Frame::Stdout(v1::ExecData { offset, data: vec![b'x'; length].into() })
    }

    #[test]
    fn offsets_neither_jump_nor_run_back() {
        assert_eq!(told(data(7, 3), 7), Ok(10));
        for (frame, at) in
            [(data(8, 1), 7), (data(6, 1), 7), (data(u64::MAX, 1), u64::MAX), (data(0, EXEC_CHUNK * 2 + 1), 0)]
        {
            assert!(told(frame, at).unwrap_err().contains("broke the exec protocol"));
        }
    }

    #[test]
    fn a_loss_moves_its_stream_forward_only() {
        let lost = |from, to| Frame::Lost(v1::ExecLost { stream: v1::exec_lost::Stream::Stdout.into(), from, to });
        assert_eq!(told(lost(5, 9), 5), Ok(9));
        assert!(told(lost(5, 4), 5).is_err());
        assert!(told(lost(6, 9), 5).is_err());
    }

    #[test]
    fn frames_without_meaning_are_errors() {
        assert!(output(v1::ExecOutput { frame: None }, Offsets::default()).is_err());
        assert!(told(Frame::Exited(v1::ExecExited::default()), 0).is_err());
        assert!(told(Frame::Failed(v1::ExecFailed::default()), 0).is_err());
    }
}
