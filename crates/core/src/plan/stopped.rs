//! Goal: no process, no network; the disk stays.

use super::{Next, View, running};
use crate::Phase;

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
    view.ask_down().or_else(|| view.tear_down()).unwrap_or_else(|| view.become_phase(Phase::Stopped))
}
