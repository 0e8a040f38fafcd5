//! One task per VM, the only writer of its phase:
//! `loop { look; plan; nothing → sleep until woken or due; a step → start it; look again; write the new phase down }`.
//!
//! - `look` asks the drivers · `act` runs one step · `write` turns what was seen into the record's next revision

mod act;
mod look;
mod write;

use std::sync::Arc;
use std::time::Duration;

use clawpot_core::plan::{AfterError, Next, Step, after_error};
use clawpot_core::{Desired, Fact, Facts, Phase, VmRecord, VmmFact, plan};
use clawpot_types::{Error, Revision, Timestamp, VmId};
use tokio::sync::{Notify, watch};
use tracing::{debug, info, warn};

use crate::live::Lives;
use crate::records::{Records, Row};
use crate::strays::Strays;
use crate::{Deps, service};

/// How long a step that had to be repeated rests first; doubled up to the limits' `retry`.
const FIRST_PAUSE: Duration = Duration::from_millis(5);

/// Deadlines are on the wall clock, which may be set, and which goes on while the host is suspended; a sleep knows nothing of
/// either. So late is a deadline at most.
const LONGEST_SLEEP: Duration = Duration::from_secs(60);

pub(crate) struct Runner {
    pub(crate) deps: Deps,
    pub(crate) records: Arc<Records>,
    pub(crate) lives: Arc<Lives>,
    pub(crate) strays: Arc<Strays>,
    pub(crate) id: VmId,
    pub(crate) wake: Arc<Notify>,
    /// Becomes true when the daemon goes; VMs stay.
    pub(crate) leaving: watch::Receiver<bool>,
}

/// What one turn of the loop leads to.
enum Turn {
    Again,
    /// Until woken, the machine exits, or then.
    Rest(Option<Timestamp>),
    /// As `Rest`, after a step that changed nothing yet: a little longer each time.
    Pause,
    Over,
}

impl Runner {
    pub(crate) async fn run(mut self) {
        let mut pause = FIRST_PAUSE;
        let mut last = None;
        let mut told = None;
        while !*self.leaving.borrow() {
            let Some(Row::Known { revision, record }) = self.records.get(&self.id) else { break };
            let facts = self.look(&record).await;
            self.lives.set_bare(&record.id, facts.vmm.is_absent());
            self.tell_unknown(&record, &facts, &mut told);
            match self.turn(revision, &record, &facts).await {
                // The same step for the same facts of the same record: what it did is not to be seen yet.
                Turn::Again if last.replace((revision, facts.clone())) == Some((revision, facts.clone())) => {
                    self.rest(&record, &facts, Some(pause)).await;
                    pause = (pause * 2).min(self.deps.settings.limits.retry);
                }
                Turn::Again => pause = FIRST_PAUSE,
                Turn::Rest(until) => {
                    pause = FIRST_PAUSE;
                    let limit = until.map(|until| until.since(self.deps.clock.now()).min(LONGEST_SLEEP));
                    self.rest(&record, &facts, limit).await;
                }
                Turn::Pause => {
                    self.rest(&record, &facts, Some(pause)).await;
                    pause = (pause * 2).min(self.deps.settings.limits.retry);
                }
                Turn::Over => break,
            }
        }
        if self.records.get(&self.id).is_none() {
            self.lives.leave(&self.id);
        }
    }

    /// A machine that cannot be looked at is let be until it can: whoever wonders why finds it in the log, once.
    fn tell_unknown(&self, record: &VmRecord, facts: &Facts, told: &mut Option<String>) {
        let why = match &facts.vmm {
            Fact::Unknown(why) => Some(why.clone()),
            _ => None,
        };
        if let Some(why) = why.as_ref().filter(|_| *told != why) {
            warn!(vm = %self.id, name = %record.name, phase = %record.phase, why, "nothing is done: what is there is not known");
        }
        *told = why;
    }

    async fn turn(&mut self, revision: Revision, record: &VmRecord, facts: &Facts) -> Turn {
        let next = plan(record, facts, self.deps.clock.now(), &self.deps.settings.limits);
        debug!(vm = %self.id, phase = %record.phase, ?next, "plan");
        let written = match next {
            Next::Do(Step::RemoveNet) | Next::Forget if !self.alone(record).await => return Turn::Again,
            Next::Do(step) => return self.take(step, revision, record).await,
            Next::Wait { until } => return Turn::Rest(until),
            Next::Become { phase, limit } => self.become_phase(revision, record, phase, limit).await,
            Next::End { why } => self.end(revision, record, &why).await,
            Next::Quarantine { why } => self.quarantine(revision, record, why).await,
            Next::Release => self.release(revision, record).await,
            Next::Expire => self.expire(revision, record).await,
            Next::Remove => self.remove(revision, record).await,
            Next::Forget => match self.forget(revision, record).await {
                Ok(true) => return Turn::Over,
                other => other.map(drop),
            },
        };
        match written {
            Ok(()) => Turn::Again,
            // Nothing was done: the store is full or gone, and while it is, nothing destructive happens.
            Err(error) => self.odd(record, "writing its record", &error),
        }
    }

