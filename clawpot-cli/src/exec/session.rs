//! Keeps a process attached until it ends.

use std::time::{Duration, Instant};

use bytes::Bytes;
use clawpot_common::v1::exec_input::Frame as In;
use clawpot_common::v1::exec_output::Frame as Out;
use clawpot_common::v1::{ExecAttach, ExecExited, ExecInput, ExecLost, ExecOutput, ExecStart, exec_lost};
use tokio::sync::mpsc;
use tonic::Status;

use super::end::End;
use super::inbox::{Gap, Inbox, Stream};
use super::outbox::Outbox;
use super::signals::{Interrupts, SIGINT, SIGPIPE, Signal, Signals};
use super::wires::{Inbound, frame, read, room, until};
use super::writer::Writer;
use super::{stdin, terminal};
use crate::api::{Api, Backoff, is_broken, is_lost};
use crate::failure::Failure;
use crate::output::note;

/// Frames on their way into the connection.
const FRAMES: usize = 4;
/// For the hang-up to arrive before we go.
const HANG_UP_GRACE: Duration = Duration::from_secs(2);
/// For the last acknowledgement to leave; the server ends the stream at once.
const LINGER: Duration = Duration::from_millis(200);
/// What Ctrl-C is on a raw terminal.
const CTRL_C: u8 = 3;

pub struct Session {
    api: Api,
    start: ExecStart,
    /// `VM web: uname`.
    called: String,
    reconnect: Duration,
    /// The guest has answered once: from then on we attach.
    started: bool,
    outbox: Outbox,
    inbox: Inbox,
    /// Output that the writer has no room for yet. While there is some, nothing more is received.
    unwritten: Option<(Stream, Bytes)>,
    writer: Writer,
    /// Gone at the end of input.
    stdin: Option<mpsc::Receiver<Bytes>>,
    signals: Signals,
    interrupts: Interrupts,
    /// Set while the server is being looked for.
    away: Option<Backoff>,
    /// How it ends, once that is known; and when we go even if the stream does not end.
    end: Option<(End, Instant)>,
    /// Why our output could not be written, if not for lack of a reader.
    output_failed: Option<Failure>,
}

/// How one attachment ended.
enum Attachment {
    Done,
    Lost(Status),
}

/// What can happen while attached.
enum Event {
    Signal(Signal),
    OutputBroke(std::io::Error),
    Sendable,
    Unsendable,
    Writable,
    Stdin(Option<Bytes>),
    Frame(Result<Option<ExecOutput>, Status>),
    Deadline,
}

impl Session {
    pub fn new(
        api: Api,
        start: ExecStart,
        called: String,
        reconnect: Duration,
        signals: Signals,
    ) -> Result<Self, Failure> {
        let mut outbox = Outbox::default();
        let stdin = if start.stdin { Some(stdin::read()?) } else { None };
        if stdin.is_none() {
            outbox.stdin_end();
        }
        Ok(Self {
            api,
            start,
            called,
            reconnect,
            started: false,
            outbox,
            inbox: Inbox::default(),
            unwritten: None,
            writer: Writer::start()?,
            stdin,
            signals,
            interrupts: Interrupts::default(),
            away: None,
            end: None,
            output_failed: None,
        })
    }

    /// Attaches again and again until the process has ended or we give up. What was received is written in any case.
    pub async fn until_end(mut self) -> Result<End, Failure> {
        let attached = self.stay_attached().await;
        self.flush().await;
        attached?;
        match (self.output_failed, self.end) {
            (Some(failure), _) => Err(failure),
            (None, Some((end, _))) => Ok(end),
            (None, None) => Err(Failure::new(format!("{}: left without an end", self.called))),
        }
    }

    /// Returns once the end is known.
    async fn stay_attached(&mut self) -> Result<(), Failure> {
        while let Attachment::Lost(status) = self.attach().await {
            if self.end.is_none() {
                self.await_server(&status).await?;
            }
            if self.end.is_some() {
                break;
            }
        }
        Ok(())
    }

    async fn attach(&mut self) -> Attachment {
        self.outbox.close();
        let (tx, rx) = mpsc::channel(FRAMES);
        // The channel is empty: it takes the frame, or the loss shows below.
        tx.try_send(frame(self.first_frame())).unwrap_or_default();
        self.relay(tx, Inbound::open(&self.api, rx)).await
    }

    fn first_frame(&self) -> In {
        if !self.started {
            return In::Start(self.start.clone());
        }
        let reached = self.inbox.offsets();
        In::Attach(ExecAttach {
            vm: self.start.vm.clone(),
            exec_id: self.start.exec_id.clone(),
            stdout_offset: reached.stdout_offset,
            stderr_offset: reached.stderr_offset,
        })
    }

