//! A bounded run of a byte stream: what is kept of it between two offsets.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;

/// Bytes that every ring may hold however full the others are: a process that is read from never stands still.
const GUARANTEED: usize = 16 << 10;

/// Bytes in all rings together, so that many execs cannot take the machine's memory from what runs in it.
#[derive(Debug)]
pub struct Budget {
    used: AtomicUsize,
    limit: usize,
}

impl Budget {
    #[must_use]
    pub fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self { used: AtomicUsize::new(0), limit })
    }

    /// Bytes held now.
    #[must_use]
    pub fn used(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }

    #[must_use]
    pub fn exhausted(&self) -> bool {
        self.used() >= self.limit
    }

    fn take(&self, bytes: usize) {
        self.used.fetch_add(bytes, Ordering::Relaxed);
    }

    fn give(&self, bytes: usize) {
        self.used.fetch_sub(bytes, Ordering::Relaxed);
    }
}

/// An offset that lies beyond what the stream has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("offset {offset} is beyond {end}, the end of what there is")]
pub struct Beyond {
    pub offset: u64,
    pub end: u64,
}

/// Bytes `base..end` of a stream. Grows with use up to `limit`; [`Ring::push`] beyond it is the caller's decision.
#[derive(Debug)]
pub struct Ring {
    base: u64,
    data: VecDeque<u8>,
    limit: usize,
    budget: Arc<Budget>,
}

impl Ring {
    #[must_use]
    pub fn new(limit: usize, budget: Arc<Budget>) -> Self {
        Self { base: 0, data: VecDeque::new(), limit, budget }
    }

    /// Offset of the first byte that is kept.
    #[must_use]
    pub fn base(&self) -> u64 {
        self.base
    }

    /// Offset after the last byte: the stream's length so far.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.base + wide(self.data.len())
    }

    /// Bytes kept.
    #[must_use]
    pub fn len(&self) -> usize {
        self.data.len()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.data.is_empty()
    }

    /// Bytes that still fit.
    #[must_use]
    pub fn room(&self) -> usize {
        let limit = if self.budget.exhausted() { GUARANTEED.min(self.limit) } else { self.limit };
        limit.saturating_sub(self.data.len())
    }

    pub fn push(&mut self, bytes: &[u8]) {
        self.data.extend(bytes);
        self.budget.take(bytes.len());
    }

    /// Drops the oldest bytes until `bytes` more fit.
    pub fn evict_for(&mut self, bytes: usize) {
        let excess = bytes.saturating_sub(self.room()).min(self.data.len());
        self.drop_front(excess);
    }

    /// Drops what lies before `offset`.
    pub fn ack(&mut self, offset: u64) -> Result<(), Beyond> {
        let end = self.end();
        if offset > end {
            return Err(Beyond { offset, end });
        }
        // No more than `data.len()`, by the check above.
        self.drop_front(usize::try_from(offset.saturating_sub(self.base)).unwrap_or(usize::MAX));
        Ok(())
    }

    /// Forgets everything; the stream goes on at `offset`.
    pub fn skip_to(&mut self, offset: u64) {
        self.drop_front(self.data.len());
        self.base = offset;
        self.data = VecDeque::new();
    }

    /// At most `max` bytes from `offset` on; empty before the base and at the end.
    #[must_use]
    pub fn read(&self, offset: u64, max: usize) -> Bytes {
        let Some(skip) = offset.checked_sub(self.base).and_then(|skip| usize::try_from(skip).ok()) else {
            return Bytes::new();
        };
        let count = self.data.len().saturating_sub(skip).min(max);
        let (front, back) = self.data.as_slices();
        let mut copy = Vec::with_capacity(count);
        copy.extend_from_slice(part(front, skip, count));
        copy.extend_from_slice(part(back, skip.saturating_sub(front.len()), count - copy.len()));
        copy.into()
    }

    /// The oldest bytes that lie in one piece; empty only if the ring is.
    #[must_use]
    pub fn front(&self) -> &[u8] {
        self.data.as_slices().0
    }

    /// Gives back memory that is not needed for what is kept.
    pub fn shrink(&mut self) {
        self.data.shrink_to_fit();
    }

    fn drop_front(&mut self, count: usize) {
        let count = count.min(self.data.len());
        self.data.drain(..count);
        self.base += wide(count);
        self.budget.give(count);
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        self.budget.give(self.data.len());
    }
}

