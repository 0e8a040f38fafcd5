//! Waiting until a VM is where it should be.

use std::time::Duration;

use clawpot_common::v1::{Desired, Phase, Vm, VmChange, WatchVmsRequest};
use tonic::{Code, Status};

use crate::api::{Api, Backoff, RECONNECT, is_lost};
use crate::failure::Failure;
use crate::view;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Goal {
    Phase(Phase),
    Gone,
    /// Gone, out of quarantine too.
    ForcedGone,
}

impl Goal {
    fn is_gone(self) -> bool {
        matches!(self, Self::Gone | Self::ForcedGone)
    }
}

/// One look at a change, seen from a goal.
#[derive(Debug)]
enum Verdict {
    Reached,
    Wait,
    Never(Failure),
}

/// A VM that is waited for.
#[derive(Debug)]
pub struct Wait<'a> {
    pub api: &'a Api,
    pub vm: &'a str,
    pub goal: Goal,
    /// The VM when the waiting was asked for: a failure it already had then is not news.
    pub before: Option<&'a Vm>,
}

impl Wait<'_> {
    /// Returns the VM once it is there (as it last was, when it is gone), or why it never will be. `look` sees every
    /// change on the way. A lost server is looked for again.
    pub async fn until_reached(&self, mut look: impl FnMut(&Vm)) -> Result<Vm, Failure> {
        let mut backoff = Backoff::new(RECONNECT);
        let mut last = self.before.cloned().unwrap_or_default();
        loop {
            let mut seen = |vm: &Vm| {
                // The server is there: the next loss gets all the time again.
                backoff = Backoff::new(RECONNECT);
                look(vm);
                last = vm.clone();
            };
            let lost = match self.attend(&mut seen).await {
                Ok(Verdict::Never(failure)) => return Err(failure),
                Ok(_) => return Ok(last),
                Err(status) => status,
            };
            if lost.code() == Code::NotFound && self.goal.is_gone() {
                return Ok(last);
            }
            match backoff.pause().filter(|_| is_lost(&lost)) {
                Some(pause) => tokio::time::sleep(pause).await,
                None => return Err(Failure::status(&format!("VM {}: waiting for it", self.vm), &lost)),
            }
        }
    }

    /// One stream of changes, until it decides or ends.
    async fn attend(&self, seen: &mut impl FnMut(&Vm)) -> Result<Verdict, Status> {
        let request = WatchVmsRequest { vm: self.vm.to_owned(), ..Default::default() };
        let mut changes = self.api.vms().watch_vms(request).await?.into_inner();
        while let Some(change) = changes.message().await? {
            if let Some(vm) = &change.vm {
                seen(vm);
            }
            match judge(self.goal, &change, self.before) {
                Verdict::Wait => {}
                decided => return Ok(decided),
            }
        }
        Err(Status::unavailable("the server closed the stream"))
    }

    /// As [`Self::until_reached`], for at most `limit`. Exit code 124 when it is over.
    pub async fn within(&self, limit: Option<Duration>, look: impl FnMut(&Vm)) -> Result<Vm, Failure> {
        let Some(limit) = limit else { return self.until_reached(look).await };
        match tokio::time::timeout(limit, self.until_reached(look)).await {
            Ok(result) => result,
            Err(_) => Err(Failure::new(format!("VM {}: not {} within {limit:?}", self.vm, name(self.goal))).code(124)),
        }
    }
}

fn name(goal: Goal) -> &'static str {
    match goal {
        Goal::Phase(phase) => view::vm::phase_name(phase),
        Goal::Gone | Goal::ForcedGone => "gone",
    }
}

fn judge(goal: Goal, change: &VmChange, before: Option<&Vm>) -> Verdict {
    let vm = change.vm.clone().unwrap_or_default();
    let never = |why: &str| Verdict::Never(Failure::new(format!("VM {}: {why}", view::vm::called(&vm))));
    if change.deleted {
        return if goal.is_gone() { Verdict::Reached } else { never("it was deleted meanwhile") };
    }
    if goal == Goal::Phase(vm.phase()) {
        return Verdict::Reached;
    }
    // An intent is recorded before the phase moves: what was so before is not the outcome.
    let old = before.is_some_and(|old| old.phase == vm.phase && old.phase_changed_at == vm.phase_changed_at);
    match (vm.phase(), goal) {
        (Phase::Quarantined, Goal::ForcedGone) => Verdict::Wait,
        (Phase::Quarantined, _) => Verdict::Never(view::vm::failure(&vm)),
        _ if old => Verdict::Wait,
        (Phase::Failed, Goal::Phase(_)) => Verdict::Never(view::vm::failure(&vm)),
        (Phase::Stopped, Goal::Phase(Phase::Running)) if vm.desired() == Desired::Stopped => {
            let why = vm.last_exit.as_ref().map(|exit| format!("it was stopped: {}", exit.message));
            never(why.as_deref().unwrap_or("it was stopped"))
        }
        (Phase::Deleting, Goal::Phase(_)) => never("it is being deleted"),
        _ => Verdict::Wait,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use prost_types::Timestamp;

    fn vm(phase: Phase, desired: Desired, second: i64) -> Vm {
        Vm {
            name: "web".into(),
            phase: phase.into(),
            desired: desired.into(),
            phase_changed_at: Some(Timestamp { seconds: second, nanos: 0 }),
            ..Default::default()
        }
    }

    fn verdict(goal: Goal, vm: Vm, before: Option<&Vm>) -> String {
        match judge(goal, &VmChange { vm: Some(vm), deleted: false }, before) {
            Verdict::Never(_) => "never".into(),
            other => format!("{other:?}").to_lowercase(),
        }
    }

    #[test]
    fn each_phase_is_judged_by_the_goal() {
        let (run, stop) = (Desired::Running, Desired::Stopped);
        let running = Goal::Phase(Phase::Running);
        assert_eq!(verdict(running, vm(Phase::Booting, run, 1), None), "wait");
        assert_eq!(verdict(running, vm(Phase::Running, run, 1), None), "reached");
        assert_eq!(verdict(running, vm(Phase::Failed, run, 1), None), "never");
        assert_eq!(verdict(running, vm(Phase::Stopped, run, 1), None), "wait");
        assert_eq!(verdict(running, vm(Phase::Stopped, stop, 1), None), "never");
        assert_eq!(verdict(running, vm(Phase::Deleting, run, 1), None), "never");
        assert_eq!(verdict(Goal::Gone, vm(Phase::Failed, run, 1), None), "wait");
        assert_eq!(verdict(Goal::Gone, vm(Phase::Quarantined, run, 1), None), "never");
        assert_eq!(verdict(Goal::Phase(Phase::Failed), vm(Phase::Failed, run, 1), None), "reached");
    }

    #[test]
    fn a_failure_from_before_the_start_is_not_its_outcome() {
        let before = vm(Phase::Failed, Desired::Running, 1);
        let running = Goal::Phase(Phase::Running);
        assert_eq!(verdict(running, before.clone(), Some(&before)), "wait");
        assert_eq!(verdict(running, vm(Phase::Failed, Desired::Running, 2), Some(&before)), "never");
    }
}
