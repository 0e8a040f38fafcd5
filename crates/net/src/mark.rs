//! How far a slot has come, kept by the kernel beside the host's end of its veth (the link's alias): it comes and goes with
//! the slot itself, and a server that starts reads all of them in one dump.
//!
//! ```text
//!            make                     ensure                    remove
//!  (nothing) ────► (no mark) ──► ready ─────► given ──────────► used ────► (nothing)
//!                  half made      │      elements set    elements gone        ▲
//!                      └──────────┴───────────────────────────────────────────┘
//! ```
//! `ready` was never given to a VM; only such a one is given out. `given` may have its elements or not (a crash between
//! the two): setting them again is all it takes. `cut off` is a `given` that never gets them, and whose veth is down. Anything else is removed before the slot is made again.

use std::fmt;

/// Of the text that a ready slot's rules were made from: with other rules now it is not ready any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RulesDigest(u64);

impl RulesDigest {
    /// FNV-1a: nobody attacks it, it must only be the same in every build.
    pub(crate) fn of(text: &str) -> Self {
        Self(
            text.bytes()
                .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)),
        )
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mark {
    Ready(RulesDigest),
    Given,
    CutOff,
    Used,
}

impl fmt::Display for Mark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ready(digest) => write!(f, "clawpot ready {:016x}", digest.0),
            Self::Given => f.write_str("clawpot given"),
            Self::CutOff => f.write_str("clawpot cut off"),
            Self::Used => f.write_str("clawpot used"),
        }
    }
}

impl Mark {
    pub(crate) fn parse(alias: &str) -> Option<Self> {
        match alias.strip_prefix("clawpot ")? {
            "given" => Some(Self::Given),
            "cut off" => Some(Self::CutOff),
            "used" => Some(Self::Used),
            other => {
                let digits = other.strip_prefix("ready ").filter(|digits| digits.len() == 16)?;
                u64::from_str_radix(digits, 16).ok().map(|digest| Self::Ready(RulesDigest(digest)))
            }
        }
    }
}

/// What the server knows of a slot; rebuilt from marks when it starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Standing {
    Absent,
    Ready(RulesDigest),
    Given,
    /// Given, and its VM is to reach nobody.
    CutOff,
    /// Something is there, or was when work on it began; to be removed before anything else.
    Leftover,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_read_back_and_others_do_not() {
        let digest = RulesDigest::of("rules");
        assert_ne!(digest, RulesDigest::of("other rules"));
        for mark in [Mark::Ready(digest), Mark::Given, Mark::CutOff, Mark::Used] {
            assert_eq!(Mark::parse(&mark.to_string()), Some(mark));
        }
        for other in ["", "clawpot", "clawpot ", "clawpot ready", "clawpot ready 12", "given", "clawpot given "] {
            assert_eq!(Mark::parse(other), None, "{other:?}");
        }
        // The same in every build: a slot made ready by one is taken by the next.
        assert_eq!(Mark::Ready(RulesDigest::of("")).to_string(), "clawpot ready cbf29ce484222325");
    }
}
