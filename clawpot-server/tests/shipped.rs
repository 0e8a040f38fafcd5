//! What must not be in a server that is shipped.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

/// The environment variable that arms failpoints, and the name of one: both are in the binary, or neither.
#[test]
fn failpoints_are_there_only_where_they_were_asked_for() {
    let program = std::fs::read(env!("CARGO_BIN_EXE_clawpot-server")).unwrap();
    for word in ["CLAWPOT_FAILPOINTS", "vmm.manifest_gone"] {
        let there = program.windows(word.len()).any(|window| window == word.as_bytes());
        assert_eq!(there, cfg!(feature = "failpoints"), "{word}");
    }
}
