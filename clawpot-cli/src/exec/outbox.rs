//! What is to be sent: standard input that may have to be sent again, and what overtakes it.

use std::collections::VecDeque;

use bytes::{Bytes, BytesMut};
use clawpot_common::v1::exec_input::Frame;
use clawpot_common::v1::{ExecAck, ExecData, ExecHangup, ExecSignal, ExecStdinEnd, TerminalSize};
use clawpot_common::{EXEC_CHUNK, STDIN_WINDOW};

/// Signals kept while none can be sent; who sends more meant no more by it.
const MAX_SIGNALS: usize = 16;

/// Frames wait here in the order of their urgency: hang-up, signals, size, acknowledgement, then standard input.
/// Nothing but the hang-up goes out before [`Outbox::open`].
#[derive(Debug, Default)]
pub struct Outbox {
    /// Accepted by the guest in this attachment.
    open: bool,
    hangup: bool,
    signals: VecDeque<i32>,
    resize: Option<TerminalSize>,
    ack: Option<ExecAck>,
    stdin: Stdin,
}

impl Outbox {
    /// The attachment is lost: hold everything.
    pub fn close(&mut self) {
        self.open = false;
    }

    /// The guest has `stdin_offset` bytes of standard input: the rest goes out again. `Err` when it claims what cannot
    /// be: fewer than it acknowledged, or more than was read.
    pub fn open(&mut self, stdin_offset: u64) -> Result<(), String> {
        self.open = true;
        self.stdin.resume(stdin_offset)
    }

    /// Whether another chunk of standard input fits.
    pub fn has_room(&self) -> bool {
        self.stdin.kept.len() + EXEC_CHUNK <= STDIN_WINDOW
    }

    pub fn stdin(&mut self, data: &Bytes) {
        self.stdin.kept.extend(data.iter());
    }

    pub fn stdin_end(&mut self) {
        self.stdin.ended = true;
    }

    pub fn stdin_acked(&mut self, offset: u64) -> Result<(), String> {
        self.stdin.acked(offset)
    }

    pub fn hang_up(&mut self) {
        self.hangup = true;
    }

    pub fn signal(&mut self, number: i32) {
        if self.signals.len() < MAX_SIGNALS {
            self.signals.push_back(number);
        }
    }

    pub fn resize(&mut self, size: TerminalSize) {
        self.resize = Some(size);
    }

    pub fn ack(&mut self, ack: ExecAck) {
        self.ack = Some(ack);
    }

    pub fn is_pending(&self) -> bool {
        let held = !self.signals.is_empty() || self.resize.is_some() || self.ack.is_some() || self.stdin.is_pending();
        self.hangup || (self.open && held)
    }

    /// The next frame to send; sent once, but for standard input, which is sent again after a loss.
    pub fn next(&mut self) -> Option<Frame> {
        if std::mem::take(&mut self.hangup) {
            return Some(Frame::Hangup(ExecHangup {}));
        }
        if !self.open {
            return None;
        }
        let signal = self.signals.pop_front().map(|number| Frame::Signal(ExecSignal { number }));
        signal
            .or_else(|| self.resize.take().map(Frame::Resize))
            .or_else(|| self.ack.take().map(Frame::Ack))
            .or_else(|| self.stdin.next())
    }
}

/// Standard input from the first byte that the guest has not acknowledged.
#[derive(Debug, Default)]
struct Stdin {
    /// Offset of the first byte of `kept`.
    base: u64,
    /// At most [`STDIN_WINDOW`] bytes.
    kept: VecDeque<u8>,
    /// Bytes of `kept` that were sent in this attachment.
    sent: usize,
    ended: bool,
    end_sent: bool,
}

impl Stdin {
    fn is_pending(&self) -> bool {
        self.sent < self.kept.len() || (self.ended && !self.end_sent)
    }

    fn next(&mut self) -> Option<Frame> {
        let offset = self.base.saturating_add(wide(self.sent));
        let to = self.kept.len().min(self.sent + EXEC_CHUNK);
        if self.sent < to {
            let data = self.copy(self.sent, to);
            self.sent = to;
            return Some(Frame::Stdin(ExecData { offset, data }));
        }
        (self.ended && !std::mem::replace(&mut self.end_sent, true)).then_some(Frame::StdinEnd(ExecStdinEnd { offset }))
    }

    /// Bytes `from..to` of what is kept.
    fn copy(&self, from: usize, to: usize) -> Bytes {
        let (front, back) = self.kept.as_slices();
        let mut data = BytesMut::with_capacity(to - from);
        data.extend_from_slice(&front[from.min(front.len())..to.min(front.len())]);
        data.extend_from_slice(&back[from.saturating_sub(front.len())..to.saturating_sub(front.len())]);
        data.freeze()
    }