    /// Moves what can be moved, in every direction, until the stream ends. Nothing here waits but for all at once.
    async fn relay(&mut self, tx: mpsc::Sender<ExecInput>, mut inbound: Inbound) -> Attachment {
        let mut writable = true;
        loop {
            match self.next_event(&tx, writable, &mut inbound).await {
                Event::Signal(signal) => self.signalled(signal),
                Event::OutputBroke(error) => self.output_broke(error),
                // There was room a moment ago, and we are the only sender: it fails only with the stream.
                Event::Sendable => {
                    writable = self.outbox.next().is_none_or(|next| tx.try_send(frame(next)).is_ok());
                }
                // The stream is broken; receiving from it says how.
                Event::Unsendable => writable = false,
                Event::Writable => self.pass_on(),
                Event::Stdin(chunk) => self.typed(chunk),
                Event::Frame(Ok(Some(output))) => {
                    if let Some(status) = self.received(output) {
                        return Attachment::Lost(status);
                    }
                }
                Event::Frame(Ok(None)) if self.end.is_some() => return Attachment::Done,
                Event::Frame(Ok(None)) => return Attachment::Lost(Status::unavailable("the server closed the stream")),
                Event::Frame(Err(status)) => return Attachment::Lost(status),
                Event::Deadline => return self.overdue(),
            }
        }
    }

    /// What is full is not read from: output not while some is unwritten, input not while much is unacknowledged.
    async fn next_event(&mut self, tx: &mpsc::Sender<ExecInput>, writable: bool, inbound: &mut Inbound) -> Event {
        let deadline = self.deadline();
        let chunks = self.writer.chunks.clone();
        // Unbiased: no direction starves another.
        tokio::select! {
            signal = self.signals.next() => Event::Signal(signal),
            Some(error) = self.writer.failed.recv() => Event::OutputBroke(error),
            room = tx.reserve(), if writable && self.outbox.is_pending() => match room {
                Ok(_) => Event::Sendable,
                Err(_) => Event::Unsendable,
            },
            () = room(chunks), if self.unwritten.is_some() => Event::Writable,
            output = inbound.next(), if self.unwritten.is_none() => Event::Frame(output),
            chunk = read(&mut self.stdin), if self.outbox.has_room() => Event::Stdin(chunk),
            () = until(deadline) => Event::Deadline,
        }
    }

    /// Gives the writer what it has room for now. When it has given up, nobody wants it.
    fn pass_on(&mut self) {
        if let (Some(chunks), Some(chunk)) = (&self.writer.chunks, self.unwritten.take())
            && chunks.try_send(chunk).is_err()
        {
            // It says itself why it gave up.
        }
    }

    fn signalled(&mut self, signal: Signal) {
        match signal {
            Signal::Resize if self.start.tty => self.outbox.resize(terminal::size()),
            Signal::Resize => {}
            Signal::Number(SIGINT) if self.interrupts.is_second(Instant::now()) => self.hang_up(SIGINT),
            // Nothing runs there yet that could be asked.
            Signal::Number(number) if !self.started => self.hang_up(number),
            Signal::Number(number) => self.outbox.signal(number),
        }
    }

    /// Ends the process with all its descendants. We stay until that is confirmed, but not long.
    fn hang_up(&mut self, signal: i32) {
        if self.end.is_none() {
            self.outbox.hang_up();
            self.end = Some((End::Left { signal }, Instant::now() + HANG_UP_GRACE));
        }
    }

    fn output_broke(&mut self, error: std::io::Error) {
        if error.kind() != std::io::ErrorKind::BrokenPipe {
            self.output_failed.get_or_insert(Failure::output(&error));
        }
        self.hang_up(SIGPIPE);
    }

    fn typed(&mut self, chunk: Option<Bytes>) {
        match chunk {
            Some(data) => self.outbox.stdin(&data),
            None => {
                self.stdin = None;
                self.outbox.stdin_end();
            }
        }
    }

    /// One frame of the guest. A status when it makes no sense to go on with this attachment.
    fn received(&mut self, output: ExecOutput) -> Option<Status> {
        match output.frame? {
            Out::Started(started) => {
                if self.away.take().is_some() {
                    note("attached again");
                }
                self.started = true;
                // The last ones may have been lost with the server: without them a full ring would stay full.
                self.outbox.ack(self.inbox.offsets());
                return self.outbox.open(started.stdin_offset).err().map(Status::data_loss);
            }
            Out::Stdout(data) => self.output(Stream::Stdout, data.offset, data.data),
            Out::Stderr(data) => self.output(Stream::Stderr, data.offset, data.data),
            Out::Lost(lost) => self.lost(&lost),
            Out::StdinAck(ack) => return self.outbox.stdin_acked(ack.offset).err().map(Status::data_loss),
            Out::Exited(exited) => self.exited(exited),
            Out::Failed(failed) => self.ended(End::Failed { program: self.called.clone(), failed }),
        }
        None
    }

