//! Record × facts → the one next step. Planning is by goal:
//! [`running`], [`stopped`], [`deleted`]; each is a table from what is seen to what is done next.
//!
//! Architecture Invariant: a step *starts* something and returns; the loop between looks does the waiting, with deadlines
//! kept in the record. Architecture Invariant: no plan treats `Unknown` as `Absent`.

mod deleted;
mod running;
mod stopped;

use std::time::Duration;

use clawpot_types::{Kind, Retry, Timestamp};

use crate::facts::GuestFact;
use crate::{Desired, Fact, Facts, LastWords, Phase, VmRecord, VmmEnd, VmmFact};

/// An effect. Each is idempotent and is named from the record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Step {
    /// Verify the image's and the kernel's digests.
    EnsureImage,
    CreateDisk,
    EnsureNet,
    PrepareVmm,
    StartVmm,
    /// Drain the console, open the way to the guest.
    AttachVmm,
    SayHello,
    AskShutdown,
    KillVmm,
    /// Remove jail and cgroup of the current incarnation; logs stay.
    DestroyVmm,
    RemoveNet,
    RemoveDisk,
    RemoveTraces,
}

impl Step {
    pub const ALL: [Self; 13] = [
        Self::EnsureImage,
        Self::CreateDisk,
        Self::EnsureNet,
        Self::PrepareVmm,
        Self::StartVmm,
        Self::AttachVmm,
        Self::SayHello,
        Self::AskShutdown,
        Self::KillVmm,
        Self::DestroyVmm,
        Self::RemoveNet,
        Self::RemoveDisk,
        Self::RemoveTraces,
    ];

    /// Whether the runner may drop the step half-way when the owner changes their mind.
    /// The others are short, and leave less to find when they are let finish.
    #[must_use]
    pub const fn may_be_dropped(self) -> bool {
        matches!(self, Self::EnsureImage | Self::SayHello | Self::AskShutdown)
    }
}

/// What the runner does next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next {
    Do(Step),
    /// Write the new phase down; `limit`: how long it may take.
    Become {
        phase: Phase,
        limit: Option<Duration>,
    },
    /// Its machine ended and should not have: [`VmRecord::ended`] says what follows.
    End {
        why: Why,
    },
    /// A `remove_when_done` VM has served: its intent becomes Deleted.
    Remove,
    /// Its time to live is over: [`VmRecord::expired`] says what is wanted then.
    Expire,
    /// Its machine cannot be proven to be its own: nothing is done to it.
    Quarantine {
        why: String,
    },
    /// Out of quarantine: [`VmRecord::released`].
    Release,
    /// Nothing of the VM exists any more: erase the record and what guards its slot and name.
    Forget,
    /// Until woken, or until then.
    Wait {
        until: Option<Timestamp>,
    },
}

/// Why a plan gives up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Why {
    /// The guest powered itself off, or restarted: to a VMM that is the same.
    PoweredOff,
    /// The guest's kernel gave up, in its own words.
    GuestPanicked(String),
    /// The VMM's process ended by itself.
    VmmExited(VmmEnd),
    /// The jail that the record speaks of is not there.
    VmmVanished,
    HostRebooted,
    /// No hello within the boot's limit.
    GuestSilent(Duration),
    /// The VM's disk is gone.
    DiskVanished,
}

/// Limits and intervals of planning. Each is a choice, not a measurement; all are far above what is seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// From the VMM's start to the guest's hello. TCG on a loaded two-core machine takes up to 30 s.
    pub boot: Duration,
    /// Between two attempts at a hello, at least.
    pub hello_interval: Duration,
    /// Before looking again at what could not be looked at, or repeating a failed step.
    pub retry: Duration,
    /// How long a `remove_when_done` VM stays when no client is attached.
    pub abandoned: Duration,
    /// Before the first start by policy; doubled for each further one.
    pub restart_first: Duration,
    /// The longest pause before a start by policy.
    pub restart_most: Duration,
    /// A VM that ran for so long is well: the next pause is a first one again.
    pub healthy: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            boot: Duration::from_secs(120),
            hello_interval: Duration::from_millis(20),
            retry: Duration::from_secs(1),
            abandoned: Duration::from_secs(60),
            restart_first: Duration::from_secs(1),
            restart_most: Duration::from_secs(300),
            healthy: Duration::from_secs(600),
        }
    }
}

