//! May I? Which request is accepted in which phase. Pure and exhaustive; `tests/request_table.rs` prints it whole.

use crate::{Desired, Phase};

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Request {
    Start,
    Stop,
    Delete,
    /// As delete, out of quarantine too.
    Force,
    Exec,
    /// Sets the time to live.
    Keep,
}

impl Request {
    pub const ALL: [Self; 6] = [Self::Start, Self::Stop, Self::Delete, Self::Force, Self::Exec, Self::Keep];

    #[must_use]
    pub const fn verb(self) -> &'static str {
        match self {
            Self::Start => "start",
            Self::Stop => "stop",
            Self::Delete | Self::Force => "delete",
            Self::Exec => "run a command in",
            Self::Keep => "set the time to live of",
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    Accept,
    /// It is so already, or on its way.
    Ignore,
    /// As accept, once the VM runs.
    Await,
    Deny(&'static str),
}

/// The answer to `request` for a VM in `phase` whose owner wants `desired`.
#[must_use]
pub const fn answer(request: Request, phase: Phase, desired: Desired) -> Answer {
    use Phase as P;
    match (request, phase, desired) {
        // Also of one that is being deleted: its guest may still be waited for.
        (Request::Force, _, _) => Answer::Accept,
        (Request::Delete, P::Quarantined, _) => Answer::Deny("it is quarantined; delete it with --force"),
        (_, P::Quarantined, _) => Answer::Deny("it is quarantined: its record or identity cannot be trusted"),
        (Request::Delete, _, Desired::Deleted) => Answer::Ignore,
        (Request::Delete, _, _) => Answer::Accept,
        (_, P::Deleting, _) | (_, _, Desired::Deleted) => Answer::Deny("it is being deleted"),
        (Request::Keep, _, _) => Answer::Accept,
        // Also one that its policy would start later: it is started now.
        (Request::Start, P::Failed | P::Stopped, _) => Answer::Accept,
        (Request::Start, _, Desired::Running) => Answer::Ignore,
        (Request::Start, _, Desired::Stopped) => Answer::Accept,
        (Request::Stop, P::Stopped, Desired::Stopped) => Answer::Ignore,
        (Request::Stop, _, Desired::Stopped) => Answer::Ignore,
        (Request::Stop, _, Desired::Running) => Answer::Accept,
        (Request::Exec, P::Running, Desired::Running) => Answer::Accept,
        (Request::Exec, P::Accepted | P::Preparing | P::Booting | P::Restoring | P::Waking, Desired::Running) => {
            Answer::Await
        }
        (Request::Exec, P::Stopped, Desired::Running) | (Request::Exec, P::Stopping, Desired::Running) => Answer::Await,
        (Request::Exec, P::Failed, _) => Answer::Deny("it has failed"),
        (Request::Exec, P::Paused | P::Sleeping | P::Asleep, _) => Answer::Deny("it is not running"),
        (Request::Exec, _, Desired::Stopped) => Answer::Deny("it is stopped or stopping"),
    }
}
