//! Replays what the fuzzer keeps of the CONNECT handshake (fuzz/corpus/connect).

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "../../../fuzz/src/replay.rs"]
mod replay;
#[path = "../../../fuzz/src/connect.rs"]
mod target;

#[test]
fn the_corpus_holds() {
    replay::replay("connect", target::run);
}