    fn acked(&mut self, offset: u64) -> Result<(), String> {
        let (first, end) = (self.base, self.base.saturating_add(wide(self.kept.len())));
        // An acknowledgement that was overtaken says nothing new.
        let Some(done) = offset.checked_sub(first) else { return Ok(()) };
        match usize::try_from(done).ok().filter(|done| *done <= self.kept.len()) {
            Some(done) => {
                self.kept.drain(..done);
                self.sent = self.sent.saturating_sub(done);
                self.base = offset;
                Ok(())
            }
            None => Err(format!("the guest has {offset} bytes of standard input, but only {end} were read")),
        }
    }

    fn resume(&mut self, offset: u64) -> Result<(), String> {
        if offset < self.base {
            return Err(format!("the guest has {offset} bytes of standard input after acknowledging {}", self.base));
        }
        self.acked(offset)?;
        self.sent = 0;
        self.end_sent = false;
        Ok(())
    }
}

fn wide(length: usize) -> u64 {
    u64::try_from(length).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn opened() -> Outbox {
        let mut outbox = Outbox::default();
        outbox.open(0).unwrap();
        outbox
    }

    #[test]
    fn urgent_frames_overtake_standard_input() {
        let mut outbox = opened();
        outbox.stdin(&Bytes::from_static(b"text"));
        outbox.stdin_end();
        outbox.ack(ExecAck { stdout_offset: 1, stderr_offset: 0 });
        outbox.ack(ExecAck { stdout_offset: 9, stderr_offset: 0 });
        outbox.signal(15);
        let frames: Vec<_> = std::iter::from_fn(|| outbox.next()).collect();
        let want = [
            Frame::Signal(ExecSignal { number: 15 }),
            Frame::Ack(ExecAck { stdout_offset: 9, stderr_offset: 0 }),
            Frame::Stdin(ExecData { offset: 0, data: Bytes::from_static(b"text") }),
            Frame::StdinEnd(ExecStdinEnd { offset: 4 }),
        ];
        assert_eq!(frames, want);
        assert!(!outbox.is_pending());
    }

    #[test]
    fn only_a_hang_up_goes_out_before_the_guest_has_answered() {
        let mut outbox = Outbox::default();
        outbox.stdin(&Bytes::from_static(b"x"));
        outbox.signal(2);
        assert!(!outbox.is_pending() && outbox.next().is_none());
        outbox.hang_up();
        assert_eq!(outbox.next(), Some(Frame::Hangup(ExecHangup {})));
    }

    #[test]
    fn claims_that_cannot_be_are_refused() {
        let mut outbox = opened();
        outbox.stdin(&Bytes::from_static(b"abcdef"));
        outbox.stdin_acked(4).unwrap();
        outbox.stdin_acked(2).unwrap();
        assert!(outbox.stdin_acked(7).is_err());
        outbox.close();
        assert!(outbox.open(3).is_err());
        assert!(outbox.open(7).is_err());
        assert!(outbox.open(u64::MAX).is_err());
    }

    proptest! {
        /// Whatever is lost and whenever, the guest gets each byte once and in order, and the buffer stays bounded.
        #[test]
        fn standard_input_survives_losses(
            chunks in prop::collection::vec(1usize..=EXEC_CHUNK, 1..12),
            acts in prop::collection::vec((0u8..4, any::<prop::sample::Index>()), 0..200),
        ) {
            let whole: Vec<u8> = (0..chunks.iter().sum::<usize>()).map(|i| u8::try_from(i % 251).unwrap()).collect();
            let (mut outbox, mut guest, mut acked) = (opened(), Vec::new(), 0usize);
            let mut chunks = chunks.into_iter();
            let mut read = 0;
            let mut step = |act: u8, at: usize| {
                match act {
                    0 if outbox.has_room() => match chunks.next() {
                        Some(n) => { outbox.stdin(&Bytes::copy_from_slice(&whole[read..read + n])); read += n; }
                        None => outbox.stdin_end(),
                    },
                    1 => if let Some(Frame::Stdin(frame)) = outbox.next() {
                        assert_eq!(frame.offset, wide(guest.len()));
                        guest.extend_from_slice(&frame.data);
                    },
                    2 => { acked = acked.max(at % (guest.len() + 1)); outbox.stdin_acked(wide(acked)).unwrap(); }
                    3 => {
                        // A loss: the guest kept what it had acknowledged and some of what came after.
                        guest.truncate(acked + at % (guest.len() - acked + 1));
                        outbox.close();
                        outbox.open(wide(guest.len())).unwrap();
                        acked = guest.len();
                    }
                    _ => {}
                }
                assert!(outbox.stdin.kept.len() <= STDIN_WINDOW);
                guest.len()
            };
            for (act, at) in acts {
                step(act, at.index(1 << 20));
            }
            for _ in 0..1000 {
                step(0, 0);
                let have = step(1, 0);
                step(2, have);
            }
            prop_assert!(guest == whole);
        }
    }
}
