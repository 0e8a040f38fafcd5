//! One exec: what it wrote, what it is to read, how it ended, and who is attached.
//!
//! ```text
//! attached ──loss──► detached, ring full stops the process ──30 s──► detached, oldest output is dropped
//!    ▲                   │                                               │
//!    └────── attach ─────┴───────────────────────────────────────────────┘
//! ```
//! Writers: the driver (output, end, what stdin was written) and the current attachment (acks, stdin). All under one lock.

use std::sync::{Arc, Mutex, MutexGuard};
use std::task::Waker;
use std::time::Duration;

use bytes::Bytes;
use clawpot_common::v1::exec_failed::Reason;
use clawpot_common::v1::exec_lost::Stream as Which;
use clawpot_common::v1::{ExecExited, ExecFailed, ExecLost};
use clawpot_common::{EXEC_CHUNK, STDIN_WINDOW};
use clawpot_types::ExecId;
use rustix::process::Pid;
use tokio::sync::Notify;
use tokio::time::Instant;

use super::cgroup::Cgroup;
use super::io::Io;
use super::request::failed;
use super::ring::{Budget, Ring};
use super::{pty, table::Shared};
use crate::lock;

/// Bytes kept of each output stream.
pub const RING: usize = 256 << 10;

#[derive(Debug)]
pub struct Exec {
    pub id: ExecId,
    pub pid: Pid,
    pub started: std::time::Instant,
    pub cgroup: Cgroup,
    /// Our end of its terminal.
    pub terminal: Option<Arc<Io>>,
    pub shared: Arc<Shared>,
    /// Room was made in the ring of that stream, or the rule about a full ring has changed.
    pub room: [Notify; 2],
    /// There is something for the process to read.
    pub stdin: Notify,
    state: Mutex<State>,
}

#[derive(Debug)]
pub struct State {
    /// stdout, stderr.
    pub output: [Ring; 2],
    pub stdin: Stdin,
    pub end: Option<ExecExited>,
    pub attachment: Option<Attachment>,
    /// Counts attachments.
    serial: u64,
    /// Since when nobody is attached.
    detached: Option<Instant>,
    /// How long a full ring then still stops the process.
    patience: Duration,
}

#[derive(Debug)]
pub struct Stdin {
    /// Received and not yet written to the process: from its base, what was written, to its end, what was received.
    pub queue: Ring,
    /// The caller has no more.
    pub ended: bool,
    /// The process reads no more: whatever comes counts as written.
    pub closed: bool,
}

/// How far one attachment is.
#[derive(Debug)]
pub struct Attachment {
    pub serial: u64,
    pub started_sent: bool,
    /// Sent up to here, of stdout and stderr.
    pub sent: [u64; 2],
    pub lost: Vec<ExecLost>,
    /// What the caller was last told about stdin, beside `started`.
    pub stdin_acked: Option<u64>,
    /// stderr's turn.
    pub stderr_next: bool,
    pub exited_sent: bool,
    /// The caller broke the rules; told to it as the last frame.
    pub broken: Option<ExecFailed>,
    /// The caller has acknowledged something.
    pub acks: bool,
    /// The caller will send nothing more.
    pub input_ended: bool,
    pub waker: Option<Waker>,
}

/// Which of the two rings, as an index.
#[must_use]
pub fn index(which: Which) -> usize {
    usize::from(which == Which::Stderr)
}

impl Attachment {
    /// A caller that closes its side and has never acknowledged anything is a simple one: what it takes is acknowledged.
    /// For any other the end of its side may be that of a relay which lost the caller.
    pub fn acks_by_taking(&self) -> bool {
        self.input_ended && !self.acks
    }
}

impl State {
    pub fn new(budget: &Arc<Budget>, stdin: bool, patience: Duration) -> Self {
        let ring = || Ring::new(RING, budget.clone());
        let queue = Ring::new(2 * STDIN_WINDOW, budget.clone());
        Self {
            output: [ring(), ring()],
            stdin: Stdin { queue, ended: false, closed: !stdin },
            end: None,
            attachment: None,
            serial: 0,
            detached: Some(Instant::now()),
            patience,
        }
    }

