//! Replays what the fuzzer keeps of a guest's frames (fuzz/corpus/agent_frames).

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "../../../fuzz/src/replay.rs"]
mod replay;
#[path = "../../../fuzz/src/agent_frames.rs"]
mod target;

#[test]
fn the_corpus_holds() {
    replay::replay("agent_frames", target::run);
}
