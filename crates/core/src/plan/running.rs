//! Goal: the VM runs and its guest answers.

use super::{Next, Step, View, Why};
use crate::facts::{Clients, GuestFact};
use crate::{Fact, Phase, VmmFact};

pub(super) fn plan(view: &View<'_>) -> Next {
    match view.record.phase {
        Phase::Accepted | Phase::Stopped => view.tear_down().unwrap_or_else(|| begin(view)),
        Phase::Failed => failed(view),
        Phase::Preparing => preparing(view),
        Phase::Booting | Phase::Restoring => booting(view),
        Phase::Running => running(view),
        // Sleep and pause have no driver yet that would lead here; wait for whoever does.
        Phase::Paused | Phase::Sleeping | Phase::Asleep | Phase::Waking => Next::Wait { until: None },
        // Not reached: `plan` sends these elsewhere.
        Phase::Stopping | Phase::Deleting | Phase::Quarantined => Next::Wait { until: None },
    }
}

/// At once, or when the pause before a start by policy is over.
fn begin(view: &View<'_>) -> Next {
    match view.record.restart.at {
        Some(at) if view.now < at => Next::Wait { until: Some(at) },
        _ => view.become_phase(Phase::Preparing),
    }
}

/// A failed VM is cleaned up and rests, until its owner asks again or its policy does.
fn failed(view: &View<'_>) -> Next {
    if let Some(next) = view.tear_down() {
        return next;
    }
    if view.record.asked_since_failure() {
        return view.become_phase(Phase::Preparing);
    }
    if view.record.restart.at.is_some() {
        return begin(view);
    }
    served(view)
}

fn preparing(view: &View<'_>) -> Next {
    let facts = view.facts;
    if view.rebooted {
        return Next::End { why: Why::HostRebooted };
    }
    // Steps in the order in which each needs the one before.
    for (fact, step) in
        [(&facts.image, Step::EnsureImage), (&facts.disk, Step::CreateDisk), (&facts.net, Step::EnsureNet)]
    {
        match fact {
            Fact::Present(()) => {}
            Fact::Absent if step == Step::CreateDisk && view.record.disk_made => {
                return Next::End { why: Why::DiskVanished };
            }
            Fact::Absent => return Next::Do(step),
            Fact::Unknown(_) => return view.look_again(),
        }
    }
    match &facts.vmm {
        Fact::Absent => Next::Do(Step::PrepareVmm),
        Fact::Present(VmmFact::Prepared) => Next::Become { phase: Phase::Booting, limit: Some(view.limits.boot) },
        // Cannot have been started before Booting was written down: not ours to adopt.
        Fact::Present(VmmFact::Running { .. }) => Next::Do(Step::KillVmm),
        Fact::Present(VmmFact::Exited { .. }) => Next::Do(Step::DestroyVmm),
        Fact::Unknown(_) | Fact::Present(VmmFact::Unproven { .. }) => view.look_again(),
    }
}

fn booting(view: &View<'_>) -> Next {
    match &view.facts.vmm {
        _ if view.rebooted => Next::End { why: Why::HostRebooted },
        Fact::Present(VmmFact::Prepared) if view.overdue() => give_up(view),
        Fact::Present(VmmFact::Prepared) => Next::Do(Step::StartVmm),
        Fact::Present(VmmFact::Running { attached: false }) => Next::Do(Step::AttachVmm),
        Fact::Present(VmmFact::Running { attached: true }) => match view.facts.guest {
            GuestFact::Ready => view.become_phase(Phase::Running),
            // After a restart of the daemon the guest may long be up: it is asked once, however late it is.
            GuestFact::NotAsked => Next::Do(Step::SayHello),
            _ if view.overdue() => give_up(view),
            _ => Next::Do(Step::SayHello),
        },
        Fact::Present(VmmFact::Exited { how }) => view.exited(how, false),
        Fact::Absent => Next::End { why: Why::VmmVanished },
        Fact::Unknown(_) | Fact::Present(VmmFact::Unproven { .. }) => view.look_again(),
    }
}

fn give_up(view: &View<'_>) -> Next {
    Next::End { why: Why::GuestSilent(view.limits.boot) }
}

fn running(view: &View<'_>) -> Next {
    match &view.facts.vmm {
        _ if view.rebooted => Next::End { why: Why::HostRebooted },
        Fact::Present(VmmFact::Running { attached: false }) => Next::Do(Step::AttachVmm),
        Fact::Present(VmmFact::Running { attached: true }) => {
            let rest = served(view);
            match view.facts.guest {
                // After a restart of the daemon. Nobody waits for the guest of a VM that has served.
                GuestFact::NotAsked | GuestFact::Silent if rest != Next::Remove => Next::Do(Step::SayHello),
                _ => rest,
            }
        }
        Fact::Present(VmmFact::Exited { how }) => view.exited(how, true),
        Fact::Present(VmmFact::Prepared) | Fact::Absent => Next::End { why: Why::VmmVanished },
        Fact::Unknown(_) | Fact::Present(VmmFact::Unproven { .. }) => view.look_again(),
    }
}

/// Nothing is left to do, but for a `remove_when_done` VM that has served: it goes.
pub(super) fn served(view: &View<'_>) -> Next {
    match view.facts.clients {
        _ if !view.record.remove_when_done => Next::Wait { until: None },
        Clients::Attached => Next::Wait { until: None },
        Clients::Done => Next::Remove,
        Clients::NoneSince(since) => {
            // Nobody could attach to it while it booted.
            let until = since.max(view.record.phase_since).after(view.limits.abandoned);
            if view.now >= until { Next::Remove } else { Next::Wait { until: Some(until) } }
        }
    }
}