    /// How many bytes may be read from the process now; or until when to wait for that to change by itself.
    pub fn room(&self, which: Which) -> Result<usize, Option<Instant>> {
        let room = self.output[index(which)].room();
        let patience_ends = self.detached.map(|since| since + self.patience);
        if patience_ends.is_some_and(|ends| ends <= Instant::now()) {
            return Ok(EXEC_CHUNK);
        }
        if room > 0 { Ok(room) } else { Err(patience_ends) }
    }

    /// Takes what the process wrote. While nobody has been attached for long, the oldest gives way.
    pub fn wrote(&mut self, which: Which, bytes: &[u8]) {
        let ring = &mut self.output[index(which)];
        if self.detached.is_some_and(|since| since.elapsed() >= self.patience) {
            ring.evict_for(bytes.len());
        }
        ring.push(bytes);
        self.wake();
    }

    /// The output side of the attachment looks again.
    pub fn wake(&mut self) {
        if let Some(waker) = self.attachment.as_mut().and_then(|attachment| attachment.waker.take()) {
            waker.wake();
        }
    }

    /// The attachment, if it is still that of `serial`.
    pub fn current(&mut self, serial: u64) -> Option<&mut Attachment> {
        self.attachment.as_mut().filter(|attachment| attachment.serial == serial)
    }

    /// The caller has everything, as far as one can know.
    pub fn is_settled(&self) -> bool {
        self.output.iter().all(Ring::is_empty)
            && self.attachment.as_ref().is_some_and(|attachment| attachment.exited_sent && attachment.input_ended)
    }
}

impl Stdin {
    /// Data at `offset`: what was received before is skipped.
    fn receive(&mut self, offset: u64, data: &[u8]) -> Result<(), ExecFailed> {
        let received = self.queue.end();
        let Some(skip) = received.checked_sub(offset) else {
            return Err(bad(format!("stdin at {offset}: only {received} bytes came before it")));
        };
        let fresh = usize::try_from(skip).ok().and_then(|skip| data.get(skip..)).unwrap_or_default();
        if fresh.is_empty() {
            return Ok(());
        }
        if self.ended {
            return Err(bad(format!("stdin at {offset}: comes after its end at {received}")));
        }
        if self.closed {
            self.queue.skip_to(received + super::ring::wide(fresh.len()));
        } else if self.queue.len() + fresh.len() > 2 * STDIN_WINDOW {
            return Err(bad(format!(
                "stdin at {offset}: more than {} bytes on the way without acknowledgement",
                2 * STDIN_WINDOW
            )));
        } else {
            self.queue.push(fresh);
        }
        Ok(())
    }

    fn end(&mut self, offset: u64) -> Result<(), ExecFailed> {
        let received = self.queue.end();
        if offset != received {
            return Err(bad(format!("end of stdin at {offset}: {received} bytes were received")));
        }
        self.ended = true;
        Ok(())
    }

    /// The process reads no more.
    pub fn close(&mut self) {
        self.closed = true;
        self.queue.skip_to(self.queue.end());
    }
}

pub fn bad(message: impl Into<String>) -> ExecFailed {
    failed(Reason::BadRequest, message)
}

