//! The phases of a VM and the edges between them.
//!
//! ```text
//!    ┌───────────┬────────────┬──────────┬──────────┬───────────┬─────────┬────► Failed
//!    │           │            │          │          │           │         │
//! Accepted ─► Preparing ─► Booting ─► Running ─► Sleeping ─► Asleep ─► Waking ─► Running
//!    │           │            │          │          │           │         │
//!    └───────────┴────────────┴──────────┴──────────┴───────────┴─────────┴────► Stopping ─► Stopped
//!
//! Stopped ─► Preparing ◄─ Failed  (start)       Running ⇄ Paused ─► Stopping      Sleeping ─► Running
//! Failed ─► Stopping ─► Failed                  Paused ─► Failed                  Restoring: as Booting
//! any ─► Deleting ─► (gone)                     any ─► Quarantined ─► any
//! ```
//! Any: but Deleting and Quarantined themselves. Quarantined: the machine's identity cannot be proven; once it can, or nothing is
//! left there, the VM is in the phase again that it came from. What has a record that cannot be read is shown as Quarantined
//! too, and no edge leads out. `tests/phase_edges.rs` reads this drawing.
//!
//! `phase` changes only on an observed fact; what the owner wants is [`crate::Desired`].

use std::fmt;

use serde::{Deserialize, Serialize};

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Recorded; nothing exists on the host.
    Accepted,
    /// Image verified, disk, network and jail being made.
    Preparing,
    /// The VMM was started; the guest has not said hello.
    Booting,
    /// As Booting, from a snapshot.
    Restoring,
    Running,
    Paused,
    Sleeping,
    /// Snapshot on disk, no memory held.
    Asleep,
    Waking,
    /// On the way to Stopped: the guest was asked, then the VMM is killed, network and jail are removed.
    Stopping,
    /// Disk and slot are kept, nothing else exists.
    Stopped,
    Deleting,
    /// See the record's failure. Disk and slot are kept; VMM and network are removed.
    Failed,
    /// Never destroyed automatically; keeps its slot.
    Quarantined,
}

impl Phase {
    pub const ALL: [Self; 14] = [
        Self::Accepted,
        Self::Preparing,
        Self::Booting,
        Self::Restoring,
        Self::Running,
        Self::Paused,
        Self::Sleeping,
        Self::Asleep,
        Self::Waking,
        Self::Stopping,
        Self::Stopped,
        Self::Deleting,
        Self::Failed,
        Self::Quarantined,
    ];

    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Accepted => "accepted",
            Self::Preparing => "preparing",
            Self::Booting => "booting",
            Self::Restoring => "restoring",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Sleeping => "sleeping",
            Self::Asleep => "asleep",
            Self::Waking => "waking",
            Self::Stopping => "stopping",
            Self::Stopped => "stopped",
            Self::Deleting => "deleting",
            Self::Failed => "failed",
            Self::Quarantined => "quarantined",
        }
    }

    /// Whether the drawing above has an edge from `self` to `to`.
    #[must_use]
    pub const fn may_become(self, to: Self) -> bool {
        use Phase as P;
        match (self, to) {
            (P::Quarantined, P::Quarantined) | (P::Deleting, P::Deleting) => false,
            (P::Quarantined, _) | (_, P::Quarantined) => true,
            (_, P::Deleting) => true,
            (P::Accepted, P::Preparing | P::Stopping | P::Failed) => true,
            (P::Preparing, P::Booting | P::Restoring | P::Stopping | P::Failed) => true,
            (P::Booting | P::Restoring, P::Running | P::Stopping | P::Failed) => true,
            (P::Running, P::Paused | P::Sleeping | P::Stopping | P::Failed) => true,
            (P::Paused, P::Running | P::Stopping | P::Failed) => true,
            (P::Sleeping, P::Asleep | P::Running | P::Stopping | P::Failed) => true,
            (P::Asleep, P::Waking | P::Stopping | P::Failed) => true,
            (P::Waking, P::Running | P::Stopping | P::Failed) => true,
            (P::Stopping, P::Stopped | P::Failed) => true,
            (P::Stopped, P::Preparing) => true,
            (P::Failed, P::Preparing | P::Stopping) => true,
            _ => false,
        }
    }

    /// A VMM process of the current incarnation may exist.
    #[must_use]
    pub const fn may_have_vmm(self) -> bool {
        !matches!(self, Self::Accepted | Self::Asleep | Self::Stopped)
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
