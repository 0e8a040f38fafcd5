//! What has arrived of each output stream, and what is missing.

use bytes::{Buf as _, Bytes};
use clawpot_common::v1::ExecAck;

/// Output after which an acknowledgement is due, bytes.
const ACK_EVERY: u64 = 64 << 10;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    Stdout,
    Stderr,
}

impl Stream {
    pub fn name(self) -> &'static str {
        match self {
            Self::Stdout => "stdout",
            Self::Stderr => "stderr",
        }
    }
}

/// Bytes `from..to` of `stream` that nobody can give any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gap {
    pub stream: Stream,
    pub from: u64,
    pub to: u64,
}

/// Offsets reached. What lies below them is never written twice, what is missing is never passed over in silence.
#[derive(Debug, Default)]
pub struct Inbox {
    stdout: u64,
    stderr: u64,
    /// Sum of both at the last acknowledgement.
    acked: u64,
}

impl Inbox {
    pub fn offsets(&self) -> ExecAck {
        ExecAck { stdout_offset: self.stdout, stderr_offset: self.stderr }
    }

    /// What of `data` is new, and what is missing before it.
    pub fn accept(&mut self, stream: Stream, offset: u64, mut data: Bytes) -> (Option<Gap>, Bytes) {
        let gap = self.reach(stream, offset);
        let at = self.at(stream);
        let known = usize::try_from(*at - offset).unwrap_or(usize::MAX).min(data.len());
        data.advance(known);
        *at = at.saturating_add(u64::try_from(data.len()).unwrap_or(u64::MAX));
        (gap, data)
    }

    /// Everything of `stream` below `offset` has been sent or is lost.
    pub fn reach(&mut self, stream: Stream, offset: u64) -> Option<Gap> {
        let at = self.at(stream);
        let gap = (offset > *at).then_some(Gap { stream, from: *at, to: offset });
        *at = offset.max(*at);
        gap
    }

    /// The acknowledgement, when enough has arrived since the last one.
    pub fn ack_due(&mut self) -> Option<ExecAck> {
        let sum = self.stdout.saturating_add(self.stderr);
        if sum - self.acked < ACK_EVERY {
            return None;
        }
        self.acked = sum;
        Some(self.offsets())
    }

    fn at(&mut self, stream: Stream) -> &mut u64 {
        match stream {
            Stream::Stdout => &mut self.stdout,
            Stream::Stderr => &mut self.stderr,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repeated_bytes_are_dropped_and_missing_ones_reported() {
        let mut inbox = Inbox::default();
        let mut take = |offset, text: &'static str| {
            let (gap, data) = inbox.accept(Stream::Stdout, offset, Bytes::from_static(text.as_bytes()));
            (gap.map(|gap| (gap.from, gap.to)), String::from_utf8_lossy(&data).into_owned())
        };
        assert_eq!(take(0, "abc"), (None, "abc".into()));
        assert_eq!(take(1, "bcd"), (None, "d".into()));
        assert_eq!(take(0, "ab"), (None, String::new()));
        assert_eq!(take(7, "h"), (Some((4, 7)), "h".into()));
        assert_eq!(take(u64::MAX, "z"), (Some((8, u64::MAX)), "z".into()));
        assert_eq!(inbox.offsets().stderr_offset, 0);
    }

    #[test]
    fn acknowledgements_are_due_every_64_kib() {
        let mut inbox = Inbox::default();
        inbox.accept(Stream::Stdout, 0, Bytes::from(vec![0; 60 << 10]));
        assert_eq!(inbox.ack_due(), None);
        inbox.accept(Stream::Stderr, 0, Bytes::from(vec![0; 4 << 10]));
        assert_eq!(inbox.ack_due(), Some(ExecAck { stdout_offset: 60 << 10, stderr_offset: 4 << 10 }));
        assert_eq!(inbox.ack_due(), None);
    }
}
