//! Replays what the fuzzer keeps of requests (`fuzz/corpus/api_requests`).

use super::validate;

#[path = "../../../fuzz/src/replay.rs"]
mod replay;
#[path = "../../../fuzz/src/api_requests.rs"]
mod target;

#[test]
fn the_corpus_holds() {
    replay::replay("api_requests", target::run);
}
