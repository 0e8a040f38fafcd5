//! What a look at the host tells. `Unknown` is never taken for `Absent`.

use clawpot_types::{Error, Timestamp};

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
    /// The host's boot id now.
    pub boot_id: String,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VmmFact {
    /// Jail made, no process yet.
    Prepared,
    /// Its process lives; `attached`: this daemon drains its console and can reach its guest.
    Running { attached: bool },
    /// It ran and is gone; how, when known ("exit status 1", "killed by signal 9").
    Exited { how: String },
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