impl Exec {
    pub fn new(parts: Parts, state: State, shared: Arc<Shared>) -> Self {
        let Parts { id, pid, started, cgroup, terminal } = parts;
        let room = [Notify::new(), Notify::new()];
        Self { id, pid, started, cgroup, terminal, shared, room, stdin: Notify::new(), state: Mutex::new(state) }
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// A new attachment, which ends an earlier one. The caller has `offsets` bytes of stdout and stderr.
    pub fn attach(&self, offsets: [u64; 2]) -> Result<u64, ExecFailed> {
        let mut state = self.state();
        let mut lost = Vec::new();
        for (which, offset) in [Which::Stdout, Which::Stderr].into_iter().zip(offsets) {
            let ring = &mut state.output[index(which)];
            let base = ring.base();
            if offset < base {
                lost.push(ExecLost { stream: which.into(), from: offset, to: base });
            }
            ring.ack(offset).map_err(|beyond| bad(format!("attach: {}: {beyond}", which.as_str_name())))?;
        }
        // The earlier one wakes up, sees another serial and ends.
        state.wake();
        state.serial += 1;
        let (serial, stdin) = (state.serial, &state.stdin.queue);
        // `started` tells what was received; what of it was not yet written is told by an acknowledgement.
        let stdin_acked = stdin.is_empty().then(|| stdin.end());
        let sent = [state.output[0].base(), state.output[1].base()];
        state.attachment = Some(Attachment {
            serial,
            started_sent: false,
            sent,
            lost,
            stdin_acked,
            stderr_next: false,
            exited_sent: false,
            broken: None,
            acks: false,
            input_ended: false,
            waker: None,
        });
        state.detached = None;
        drop(state);
        self.wake_pumps();
        Ok(serial)
    }

    /// The transport of that attachment is gone; the exec goes on.
    pub fn detach(&self, serial: u64) {
        let mut state = self.state();
        if state.current(serial).is_some() {
            state.wake();
            state.attachment = None;
            state.detached = Some(Instant::now());
            drop(state);
            self.wake_pumps();
        }
    }

    /// The caller has this much.
    pub fn ack(&self, serial: u64, offsets: [u64; 2]) -> Result<(), ExecFailed> {
        let mut state = self.state();
        let Some(attachment) = state.current(serial) else { return Ok(()) };
        attachment.acks = true;
        let sent = attachment.sent;
        for (which, (offset, sent)) in [Which::Stdout, Which::Stderr].into_iter().zip(offsets.into_iter().zip(sent)) {
            if offset > sent {
                return Err(bad(format!("ack: {}: {offset}, but only {sent} was sent", which.as_str_name())));
            }
            state.output[index(which)].ack(offset).map_err(|beyond| bad(beyond.to_string()))?;
        }
        drop(state);
        self.wake_pumps();
        Ok(())
    }

    pub fn stdin(&self, offset: u64, data: &Bytes) -> Result<(), ExecFailed> {
        let mut state = self.state();
        state.stdin.receive(offset, data)?;
        if state.stdin.closed {
            state.wake();
        }
        drop(state);
        self.stdin.notify_one();
        Ok(())
    }

    pub fn stdin_end(&self, offset: u64) -> Result<(), ExecFailed> {
        self.state().stdin.end(offset)?;
        self.stdin.notify_one();
        Ok(())
    }

    pub fn resize(&self, rows: u32, columns: u32) -> Result<(), ExecFailed> {
        let Some(terminal) = &self.terminal else { return Err(bad("resize: this exec has no terminal")) };
        pty::resize(terminal.as_ref(), pty::size(rows, columns)).map_err(|error| bad(format!("resize: {error}")))
    }

    /// To the main process, or to its group if it has a terminal. Nothing once it has ended.
    pub fn signal(&self, number: i32) -> Result<(), ExecFailed> {
        if !(1..=64).contains(&number) {
            return Err(bad(format!("signal {number}: must be 1 to 64")));
        }
        match self.shared.reaper.signal(self.pid, self.terminal.is_some(), number) {
            Ok(_) => Ok(()),
            Err(error) => Err(bad(format!("signal {number}: {error}"))),
        }
    }

    /// Kills the whole tree, unless the exec has ended.
    pub fn kill(&self) {
        if self.state().end.is_some() {
            return;
        }
        if let Err(error) = self.cgroup.kill() {
            crate::console::say(format_args!("exec {}: killing it: {error}", self.id));
        }
    }

    pub fn wake_pumps(&self) {
        self.room[0].notify_one();
        self.room[1].notify_one();
    }
}

/// What of an [`Exec`] the spawn produced.
#[derive(Debug)]
pub struct Parts {
    pub id: ExecId,
    pub pid: Pid,
    pub started: std::time::Instant,
    pub cgroup: Cgroup,
    pub terminal: Option<Arc<Io>>,
}