    async fn take(&mut self, step: Step, revision: Revision, record: &VmRecord) -> Turn {
        let outcome = {
            let mut wake = self.wake.clone();
            let records = self.records.clone();
            let act = self.act(step, record);
            tokio::pin!(act);
            loop {
                tokio::select! {
                    biased;
                    outcome = &mut act => break outcome,
                    () = notified(&mut wake), if step.may_be_dropped() => {
                        if wants(&records, &self.id) != Some(record.desired) {
                            return Turn::Again;
                        }
                    }
                }
            }
        };
        match outcome {
            // What has to be seen to end, or may be answered "not yet", is not asked again at once.
            Ok(()) if matches!(step, Step::KillVmm) => Turn::Pause,
            Ok(()) => Turn::Again,
            Err(error) => match after_error(record, step, error.kind(), error.retry()) {
                AfterError::TryAgain if step == Step::SayHello => {
                    debug!(vm = %self.id, error = error.chain(), "no hello yet");
                    let pause = self.before_next_hello(record);
                    Turn::Rest(Some(self.deps.clock.now().after(pause)))
                }
                AfterError::TryAgain => self.odd(record, "step to be repeated", &error),
                AfterError::Fail => match self.fail(revision, record, error).await {
                    Ok(()) => Turn::Again,
                    Err(error) => self.odd(record, "writing its failure", &error),
                },
            },
        }
    }

    /// Whether a guest boots in 0.7 s or in 10, it is found within 3 % of its time, and asked some dozens of times. One that
    /// fell silent while it ran costs little.
    fn before_next_hello(&self, record: &VmRecord) -> Duration {
        let limits = &self.deps.settings.limits;
        if record.phase == Phase::Running {
            return limits.retry;
        }
        let waited = self.deps.clock.now().since(record.phase_since);
        (waited / 32).clamp(limits.hello_interval, limits.retry)
    }

    /// When no machine of the VM is left that its record does not know: until then the record keeps its slot, with the network that
    /// such a one is in and the uid that it has. `false`: there is reason to look again first.
    async fn alone(&self, record: &VmRecord) -> bool {
        let mut leaving = self.leaving.clone();
        let tell = |why: &str| info!(vm = %record.id, name = %record.name, why, "its slot is kept for now");
        let own = record.machine();
        tokio::select! {
            biased;
            // The sender is gone only when the daemon is: both mean leave.
            _ = leaving.wait_for(|leaving| *leaving) => false,
            () = self.wake.notified() => false,
            () = self.strays.out_of_the_way(&own, false, tell) => true,
        }
    }

    fn odd(&self, record: &VmRecord, doing: &str, error: &Error) -> Turn {
        warn!(vm = %self.id, name = %record.name, phase = %record.phase, error = error.chain(), "{doing}");
        Turn::Pause
    }

    /// Sleeps until woken, the machine ends, `limit` is over or the daemon leaves.
    async fn rest(&mut self, record: &VmRecord, facts: &Facts, limit: Option<Duration>) {
        let alive = matches!(facts.vmm, Fact::Present(VmmFact::Running { .. }));
        let exited = async {
            match record.vmm.as_ref().and_then(|choice| self.deps.vmms.get(choice.kind).ok()) {
                Some(vmm) if alive => vmm.exited(&record.machine()).await,
                _ => std::future::pending().await,
            }
        };
        let due = async {
            match limit {
                Some(limit) => tokio::time::sleep(limit).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            // The sender is gone only when the daemon is: both mean leave.
            _ = self.leaving.wait_for(|leaving| *leaving) => {}
            () = self.wake.notified() => {}
            () = exited => {}
            () = due => {}
        }
    }

    async fn remove(&self, revision: Revision, record: &VmRecord) -> Result<(), Error> {
        service::intent::set(&self.deps, &self.records, (revision, record), Desired::Deleted, "server").await.map(drop)
    }
}

async fn notified(wake: &mut Arc<Notify>) {
    wake.notified().await;
}

fn wants(records: &Records, id: &VmId) -> Option<Desired> {
    match records.get(id) {
        Some(Row::Known { record, .. }) => Some(record.desired),
        _ => None,
    }
}
