//! How much one guest, and all of them, may have in hand at a time.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Bounded, by source and altogether. Nothing waits: who is over the limit is turned away.
#[derive(Debug)]
pub(super) struct Limits {
    per_source: u32,
    total: u32,
    held: Mutex<Held>,
}

#[derive(Debug, Default)]
struct Held {
    total: u32,
    /// Sources that hold something; so never more entries than `total`.
    by_source: HashMap<IpAddr, u32>,
}

/// One of what is limited; gives itself back.
#[derive(Debug)]
pub(super) struct Permit {
    limits: Arc<Limits>,
    source: IpAddr,
}

impl Limits {
    pub(super) fn new(per_source: u32, total: u32) -> Arc<Self> {
        Arc::new(Self { per_source, total, held: Mutex::default() })
    }

    pub(super) fn admit(self: &Arc<Self>, source: IpAddr) -> Option<Permit> {
        let mut held = self.held();
        if held.total >= self.total {
            return None;
        }
        let own = held.by_source.entry(source).or_default();
        if *own >= self.per_source {
            return None;
        }
        *own += 1;
        held.total += 1;
        drop(held);
        Some(Permit { limits: Arc::clone(self), source })
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        // Two counters; whoever panicked did not do it between them.
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut held = self.limits.held();
        held.total = held.total.saturating_sub(1);
        if let Some(own) = held.by_source.get_mut(&self.source) {
            *own = own.saturating_sub(1);
            if *own == 0 {
                held.by_source.remove(&self.source);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_source_leaves_room_for_others_and_nothing_is_kept() {
        let limits = Limits::new(2, 3);
        let [a, b, c]: [IpAddr; 3] = [1, 2, 3].map(|n| [10, 0, 0, n].into());
        let first = limits.admit(a).unwrap();
        let second = limits.admit(a).unwrap();
        assert!(limits.admit(a).is_none(), "over its own limit");
        let other = limits.admit(b).unwrap();
        assert!(limits.admit(c).is_none(), "over everybody's limit");
        drop(first);
        let third = limits.admit(c).unwrap();
        drop((second, other, third));
        let held = limits.held();
        assert_eq!((held.total, held.by_source.len()), (0, 0));
    }
}
