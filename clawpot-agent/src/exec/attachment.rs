//! Both directions of one attachment: frames out as the peer takes them, frames in as they come.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use clawpot_common::EXEC_CHUNK;
use clawpot_common::v1::exec_input::Frame as In;
use clawpot_common::v1::exec_lost::Stream as Which;
use clawpot_common::v1::exec_output::Frame as Out;
use clawpot_common::v1::{ExecData, ExecFailed, ExecInput, ExecOutput, ExecStarted, ExecStdinAck};
use futures_core::Stream;
use futures_util::StreamExt;
use tokio::sync::oneshot;
use tonic::Status;

use super::resource::{Attachment, Exec, State, bad};

/// How long acknowledgements are still taken after the last frame has been handed over.
const LINGER: Duration = Duration::from_secs(10);

/// What the guest sends. Dropped by the transport when that is gone or everything was taken.
#[derive(Debug)]
pub struct Output {
    exec: Arc<Exec>,
    serial: u64,
    done: bool,
    /// Dropped with us: the input side learns that nobody takes output any more.
    _gone: oneshot::Sender<()>,
}

/// Attaches; the input side runs as a task of its own until the caller ends it or the transport is gone.
pub fn attach<S>(exec: &Arc<Exec>, offsets: [u64; 2], input: S) -> Result<Output, ExecFailed>
where
    S: Stream<Item = Result<ExecInput, Status>> + Send + Unpin + 'static,
{
    let serial = exec.attach(offsets)?;
    let (sender, gone) = oneshot::channel();
    tokio::spawn(take_input(exec.clone(), serial, input, gone));
    Ok(Output { exec: exec.clone(), serial, done: false, _gone: sender })
}

impl Stream for Output {
    type Item = Result<ExecOutput, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.done {
            return Poll::Ready(None);
        }
        let frame = {
            let mut state = self.exec.state();
            let frame = next(&mut state, self.serial, &self.exec);
            if frame.is_none()
                && let Some(attachment) = state.current(self.serial)
            {
                attachment.waker = Some(cx.waker().clone());
            }
            frame
        };
        let Some(frame) = frame else { return Poll::Pending };
        self.done = matches!(frame, Err(_) | Ok(Out::Exited(_) | Out::Failed(_)));
        if matches!(frame, Ok(Out::Stdout(_) | Out::Stderr(_))) {
            // Where the caller acknowledges by taking, there is room now.
            self.exec.wake_pumps();
        }
        Poll::Ready(Some(frame.map(|frame| ExecOutput { frame: Some(frame) })))
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        if self.exec.state().current(self.serial).is_some_and(|attachment| !attachment.exited_sent) {
            self.exec.detach(self.serial);
        }
    }
}

/// The next frame, if there is one now.
fn next(state: &mut State, serial: u64, exec: &Exec) -> Option<Result<Out, Status>> {
    let State { output, stdin, end, attachment, .. } = state;
    let Some(attachment) = attachment.as_mut().filter(|attachment| attachment.serial == serial) else {
        return Some(Err(Status::aborted(format!("exec {}: attached from elsewhere", exec.id))));
    };
    if !attachment.started_sent {
        attachment.started_sent = true;
        let started = ExecStarted {
            exec_id: exec.id.as_str().to_owned(),
            pid: exec.pid.as_raw_nonzero().get(),
            stdin_offset: stdin.queue.end(),
        };
        return Some(Ok(Out::Started(started)));
    }
    if let Some(broken) = attachment.broken.take() {
        return Some(Ok(Out::Failed(broken)));
    }
    if let Some(lost) = attachment.lost.pop() {
        return Some(Ok(Out::Lost(lost)));
    }
    if attachment.stdin_acked != Some(stdin.queue.base()) {
        attachment.stdin_acked = Some(stdin.queue.base());
        return Some(Ok(Out::StdinAck(ExecStdinAck { offset: stdin.queue.base() })));
    }
    if let Some(data) = next_data(output, attachment) {
        return Some(Ok(data));
    }
    let end = (*end)?;
    attachment.exited_sent = true;
    Some(Ok(Out::Exited(end)))
}

/// The two streams take turns.
fn next_data(output: &mut [super::ring::Ring; 2], attachment: &mut Attachment) -> Option<Out> {
    let acks_by_taking = attachment.acks_by_taking();
    let order = if attachment.stderr_next { [Which::Stderr, Which::Stdout] } else { [Which::Stdout, Which::Stderr] };
    for which in order {
        let (ring, sent) = match which {
            Which::Stderr => (&mut output[1], &mut attachment.sent[1]),
            _ => (&mut output[0], &mut attachment.sent[0]),
        };
        let data = ring.read(*sent, EXEC_CHUNK);
        if data.is_empty() {
            continue;
        }
        let frame = ExecData { offset: *sent, data };
        *sent += super::ring::wide(frame.data.len());
        if acks_by_taking {
            // Within what the ring holds: it was just read from it.
            ring.ack(*sent).unwrap_or_default();
        }
        attachment.stderr_next = which == Which::Stdout;
        return Some(if which == Which::Stderr { Out::Stderr(frame) } else { Out::Stdout(frame) });
    }
    None
}

async fn take_input<S>(exec: Arc<Exec>, serial: u64, mut input: S, mut gone: oneshot::Receiver<()>)
where
    S: Stream<Item = Result<ExecInput, Status>> + Send + Unpin,
{
    let mut taken = true;
    loop {
        let frame = tokio::select! {
            biased;
            frame = input.next() => frame,
            _ = &mut gone, if taken => {
                taken = false;
                continue;
            }
            () = tokio::time::sleep(LINGER), if !taken => return,
        };
        match frame {
            Some(Ok(frame)) => {
                if let Err(broken) = apply(&exec, serial, frame) {
                    let mut state = exec.state();
                    if let Some(attachment) = state.current(serial) {
                        attachment.broken = Some(broken);
                    }
                    state.wake();
                    return;
                }
            }
            Some(Err(_transport)) => return exec.detach(serial),
            None => return input_ended(&exec, serial),
        }
    }
}

/// One frame from the caller. An attachment that was taken over has no say.
fn apply(exec: &Exec, serial: u64, frame: ExecInput) -> Result<(), ExecFailed> {
    if exec.state().current(serial).is_none() {
        return Ok(());
    }
    match frame.frame {
        Some(In::Stdin(data)) => exec.stdin(data.offset, &data.data),
        Some(In::StdinEnd(end)) => exec.stdin_end(end.offset),
        Some(In::Ack(ack)) => exec.ack(serial, [ack.stdout_offset, ack.stderr_offset]),
        Some(In::Resize(size)) => exec.resize(size.rows, size.columns),
        Some(In::Signal(signal)) => exec.signal(signal.number),
        Some(In::Hangup(_)) => {
            exec.kill();
            Ok(())
        }
        Some(In::Start(_) | In::Attach(_)) => Err(bad("start and attach occur only as the first frame")),
        None => Err(bad("a frame of a kind that this agent does not know")),
    }
}

/// The caller has closed its side.
fn input_ended(exec: &Arc<Exec>, serial: u64) {
    let mut state = exec.state();
    let Some(attachment) = state.current(serial) else { return };
    attachment.input_ended = true;
    if !attachment.acks_by_taking() {
        return;
    }
    let sent = attachment.sent;
    for (ring, sent) in state.output.iter_mut().zip(sent) {
        // No more than was sent, which is no more than there was.
        ring.ack(sent).unwrap_or_default();
    }
    drop(state);
    exec.wake_pumps();
}
