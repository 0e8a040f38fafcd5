//! How a run of a VM ended, who ended it, and what follows: rest, failure, or another start by policy.
//!
//! | reason | phase then | `on-failure` starts it again | `always` |
//! |---|---|---|---|
//! | powered off by itself | Stopped | | yes |
//! | host rebooted | Stopped | yes, at once | yes, at once |
//! | guest panicked, VMM died, boot took too long | Failed | yes | yes |
//! | something failed | Failed | yes, unless repeating cannot help | likewise |
//! | stopped, time to live over | Stopped | | |
//! | deleted | gone | | |
//!
//! So `on-failure` is about what neither the owner nor the guest asked for.

use std::fmt;
use std::time::Duration;

use clawpot_types::{Error, Incarnation, Kind, Retry, Timestamp};
use serde::{Deserialize, Serialize};

use crate::plan::{Limits, Why};
use crate::{Desired, Phase, VmRecord};

/// Who ended a machine that nobody was asked to end.
pub const GUEST: &str = "guest";
pub const HOST: &str = "host";
pub const SERVER: &str = "server";

/// Whether a VM that ended is started again without being asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RestartPolicy {
    Never,
    OnFailure,
    Always,
}

impl RestartPolicy {
    pub const ALL: [Self; 3] = [Self::Never, Self::OnFailure, Self::Always];

    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Never => "never",
            Self::OnFailure => "on-failure",
            Self::Always => "always",
        }
    }

    /// Whether a VM that ended for `reason` is started again.
    #[must_use]
    pub const fn covers(self, reason: Reason) -> bool {
        match (self, reason) {
            (Self::Never, _) => false,
            (_, Reason::Stopped | Reason::TtlOver | Reason::Deleted) => false,
            (Self::OnFailure, Reason::PoweredOff) => false,
            (Self::OnFailure | Self::Always, _) => true,
        }
    }
}

/// The policy and where it stands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Restart {
    pub policy: RestartPolicy,
    /// Starts by policy since the VM was last well; each doubles the pause before the next.
    pub attempts: u32,
    /// When it is started again. `None`: nothing is due.
    pub at: Option<Timestamp>,
}

impl Restart {
    #[must_use]
    pub const fn new(policy: RestartPolicy) -> Self {
        Self { policy, attempts: 0, at: None }
    }

    /// As it is after the owner's own word.
    #[must_use]
    pub const fn afresh(&self) -> Self {
        Self::new(self.policy)
    }

    /// The pause before the next start: doubled each time, at most `restart_most`.
    #[must_use]
    pub fn pause(attempts: u32, limits: &Limits) -> Duration {
        let factor = 1u32.checked_shl(attempts).unwrap_or(u32::MAX);
        limits.restart_first.saturating_mul(factor).min(limits.restart_most)
    }
}

/// Why a machine ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// By the guest itself, in order.
    PoweredOff,
    GuestPanicked,
    /// Its process ended and nobody had asked for it.
    VmmDied,
    HostRebooted,
    /// No hello within the boot's limit.
    BootTimeout,
    /// A step of its start or of its life failed: the record's failure tells.
    Failed,
    /// Somebody asked for it.
    Stopped,
    TtlOver,
    Deleted,
}

impl Reason {
    pub const ALL: [Self; 9] = [
        Self::PoweredOff,
        Self::GuestPanicked,
        Self::VmmDied,
        Self::HostRebooted,
        Self::BootTimeout,
        Self::Failed,
        Self::Stopped,
        Self::TtlOver,
        Self::Deleted,
    ];

    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::PoweredOff => "powered-off",
            Self::GuestPanicked => "guest-panicked",
            Self::VmmDied => "vmm-died",
            Self::HostRebooted => "host-rebooted",
            Self::BootTimeout => "boot-timeout",
            Self::Failed => "failed",
            Self::Stopped => "stopped",
            Self::TtlOver => "ttl-over",
            Self::Deleted => "deleted",
        }
    }

    /// Where a VM comes to rest for this reason.
    #[must_use]
    pub const fn is_failure(self) -> bool {
        matches!(self, Self::GuestPanicked | Self::VmmDied | Self::BootTimeout | Self::Failed)
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The end of one incarnation. There is one for each; what is known first stands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    pub incarnation: Incarnation,
    pub at: Timestamp,
    pub reason: Reason,
    /// "uid=1000", [`GUEST`], [`HOST`] or [`SERVER`].
    pub by: String,
    /// For people, one line.
    pub message: String,
}

/// What ended a machine that should have gone on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cause {
    pub reason: Reason,
    pub by: &'static str,
    pub message: String,
    /// Whether starting it again can help.
    pub retry: Retry,
}

