//! Goal: nothing of the VM exists. Wins from any phase, and never gives up.

use std::time::Duration;

use clawpot_types::Millis;

use super::{Next, Step, View};
use crate::{Fact, Phase};

pub(super) fn plan(view: &View<'_>) -> Next {
    if view.record.phase != Phase::Deleting {
        return Next::Become { phase: Phase::Deleting, limit: unmounting(view) };
    }
    // Who deletes by force, also after all, waits for no guest.
    let asked = if view.record.stop_grace == Millis(0) { None } else { view.ask_down() };
    if let Some(next) = asked.or_else(|| view.tear_down()) {
        return next;
    }
    for (fact, step) in [(&view.facts.disk, Step::RemoveDisk), (&view.facts.traces, Step::RemoveTraces)] {
        match fact {
            Fact::Present(()) => return Next::Do(step),
            Fact::Unknown(_) => return view.look_again(),
            Fact::Absent => {}
        }
    }
    Next::Forget
}

/// How long the guest has to write to its volumes what it has only in its memory: they outlive the VM. `None`: it has nothing to
/// write, or cannot be asked.
fn unmounting(view: &View<'_>) -> Option<Duration> {
    let record = view.record;
    match record.phase {
        _ if !record.spec.writes_volumes() => None,
        Phase::Running => Some(record.stop_grace.into()),
        // It was asked already; by force it has no more time.
        Phase::Stopping => record.deadline.map(|deadline| deadline.since(view.now).min(record.stop_grace.into())),
        _ => None,
    }
}
