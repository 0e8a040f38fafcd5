//! Facts become the record's next revision, and an event.

use std::time::Duration;

use clawpot_core::event::Event;
use clawpot_core::plan::Why;
use clawpot_core::ports::Durability;
use clawpot_core::{Failure, Phase, Timing, VmRecord};
use clawpot_failpoint::{self as failpoint, Point};
use clawpot_types::{Error, Kind, Result, Revision};
use tracing::{error, info, warn};

use super::Runner;

/// Console lines kept with a failure.
const TAIL_LINES: usize = 20;

impl Runner {
    pub(super) async fn become_phase(
        &self,
        revision: Revision,
        record: &VmRecord,
        phase: Phase,
        limit: Option<Duration>,
    ) -> Result<()> {
        let now = self.deps.clock.now();
        let mut next = record.clone();
        match phase {
            Phase::Preparing => {
                next.incarnation = record.incarnation.next();
                next.boot_id = self.deps.boot_id.clone();
                next.vmm = Some(self.deps.vmms.default().capabilities().choice());
                next.address = Some(self.deps.net.seat(record.slot)?.address);
                next.failure = None;
                next.timings.clear();
                // A stopped VM's wait for its next start is no part of the boot.
                if record.phase == Phase::Accepted {
                    next.timings.push(timing(record, now));
                }
            }
            Phase::Booting => {
                next.disk_made = true;
                next.timings.push(timing(record, now));
            }
            Phase::Running => {
                next.timings.push(timing(record, now));
                next.timings.extend(self.lives.hello(&record.id));
            }
            _ => {}
        }
        next.phase = phase;
        next.phase_since = now;
        next.deadline = limit.map(|limit| now.after(limit));
        // Stopped is what a client waits for and was told.
        let durability = if phase == Phase::Stopped { Durability::Full } else { Durability::Normal };
        self.write(revision, record, next, durability, format!("{} → {phase}", record.phase)).await
    }

    /// Failed, with the console's last lines, which the VMM's end is likely to explain.
    pub(super) async fn fail(&self, revision: Revision, record: &VmRecord, cause: Error) -> Result<()> {
        let tail = self.deps.console.tail(&record.id, TAIL_LINES).await;
        let console_tail = tail.unwrap_or_else(|unread| {
            warn!(vm = %self.id, error = unread.chain(), "reading the console of a failed VM");
            Vec::new()
        });
        let failure = Failure {
            during: record.phase,
            generation: record.generation,
            kind: cause.kind(),
            message: cause.chain(),
            hint: cause.next_step().map(str::to_owned),
            cleanup: cause.cleanup().map(Error::chain),
            console_tail,
        };
        error!(vm = %self.id, name = %record.name, during = %record.phase, cause = failure.message, "VM failed");
        let message = format!("{} → failed: {}", record.phase, failure.message);
        let mut next = record.clone();
        next.phase = Phase::Failed;
        next.phase_since = self.deps.clock.now();
        next.deadline = None;
        next.failure = Some(failure);
        self.write(revision, record, next, Durability::Normal, message).await
    }

    /// `true` when the record is gone.
    pub(super) async fn forget(&self, revision: Revision, record: &VmRecord) -> Result<bool> {
        let Some(revision) = self.records.forget(&record.id, revision).await? else { return Ok(false) };
        failpoint::reached(Point::Forgotten);
        info!(vm = %record.id, name = %record.name, "gone");
        self.lives.leave(&record.id);
        self.event(revision, record, "vm.gone", "nothing of it is left".to_owned()).await;
        Ok(true)
    }

    /// A conflict is no error: the next look starts from what is there now.
    async fn write(
        &self,
        revision: Revision,
        before: &VmRecord,
        next: VmRecord,
        durability: Durability,
        message: String,
    ) -> Result<()> {
        if let Some(revision) = self.records.swap(revision, next.clone(), durability).await? {
            failpoint::reached(Point::PhaseWritten);
            info!(vm = %next.id, name = %next.name, from = %before.phase, to = %next.phase, "phase");
            self.event(revision, &next, "vm.phase", message).await;
        }
        Ok(())
    }

    async fn event(&self, id: Revision, record: &VmRecord, kind: &str, message: String) {
        let event = Event {
            id,
            time: self.deps.clock.now(),
            vm: record.id.clone(),
            name: record.name.clone(),
            incarnation: record.incarnation,
            kind: kind.to_owned(),
            message,
            actor: "server".to_owned(),
        };
        if let Err(error) = self.deps.events.append(vec![event]).await {
            warn!(vm = %record.id, error = error.chain(), "writing an event");
        }
    }
}

fn timing(record: &VmRecord, now: clawpot_types::Timestamp) -> Timing {
    let micros = u64::try_from(now.since(record.phase_since).as_micros()).unwrap_or(u64::MAX);
    Timing { name: record.phase.to_string(), micros }
}

/// A plan's reason in words.
pub(super) fn told(why: &Why, record: &VmRecord) -> Error {
    let say = |kind, text: String| Error::new(kind, format!("VM {}: {text}", record.name));
    match why {
        Why::VmmExited(how) => say(Kind::Internal, format!("the VMM ended by itself while {}: {how}", record.phase))
            .hint(format!("the console may tell why: clawpot logs {}", record.name)),
        Why::VmmVanished => say(Kind::Internal, format!("nothing is left of its machine, which was {}", record.phase))
            .hint(format!("start it again: clawpot start {}", record.name)),
        Why::HostRebooted => say(Kind::Unavailable, "the host was rebooted while it ran".to_owned())
            .hint(format!("start it again: clawpot start {}", record.name)),
        Why::GuestSilent(limit) => say(Kind::Timeout, format!("its guest did not answer within {} s", limit.as_secs()))
            .hint(format!("the console may tell why: clawpot logs {}", record.name)),
        Why::DiskVanished => say(Kind::Corrupt, "its disk is gone; an empty one would hide that".to_owned())
            .hint("restore the disk from a backup, or delete the VM"),
    }
}