impl Cause {
    /// A step failed for good.
    #[must_use]
    pub fn step(error: &Error) -> Self {
        // A hint makes every error one to be fixed first; a policy has no hands, the kind decides.
        let hopeless = matches!(
            error.kind(),
            Kind::Corrupt | Kind::InvalidArgument | Kind::Unsupported | Kind::PermissionDenied | Kind::NotFound
        );
        let retry = if hopeless { Retry::Never } else { Retry::Later };
        Self { reason: Reason::Failed, by: SERVER, message: error.chain(), retry }
    }

    /// A plan gave up.
    #[must_use]
    pub fn of(why: &Why) -> Self {
        let (reason, by, message) = match why {
            Why::PoweredOff => (Reason::PoweredOff, GUEST, "the guest powered itself off or restarted".to_owned()),
            Why::GuestPanicked(words) => (Reason::GuestPanicked, GUEST, format!("the guest's kernel gave up: {words}")),
            Why::VmmExited(how) => (Reason::VmmDied, HOST, format!("the VMM ended by itself: {how}")),
            Why::VmmVanished => (Reason::VmmDied, HOST, "nothing is left of its machine".to_owned()),
            Why::HostRebooted => (Reason::HostRebooted, HOST, "the host was rebooted".to_owned()),
            Why::GuestSilent(limit) => {
                let what = format!("its guest did not answer within {} s", limit.as_secs());
                (Reason::BootTimeout, SERVER, what)
            }
            Why::DiskVanished => (Reason::Failed, HOST, "its disk is gone".to_owned()),
        };
        let retry = if *why == Why::DiskVanished { Retry::Never } else { Retry::Later };
        Self { reason, by, message, retry }
    }
}

impl VmRecord {
    /// `self` after its machine ended for `cause`: Failed, or on its way to Stopped; started again by policy or not. What is
    /// left of it is removed in either case. The failure's particulars are the caller's.
    #[must_use]
    pub fn ended(&self, cause: &Cause, now: Timestamp, limits: &Limits) -> Self {
        let mut next = self.clone();
        next.phase = if cause.reason.is_failure() { Phase::Failed } else { Phase::Stopping };
        let well = self.phase == Phase::Running && now.since(self.phase_since) >= limits.healthy;
        next.note_exit(cause.reason, cause.by, cause.message.clone(), now);
        next.phase_since = now;
        next.deadline = None;
        let again = cause.retry != Retry::Never && self.restart.policy.covers(cause.reason);
        next.restart.at = None;
        if well {
            next.restart.attempts = 0;
        }
        if !again {
            if next.phase == Phase::Stopping {
                // Nobody asks for it any more; whoever wants it back starts it.
                next.desired = Desired::Stopped;
            }
        } else if cause.reason == Reason::HostRebooted {
            // Not the VM's fault: no pause, and none the longer later.
            next.restart.at = Some(now);
        } else {
            next.restart.at = Some(now.after(Restart::pause(next.restart.attempts, limits)));
            next.restart.attempts = next.restart.attempts.saturating_add(1);
        }
        next
    }

    /// Writes down how the current incarnation ended, unless that is known already. Before the first there is nothing to end.
    /// Whether it was news.
    pub fn note_exit(&mut self, reason: Reason, by: &str, message: String, now: Timestamp) -> bool {
        let known = self.exit.as_ref().is_some_and(|exit| exit.incarnation == self.incarnation);
        if known || self.incarnation.0 == 0 {
            return false;
        }
        self.exit = Some(Exit { incarnation: self.incarnation, at: now, reason, by: by.to_owned(), message });
        true
    }

    /// As [`Self::note_exit`], for a machine that is ended because somebody said so, or because its time to live was over. Not before it
    /// is: until then a start takes it back.
    pub fn note_wish(&mut self, reason: Reason, now: Timestamp) -> bool {
        let by = self.intent_by.clone();
        // Whoever wanted something since said so in `intent_by`.
        if self.ttl.is_some() && self.expires_at.is_none() && by == SERVER {
            return self.note_exit(Reason::TtlOver, SERVER, "its time to live was over".to_owned(), now);
        }
        let message = format!("{} by {by}", if reason == Reason::Deleted { "deleted" } else { "stopped" });
        self.note_exit(reason, &by, message, now)
    }

    /// What is wanted once the time to live is over: the VM stops, or goes where it was to be removed when done.
    #[must_use]
    pub fn expired(&self) -> Self {
        let mut next = self.clone();
        next.desired = if self.remove_when_done { Desired::Deleted } else { Desired::Stopped };
        next.generation = self.generation.next();
        next.intent_by = SERVER.to_owned();
        next.restart = self.restart.afresh();
        next.expires_at = None;
        next
    }

    /// The moment at which it is over, counted from `now`.
    pub fn keep(&mut self, ttl: Option<clawpot_types::Millis>, now: Timestamp) {
        self.ttl = ttl;
        self.expires_at = ttl.map(|ttl| now.after(ttl.into()));
    }
}
