//! The simulator itself: the same seed is the same run, and a simulator that finds nothing would find what was planted.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use clawpot_simulator::{Planted, Report, Setup, run};

fn simulated(seed: u64, planted: Option<Planted>) -> Report {
    let mut setup = Setup::new(seed, 120);
    setup.planted = planted;
    run(&setup).unwrap()
}

#[test]
fn the_same_seed_gives_the_same_trace() {
    let mut hashes = Vec::new();
    for seed in 0..6 {
        let (one, two) = (simulated(seed, None), simulated(seed, None));
        assert_eq!(one.hash, two.hash, "seed {seed}");
        assert_eq!(one.wrong, None, "seed {seed}: {}", one.trace.join("\n"));
        hashes.push(one.hash);
    }
    hashes.sort_unstable();
    hashes.dedup();
    assert_eq!(hashes.len(), 6, "seeds differ");
}

/// Each is found within few seeds, by the check that is there for it.
fn found(planted: Planted, words: &[&str]) {
    for seed in 0..40 {
        if let Some(wrong) = simulated(seed, Some(planted)).wrong {
            assert!(words.iter().any(|word| wrong.contains(word)), "{planted:?} was found as: {wrong}");
            assert!(simulated(seed, None).wrong.is_none(), "without it seed {seed} is clean");
            return;
        }
    }
    panic!("{planted:?}: not found in 40 seeds");
}

#[test]
fn a_skipped_undo_is_found() {
    found(Planted::SkippedUndo, &["disk of"]);
}

#[test]
fn a_slot_handed_out_twice_is_found() {
    // Also when the one removes what the other stands on.
    found(Planted::SlotTwice, &["share slot", "slot", "it has no network"]);
}

#[test]
fn a_writer_that_is_not_seen_is_found() {
    found(Planted::WriterUnseen, &["share the volume", "hold changed", "write to it"]);
}

#[test]
fn a_file_that_is_kept_is_found() {
    found(Planted::FileKept, &["its file", "is nobody's"]);
}

#[test]
fn a_lost_wake_up_is_found() {
    found(Planted::LostWakeUp, &["its VMM does not live", "wait for ever"]);
}
