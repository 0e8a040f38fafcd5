//! Replays what the fuzzer keeps of rows of the store (fuzz/corpus/store_rows).

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "../../../fuzz/src/replay.rs"]
mod replay;
#[path = "../../../fuzz/src/store_rows.rs"]
mod target;

#[test]
fn the_corpus_holds() {
    replay::replay("store_rows", target::run);
}
