//! Replays what the fuzzer keeps of archives (fuzz/corpus/archive).

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "../../../fuzz/src/replay.rs"]
mod replay;
#[path = "../../../fuzz/src/archive.rs"]
mod target;

#[test]
fn the_corpus_holds() {
    replay::replay("archive", target::run);
}
