//! What a look at the host tells. `Unknown` is never taken for `Absent`.

use std::fmt;

use clawpot_types::{Error, Timestamp};
use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fact<T> {
    Present(T),
    Absent,
    /// The look failed: why, as one line.
    Unknown(String),
}

impl<T> Fact<T> {
    #[must_use]
    pub const fn is_absent(&self) -> bool {
        matches!(self, Self::Absent)
    }

    #[must_use]
    pub const fn is_present(&self) -> bool {
        matches!(self, Self::Present(_))
    }

    /// `Ok(Some)` is present, `Ok(None)` absent, `Err` unknown.
    pub fn from_look(look: Result<Option<T>, Error>) -> Self {
        match look {
            Ok(Some(thing)) => Self::Present(thing),
            Ok(None) => Self::Absent,
            Err(error) => Self::Unknown(error.chain()),
        }
    }
}

/// Everything a plan may ask about one VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    /// The pinned image and the host's kernel are there and verified.
    pub image: Fact<()>,
    pub disk: Fact<()>,
    pub net: Fact<()>,
    /// The current incarnation's jail and process.
    pub vmm: Fact<VmmFact>,
    pub guest: GuestFact,
    /// Console logs and whatever else is kept of the VM beyond an incarnation.
    pub traces: Fact<()>,
    pub clients: Clients,
    /// Asked only of a VMM that has ended.
    pub last_words: LastWords,
    /// The host's boot id now.
    pub boot_id: String,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VmmFact {
    /// Jail made, no process yet.
    Prepared,
    /// Its process lives; `attached`: this daemon drains its console and can reach its guest.
    Running { attached: bool },
    /// It ran and is gone.
    Exited { how: VmmEnd },
    /// Something lives under its name that cannot be proven to be it: why, as one line. Nobody but its owner ends that.
    Unproven { why: String },
}

/// How a VMM's process ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VmmEnd {
    Code(i32),
    Signal(i32),
    /// Nobody saw it; what is known, in words.
    Unseen(String),
}

impl fmt::Display for VmmEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Code(code) => write!(f, "exit status {code}"),
            Self::Signal(signal) => write!(f, "killed by signal {signal}"),
            Self::Unseen(told) => f.write_str(told),
        }
    }
}

/// What the guest's kernel said last on its console. A guest can forge it, and deceives only its own restart policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LastWords {
    /// Nothing of its end.
    Nothing,
    /// It went down in order.
    Down,
    /// It gave up; in its own words, printable and cut short.
    Panic(String),
}

impl LastWords {
    /// How the line begins that drivers write between two boots' output.
    pub const BOOT: &str = "--- boot ";
    /// Longest part of a panic's line that is kept, characters.
    const MAX: usize = 200;

    /// The last that `console`'s lines tell of the end. Linux prints both with `pr_emerg`, whatever the log level:
    /// `kernel/panic.c` and `kernel/reboot.c`.
    #[must_use]
    pub fn of(console: &[String]) -> Self {
        let this_boot = console.iter().rev().take_while(|line| !line.starts_with(Self::BOOT));
        let told = this_boot.into_iter().find_map(|line| {
            if let Some(at) = line.find("Kernel panic - not syncing") {
                return Some(Self::Panic(line[at..].chars().take(Self::MAX).collect()));
            }
            let down = ["reboot: Restarting system", "reboot: Power down", "reboot: System halted"];
            down.iter().any(|words| line.contains(words)).then_some(Self::Down)
        });
        told.unwrap_or(Self::Nothing)
    }
}

/// What this daemon knows of the current incarnation's guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestFact {
    /// This daemon has not tried yet.
    NotAsked,
    /// Asked, and no answer so far.
    Silent,
    /// Hello was answered.
    Ready,
    /// Shutdown was asked for.
    ShuttingDown,
}

/// Clients that hold an exec of this VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Clients {
    Attached,
    /// None since then (since the daemon's start at the earliest).
    NoneSince(Timestamp),
    /// The exec that a `remove_when_done` VM was made for has ended.
    Done,
}
