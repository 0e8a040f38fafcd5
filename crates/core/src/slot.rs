//! Which slot a new VM gets.

use std::collections::BTreeSet;

use clawpot_types::Slot;

/// The first free slot after `last`, round and round, so that a number is used again as late as possible.
/// `None` when all are taken.
#[must_use]
pub fn next_free(taken: &BTreeSet<Slot>, last: Option<Slot>, count: u32) -> Option<Slot> {
    let start = last.map_or(0, |slot| (slot.0 + 1) % count.max(1));
    (0..count).map(|step| Slot((start + step) % count)).find(|slot| !taken.contains(slot))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_go_round_and_are_never_counted() {
        let mut taken = BTreeSet::from([Slot(0), Slot(1)]);
        assert_eq!(next_free(&taken, Some(Slot(1)), 4), Some(Slot(2)));
        // 0 is free again, and still 2 and 3 come first.
        taken.remove(&Slot(0));
        assert_eq!(next_free(&taken, Some(Slot(1)), 4), Some(Slot(2)));
        assert_eq!(next_free(&taken, Some(Slot(3)), 4), Some(Slot(0)));
        let all = (0..4).map(Slot).collect();
        assert_eq!(next_free(&all, None, 4), None);
        assert_eq!(next_free(&BTreeSet::new(), None, 0), None);
    }
}