    fn output(&mut self, stream: Stream, offset: u64, data: Bytes) {
        let (gap, fresh) = self.inbox.accept(stream, offset, data);
        gap.iter().for_each(report);
        if !fresh.is_empty() {
            self.unwritten = Some((stream, fresh));
        }
        if let Some(ack) = self.inbox.ack_due() {
            self.outbox.ack(ack);
        }
    }

    fn lost(&mut self, lost: &ExecLost) {
        let stream = if lost.stream() == exec_lost::Stream::Stderr { Stream::Stderr } else { Stream::Stdout };
        self.inbox.reach(stream, lost.to).iter().for_each(report);
    }

    fn exited(&mut self, exited: ExecExited) {
        for (stream, bytes) in [(Stream::Stdout, exited.stdout_bytes), (Stream::Stderr, exited.stderr_bytes)] {
            self.inbox.reach(stream, bytes).iter().for_each(report);
        }
        self.outbox.ack(self.inbox.offsets());
        self.ended(End::Exited(exited));
    }

    /// The guest's last word, unless we had left before.
    fn ended(&mut self, end: End) {
        let until = Instant::now() + LINGER;
        match &mut self.end {
            Some((_, deadline)) => *deadline = until.min(*deadline),
            None => self.end = Some((end, until)),
        }
    }

    /// When to stop waiting for the stream: it has ended or we have left it, or the server must be back by then.
    fn deadline(&self) -> Option<Instant> {
        self.end.as_ref().map(|(_, until)| *until).or_else(|| self.away.as_ref().map(Backoff::until))
    }

    fn overdue(&self) -> Attachment {
        match self.end {
            Some(_) => Attachment::Done,
            None => Attachment::Lost(Status::unavailable("the server does not answer")),
        }
    }

    /// Sleeps before the next attempt. Fails when no further attempt is due; returns early with an end when the person
    /// at the keyboard gives up.
    async fn await_server(&mut self, status: &Status) -> Result<(), Failure> {
        let failure = |status| Failure::status(&format!("{}: staying attached", self.called), status);
        if !is_lost(status) {
            return Err(failure(status));
        }
        let reconnect = self.reconnect;
        let first = self.away.is_none();
        let pause = self.away.get_or_insert_with(|| Backoff::silent(reconnect)).pause();
        let Some(pause) = pause else { return Err(failure(status)) };
        if first {
            // A living server may lose the guest: the VM is going, or its agent.
            let gone =
                if is_broken(status) { "the server is gone; looking for it" } else { "the VM does not answer; trying" };
            note(&format!("{gone} for {} s (--reconnect-timeout)", reconnect.as_secs()));
        }
        let next_try = Instant::now() + pause;
        while self.end.is_none() {
            tokio::select! {
                () = until(Some(next_try)) => break,
                signal = self.signals.next() => self.signalled_alone(signal),
                chunk = read(&mut self.stdin), if self.outbox.has_room() => self.typed_alone(chunk),
            }
        }
        Ok(())
    }

    /// Nothing can be forwarded while the server is gone: who asks to stop gets us out of the way.
    fn signalled_alone(&mut self, signal: Signal) {
        if let Signal::Number(number) = signal {
            note("left without the server: the command may still run in the VM");
            self.end = Some((End::Left { signal: number }, Instant::now()));
        }
    }

    fn typed_alone(&mut self, chunk: Option<Bytes>) {
        let interrupt = terminal::is_raw() && chunk.as_ref().is_some_and(|data| data.contains(&CTRL_C));
        self.typed(chunk);
        if interrupt {
            self.signalled_alone(Signal::Number(SIGINT));
        }
    }

    /// Everything that was received gets written, unless nobody reads it any more or somebody is tired of waiting.
    async fn flush(&mut self) {
        self.writer.chunks = None;
        loop {
            tokio::select! {
                error = self.writer.failed.recv() => match error {
                    Some(error) => self.output_broke(error),
                    None => return,
                },
                signal = self.signals.next() => if signal != Signal::Resize { return },
            }
        }
    }
}

fn report(gap: &Gap) {
    note(&format!(
        "{} bytes of {} are lost (bytes {} to {}): they had left the buffer before this program could fetch them",
        gap.to - gap.from,
        gap.stream.name(),
        gap.from,
        gap.to
    ));
}