fn part(slice: &[u8], from: usize, count: usize) -> &[u8] {
    let slice = slice.get(from..).unwrap_or_default();
    &slice[..count.min(slice.len())]
}

/// No target has more than 64 bits of address.
pub(super) fn wide(count: usize) -> u64 {
    u64::try_from(count).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ring(limit: usize) -> Ring {
        Ring::new(limit, Budget::new(1 << 20))
    }

    #[test]
    fn eviction_keeps_the_newest_and_tells_the_base() {
        let mut ring = ring(4);
        ring.push(b"abcd");
        ring.evict_for(3);
        ring.push(b"efg");
        assert_eq!((ring.base(), ring.end()), (3, 7));
        assert_eq!(ring.read(3, 99), &b"defg"[..]);
        assert_eq!(ring.read(0, 99), &b""[..]);
    }

    #[test]
    fn one_cannot_acknowledge_what_was_never_there() {
        let mut ring = ring(8);
        ring.push(b"abc");
        assert_eq!(ring.ack(4), Err(Beyond { offset: 4, end: 3 }));
        ring.ack(3).unwrap();
        ring.ack(1).unwrap();
        assert_eq!((ring.base(), ring.len()), (3, 0));
    }

    #[test]
    fn many_rings_share_one_budget() {
        let budget = Budget::new(64 << 10);
        let mut first = Ring::new(1 << 20, budget.clone());
        first.push(&vec![0; 64 << 10]);
        let second = Ring::new(1 << 20, budget.clone());
        assert_eq!(second.room(), GUARANTEED);
        drop(first);
        assert_eq!((budget.used(), second.room()), (0, 1 << 20));
    }

    #[derive(Clone, Debug)]
    enum Op {
        Push(Vec<u8>),
        Ack(u64),
        Evict(usize),
        Read(u64, usize),
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            prop::collection::vec(any::<u8>(), 0..40).prop_map(Op::Push),
            (0..200_u64).prop_map(Op::Ack),
            (0..40_usize).prop_map(Op::Evict),
            (0..200_u64, 0..60_usize).prop_map(|(at, max)| Op::Read(at, max)),
        ]
    }

    proptest! {
        /// Whatever happens, what is read is what was written at that offset, and the budget counts what is held.
        #[test]
        fn reads_are_what_was_written(ops in prop::collection::vec(op(), 0..60)) {
            let budget = Budget::new(1 << 20);
            let mut ring = Ring::new(64, budget.clone());
            let mut all = Vec::new();
            for op in ops {
                match op {
                    Op::Push(bytes) => {
                        let bytes = &bytes[..bytes.len().min(ring.room())];
                        ring.push(bytes);
                        all.extend_from_slice(bytes);
                    }
                    Op::Ack(offset) => prop_assert_eq!(ring.ack(offset).is_ok(), offset <= wide(all.len())),
                    Op::Evict(bytes) => ring.evict_for(bytes),
                    Op::Read(offset, max) => {
                        let got = ring.read(offset, max);
                        if offset >= ring.base() && offset <= ring.end() {
                            let from = usize::try_from(offset).unwrap();
                            prop_assert_eq!(&got[..], &all[from..(from + max).min(all.len())]);
                        } else {
                            prop_assert!(got.is_empty());
                        }
                    }
                }
                prop_assert!(ring.len() <= 64);
                prop_assert_eq!(ring.end(), wide(all.len()));
                prop_assert_eq!(budget.used(), ring.len());
            }
        }
    }
}
