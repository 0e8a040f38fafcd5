//! Goal: no process, no network; the disk stays.

use super::{Next, Step, View, running};
use crate::facts::GuestFact;
use crate::{Fact, Phase, VmmFact};

pub(super) fn plan(view: &View<'_>) -> Next {
    match view.record.phase {
        Phase::Stopped => view.tear_down().unwrap_or_else(|| running::served(view)),
        Phase::Stopping => stopping(view),
        // The guest is asked only where it had said hello; anything younger is killed at once.
        Phase::Running => Next::Become { phase: Phase::Stopping, limit: Some(view.record.stop_grace.into()) },
        _ => Next::Become { phase: Phase::Stopping, limit: Some(std::time::Duration::ZERO) },
    }
}

fn stopping(view: &View<'_>) -> Next {
    let alive = matches!(view.facts.vmm, Fact::Present(VmmFact::Running { .. }));
    if alive && !view.rebooted && !view.overdue() {
        return match (&view.facts.vmm, view.facts.guest) {
            (Fact::Present(VmmFact::Running { attached: false }), _) => Next::Do(Step::AttachVmm),
            (_, GuestFact::ShuttingDown) => Next::Wait { until: view.record.deadline },
            _ => Next::Do(Step::AskShutdown),
        };
    }
    view.tear_down().unwrap_or_else(|| view.become_phase(Phase::Stopped))
}