/// The next thing to do for this VM. Total: every record and every set of facts has an answer.
#[must_use]
pub fn plan(record: &VmRecord, facts: &Facts, now: Timestamp, limits: &Limits) -> Next {
    let rebooted = record.phase.may_have_vmm()
        && record.incarnation.0 > 0
        && !record.boot_id.is_empty()
        && record.boot_id != facts.boot_id;
    let view = View { record, facts, now, limits, rebooted };
    // Whatever is wanted of it.
    match (&facts.vmm, record.phase) {
        (Fact::Present(VmmFact::Unproven { .. }) | Fact::Unknown(_), Phase::Quarantined) => return view.look_again(),
        (_, Phase::Quarantined) => return Next::Release,
        (Fact::Present(VmmFact::Unproven { why }), _) => return Next::Quarantine { why: why.clone() },
        _ => {}
    }
    let expires = record.expires_at.filter(|_| record.desired == Desired::Running);
    let next = match record.desired {
        _ if expires.is_some_and(|at| now >= at) => return Next::Expire,
        Desired::Deleted => deleted::plan(&view),
        // A stop once begun is finished; then the start begins afresh.
        Desired::Running if record.phase != Phase::Stopping => running::plan(&view),
        Desired::Running | Desired::Stopped => stopped::plan(&view),
    };
    match (next, expires) {
        (Next::Wait { until }, Some(at)) => Next::Wait { until: Some(until.map_or(at, |until| until.min(at))) },
        (next, _) => next,
    }
}

/// What to do after a step failed. Deleting never gives up; the rest gives up on what repeating cannot help.
#[must_use]
pub fn after_error(record: &VmRecord, step: Step, kind: Kind, retry: Retry) -> AfterError {
    let tearing_down = record.desired != Desired::Running || matches!(record.phase, Phase::Stopping | Phase::Failed);
    let harmless = match step {
        // The guest may not be up yet; the phase's deadline ends the attempts.
        Step::SayHello => !matches!(kind, Kind::FailedPrecondition | Kind::Corrupt | Kind::Unsupported),
        // Its grace runs out in any case.
        Step::AskShutdown => true,
        Step::AttachVmm => record.phase == Phase::Running,
        _ => false,
    };
    if tearing_down || harmless || (retry == Retry::Later && step == Step::EnsureImage) {
        AfterError::TryAgain
    } else {
        AfterError::Fail
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AfterError {
    TryAgain,
    Fail,
}

/// What the goals look at.
struct View<'a> {
    record: &'a VmRecord,
    facts: &'a Facts,
    now: Timestamp,
    limits: &'a Limits,
    /// The record's incarnation lived in an earlier boot of the host: none of its processes can be alive.
    rebooted: bool,
}

impl View<'_> {
    fn become_phase(&self, phase: Phase) -> Next {
        Next::Become { phase, limit: None }
    }

    fn look_again(&self) -> Next {
        Next::Wait { until: Some(self.now.after(self.limits.retry)) }
    }

    /// Why a machine ended whose guest had answered, or had not.
    fn exited(&self, how: &VmmEnd, answered: bool) -> Next {
        let why = match (&self.facts.last_words, how) {
            // Both VMMs end with 0 when the guest resets its machine, which a kernel that gives up does too.
            (LastWords::Panic(words), VmmEnd::Code(0) | VmmEnd::Unseen(_)) => Why::GuestPanicked(words.clone()),
            (_, VmmEnd::Code(0)) | (LastWords::Down, VmmEnd::Unseen(_)) if answered => Why::PoweredOff,
            _ => Why::VmmExited(how.clone()),
        };
        Next::End { why }
    }

    fn overdue(&self) -> bool {
        self.record.deadline.is_some_and(|deadline| self.now >= deadline)
    }

    /// Lets the guest end by itself until the record's deadline; `None`: it has, or has had its time.
    fn ask_down(&self) -> Option<Next> {
        let in_time = self.record.deadline.is_some_and(|deadline| self.now < deadline);
        let Fact::Present(VmmFact::Running { attached }) = self.facts.vmm else { return None };
        if self.rebooted || !in_time {
            return None;
        }
        Some(match (attached, self.facts.guest) {
            (false, _) => Next::Do(Step::AttachVmm),
            (true, GuestFact::ShuttingDown) => Next::Wait { until: self.record.deadline },
            (true, _) => Next::Do(Step::AskShutdown),
        })
    }

    /// Removes process, jail and network, in this order; `None` when none is left.
    fn tear_down(&self) -> Option<Next> {
        match &self.facts.vmm {
            Fact::Unknown(_) | Fact::Present(VmmFact::Unproven { .. }) => return Some(self.look_again()),
            Fact::Present(VmmFact::Running { .. }) => return Some(Next::Do(Step::KillVmm)),
            Fact::Present(VmmFact::Prepared | VmmFact::Exited { .. }) => return Some(Next::Do(Step::DestroyVmm)),
            Fact::Absent => {}
        }
        // The tap is closed only once the process is gone.
        match &self.facts.net {
            Fact::Unknown(_) => Some(self.look_again()),
            Fact::Present(()) => Some(Next::Do(Step::RemoveNet)),
            Fact::Absent => None,
        }
    }
}
