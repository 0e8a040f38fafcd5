//! Time and chance, both under the test's control.

use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::Duration;

use clawpot_core::ports::{Clock, Ids};
use clawpot_types::{Timestamp, VmId, VmName, VolumeId};

/// Where every fake clock begins: 2027-01-15 08:00:00 UTC.
pub const START: Timestamp = Timestamp(1_800_000_000_000_000);

/// A wall clock that goes with tokio's (paused) clock, or only when it is told to.
#[derive(Debug)]
pub struct FakeClock {
    follows: Option<tokio::time::Instant>,
    /// Microseconds that it was moved by hand.
    moved: AtomicI64,
}

impl FakeClock {
    /// Stands still until [`Self::advance`].
    #[must_use]
    pub fn manual() -> Self {
        Self { follows: None, moved: AtomicI64::new(0) }
    }

    /// Goes as tokio's clock goes; for tests with `start_paused`.
    #[must_use]
    pub fn following_tokio() -> Self {
        Self { follows: Some(tokio::time::Instant::now()), moved: AtomicI64::new(0) }
    }

    pub fn advance(&self, by: Duration) {
        self.jump(i64::try_from(by.as_micros()).unwrap_or(i64::MAX));
    }

    /// By so many microseconds, backwards too, as somebody sets a host's clock.
    pub fn jump(&self, micros: i64) {
        self.moved.fetch_add(micros, Ordering::SeqCst);
    }
}

impl Clock for FakeClock {
    fn now(&self) -> Timestamp {
        let gone = self.follows.map_or(Duration::ZERO, |start| start.elapsed());
        Timestamp(START.after(gone).0.saturating_add_signed(self.moved.load(Ordering::SeqCst)))
    }
}

/// Counts from a seed: two with the same seed give the same ids and names.
#[derive(Debug)]
pub struct FakeIds {
    next: AtomicU64,
}

impl FakeIds {
    #[must_use]
    pub fn seeded(seed: u64) -> Self {
        Self { next: AtomicU64::new(seed) }
    }

    fn next(&self) -> u64 {
        mix(self.next.fetch_add(1, Ordering::SeqCst))
    }
}

/// Spreads a counter over all 64 bits (an odd multiplier and two shifts; no randomness is promised).
pub fn mix(number: u64) -> u64 {
    let spread = number.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let spread = (spread ^ (spread >> 31)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    spread ^ (spread >> 29)
}

impl Ids for FakeIds {
    fn vm_id(&self) -> VmId {
        let (low, high) = (self.next().to_le_bytes(), self.next().to_le_bytes());
        let mut bytes = [0; VmId::LEN];
        bytes[..8].copy_from_slice(&low);
        bytes[8..].copy_from_slice(&high);
        VmId::from_random(bytes)
    }

    fn volume_id(&self) -> VolumeId {
        let text = self.vm_id();
        // Both are sixteen of the same signs.
        text.as_str().parse().unwrap_or_else(|error| unreachable!("{text}: {error}"))
    }

    fn vm_name(&self) -> VmName {
        // As every name that begins with a letter and has no other signs, it parses.
        let text = format!("fake-{}", self.next() % 100_000);
        text.parse().unwrap_or_else(|error| unreachable!("{text}: {error}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_gives_the_same_ids() {
        let (one, two) = (FakeIds::seeded(7), FakeIds::seeded(7));
        let first = one.vm_id();
        assert_eq!(first, two.vm_id());
        assert_ne!(first, one.vm_id());
        assert_ne!(first, FakeIds::seeded(8).vm_id());
    }

    #[tokio::test(start_paused = true)]
    async fn the_clock_goes_with_tokio() {
        let clock = FakeClock::following_tokio();
        tokio::time::sleep(Duration::from_secs(3)).await;
        assert_eq!(clock.now().since(START), Duration::from_secs(3));
        clock.advance(Duration::from_secs(1));
        assert_eq!(clock.now().since(START), Duration::from_secs(4));
    }
}
