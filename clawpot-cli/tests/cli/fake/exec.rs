//! An attachment to a program of the guest.

use std::sync::Arc;

use clawpot_common::EXEC_CHUNK;
use clawpot_common::v1::exec_failed::Reason;
use clawpot_common::v1::exec_input::Frame as In;
use clawpot_common::v1::exec_output::Frame as Out;
use clawpot_common::v1::{
    ExecData, ExecFailed, ExecInput, ExecLost, ExecOutput, ExecStarted, ExecStdinAck, Phase, exec_lost,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Response, Status, Streaming};

use super::State;
use super::guest::{Exec, Inner};
use super::vms::{Answer, Frames};

type Sender = mpsc::Sender<Result<ExecOutput, Status>>;

pub async fn attach(state: Arc<State>, mut input: Streaming<ExecInput>) -> Answer<Frames<ExecOutput>> {
    let first = input.message().await?.and_then(|frame| frame.frame);
    let (tx, rx) = mpsc::channel(4);
    let (exec, reached) = match first {
        Some(In::Start(start)) => {
            let mut changed = state.watch();
            while state.find(&start.vm)?.phase() != Phase::Running {
                changed.changed().await.map_err(|_| Status::unavailable("down"))?;
            }
            (state.guest.start(start), (0, 0))
        }
        Some(In::Attach(attach)) => {
            state.find(&attach.vm)?;
            let unknown = ExecFailed { reason: Reason::UnknownExec.into(), message: String::new() };
            (state.guest.find(&attach.exec_id).ok_or(unknown), (attach.stdout_offset, attach.stderr_offset))
        }
        other => return Err(Status::invalid_argument(format!("first frame {other:?}"))),
    };
    match exec {
        Ok(exec) => {
            // What was accepted but not taken is forgotten by this guest: it must come again.
            let taken = exec.with_no_change(|inner| {
                inner.stdin.clear();
                inner.stdin_taken
            });
            tokio::spawn(receive(exec.clone(), input));
            tokio::spawn(send(exec, Cursor { stdout: reached.0, stderr: reached.1, stdin: taken }, tx));
        }
        Err(failed) => tx.send(frame(Out::Failed(failed))).await.unwrap(),
    }
    Ok(Response::new(Box::pin(ReceiverStream::new(rx))))
}

fn frame(frame: Out) -> Result<ExecOutput, Status> {
    Ok(ExecOutput { frame: Some(frame) })
}

async fn receive(exec: Arc<Exec>, mut input: Streaming<ExecInput>) {
    while let Ok(Some(frame)) = input.message().await {
        exec.with(|inner| take(inner, frame.frame.unwrap()));
    }
}

fn take(inner: &mut Inner, frame: In) {
    match frame {
        In::Stdin(data) => {
            // What was sent before is skipped, what is missing is a defect of the program under test.
            let have = inner.stdin_taken + u64::try_from(inner.stdin.len()).unwrap();
            assert!(data.offset <= have, "stdin from {} where {have} were due", data.offset);
            let known = usize::try_from(have - data.offset).unwrap().min(data.data.len());
            inner.stdin.extend(&data.data[known..]);
        }
        In::StdinEnd(end) => {
            assert_eq!(end.offset, inner.stdin_taken + u64::try_from(inner.stdin.len()).unwrap());
            inner.stdin_ended = true;
        }
        In::Ack(ack) => {
            inner.stdout.forget_below(ack.stdout_offset);
            inner.stderr.forget_below(ack.stderr_offset);
        }
        In::Resize(size) => inner.sizes.push(size),
        In::Signal(signal) => inner.signals.push(signal.number),
        In::Hangup(_) => inner.hung_up = true,
        In::Start(_) | In::Attach(_) => panic!("start or attach later than first"),
    }
}

/// Where an attachment is.
struct Cursor {
    stdout: u64,
    stderr: u64,
    stdin: u64,
}

async fn send(exec: Arc<Exec>, mut at: Cursor, tx: Sender) {
    let mut changed = exec.changed.subscribe();
    let exec_id = exec.with_no_change(|inner| inner.start.exec_id.clone());
    let started = ExecStarted { exec_id, pid: 42, stdin_offset: at.stdin };
    if tx.send(frame(Out::Started(started))).await.is_err() {
        return;
    }
    loop {
        changed.borrow_and_update();
        while let Some(next) = exec.with_no_change(|inner| next(inner, &mut at)) {
            let last = matches!(next, Out::Exited(_));
            if tx.send(frame(next)).await.is_err() || last {
                return;
            }
        }
        if changed.changed().await.is_err() {
            return;
        }
    }
}

fn next(inner: &Inner, at: &mut Cursor) -> Option<Out> {
    if inner.stdin_taken > at.stdin {
        at.stdin = inner.stdin_taken;
        return Some(Out::StdinAck(ExecStdinAck { offset: at.stdin }));
    }
    for (ring, cursor, stream) in [
        (&inner.stdout, &mut at.stdout, exec_lost::Stream::Stdout),
        (&inner.stderr, &mut at.stderr, exec_lost::Stream::Stderr),
    ] {
        if ring.base > *cursor {
            let from = std::mem::replace(cursor, ring.base);
            return Some(Out::Lost(ExecLost { stream: stream.into(), from, to: ring.base }));
        }
        if ring.end() > *cursor {
            let data = ring.from(*cursor, EXEC_CHUNK);
            let offset = *cursor;
            *cursor += u64::try_from(data.len()).unwrap();
            let data = ExecData { offset, data };
            return Some(if stream == exec_lost::Stream::Stdout { Out::Stdout(data) } else { Out::Stderr(data) });
        }
    }
    inner.exited().map(Out::Exited)
}

impl Exec {
    fn with_no_change<T>(&self, act: impl FnOnce(&mut Inner) -> T) -> T {
        act(&mut self.inner.lock().unwrap())
    }
}
