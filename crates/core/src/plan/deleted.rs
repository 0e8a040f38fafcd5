//! Goal: nothing of the VM exists. Wins from any phase, and never gives up.

use super::{Next, Step, View};
use crate::{Fact, Phase};

pub(super) fn plan(view: &View<'_>) -> Next {
    if view.record.phase != Phase::Deleting {
        return view.become_phase(Phase::Deleting);
    }
    if let Some(next) = view.tear_down() {
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
