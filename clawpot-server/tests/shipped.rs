//! What must not be in a server that is shipped.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::BufRead as _;

/// By a search of the library's, which is optimised: one written out here takes ten seconds for a server built for tests, and two
/// minutes on a busy machine.
fn holds(mut bytes: &[u8], word: &str) -> bool {
    let (first, rest) = word.as_bytes().split_first().unwrap();
    while bytes.skip_until(*first).unwrap() > 0 {
        if bytes.starts_with(rest) {
            return true;
        }
    }
    false
}

/// The environment variable that arms failpoints, and the name of one: both are in the binary, or neither.
#[test]
fn failpoints_are_there_only_where_they_were_asked_for() {
    let program = std::fs::read(env!("CARGO_BIN_EXE_clawpot-server")).unwrap();
    assert!(holds(&program, env!("CARGO_PKG_NAME")), "what is there is found");
    for word in ["CLAWPOT_FAILPOINTS", "vmm.manifest_gone"] {
        assert_eq!(holds(&program, word), cfg!(feature = "failpoints"), "{word}");
    }
}
