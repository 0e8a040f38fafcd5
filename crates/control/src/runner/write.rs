//! Facts become the record's next revision, and an event.

use std::time::Duration;

use clawpot_core::event::Draft;
use clawpot_core::exit::{Cause, SERVER};
use clawpot_core::plan::Why;
use clawpot_core::ports::Durability;
use clawpot_core::{Exit, Failure, Phase, Reason, Timing, VmRecord};
use clawpot_failpoint::{self as failpoint, Point};
use clawpot_types::{Error, Kind, Result, Revision};
use tracing::{error, info, warn};

use super::Runner;
use crate::service::event;
use crate::service::volume::{releases, volumes_of};

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
                next.restart.at = None;
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
            Phase::Stopping => drop(next.note_wish(Reason::Stopped, now)),
            Phase::Deleting => drop(next.note_wish(Reason::Deleted, now)),
            _ => {}
        }
        next.phase = phase;
        next.phase_since = now;
        next.deadline = limit.map(|limit| now.after(limit));
        // Stopped is what a client waits for and was told.
        let durability = if phase == Phase::Stopped { Durability::Full } else { Durability::Normal };
        self.write(revision, record, next, durability, format!("{} → {phase}", record.phase)).await
    }

    /// Its machine ended and should not have.
    pub(super) async fn end(&self, revision: Revision, record: &VmRecord, why: &Why) -> Result<()> {
        self.ended(revision, record, &Cause::of(why), told(why, record)).await
    }

    /// A step failed for good.
    pub(super) async fn fail(&self, revision: Revision, record: &VmRecord, error: Error) -> Result<()> {
        self.ended(revision, record, &Cause::step(&error), error).await
    }

    async fn ended(&self, revision: Revision, record: &VmRecord, cause: &Cause, error: Error) -> Result<()> {
        let mut next = record.ended(cause, self.deps.clock.now(), &self.deps.settings.limits);
        if next.phase == Phase::Failed {
            let failure = self.failure(record, &error).await;
            error!(vm = %self.id, name = %record.name, during = %record.phase, cause = failure.message, "VM failed");
            next.failure = Some(failure);
        }
        let again = match next.restart.at {
            Some(at) => format!("; it is started again in {} s", at.since(next.phase_since).as_secs_f64()),
            None => String::new(),
        };
        let message = format!("{} → {}: {}{again}", record.phase, next.phase, error.chain());
        self.write(revision, record, next, Durability::Normal, message).await
    }

    /// With the console's last lines, which are likely to explain the VMM's end.
    async fn failure(&self, record: &VmRecord, cause: &Error) -> Failure {
        let tail = self.deps.console.tail(&record.id, TAIL_LINES).await;
        let console_tail = tail.unwrap_or_else(|unread| {
            warn!(vm = %self.id, error = unread.chain(), "reading the console of a failed VM");
            Vec::new()
        });
        Failure {
            during: record.phase,
            generation: record.generation,
            kind: cause.kind(),
            message: cause.chain(),
            hint: cause.next_step().map(str::to_owned),
            cleanup: cause.cleanup().map(Error::chain),
            console_tail,
        }
    }

    /// Its machine cannot be told from somebody else's.
    pub(super) async fn quarantine(&self, revision: Revision, record: &VmRecord, why: String) -> Result<()> {
        let next = record.quarantined(why.clone(), self.deps.clock.now());
        error!(vm = %self.id, name = %record.name, during = %record.phase, why, "VM quarantined: nothing is done to it");
        let message = format!("{} → {}: {why}", record.phase, next.phase);
        self.write(revision, record, next, Durability::Normal, message).await
    }

    /// Its machine can be told again, or nothing is left where it was.
    pub(super) async fn release(&self, revision: Revision, record: &VmRecord) -> Result<()> {
        let next = record.released(self.deps.clock.now());
        let message = format!("{} → {}: what is its own is known again", record.phase, next.phase);
        self.write(revision, record, next, Durability::Normal, message).await
    }

    /// Its time to live is over. The intent changes, the phase does not: as if its owner had asked.
    pub(super) async fn expire(&self, revision: Revision, record: &VmRecord) -> Result<()> {
        let next = record.expired();
        let wanted = format!("its time to live is over: {:?} from now on", next.desired).to_lowercase();
        let events = vec![event(&self.deps, &next, "vm.expire", wanted, SERVER)];
        info!(vm = %next.id, name = %next.name, "its time to live is over");
        if self.records.swap(revision, next, events, Durability::Full).await?.is_some() {
            failpoint::reached(Point::Expired);
        }
        Ok(())
    }

    /// `true` when the record is gone.
    pub(super) async fn forget(&self, revision: Revision, record: &VmRecord) -> Result<bool> {
        let gone = event(&self.deps, record, "vm.gone", "nothing of it is left".to_owned(), SERVER);
        let leases = match volumes_of(record).next() {
            Some(_) => releases(&self.deps, &record.id).await?,
            None => Vec::new(),
        };
        if self.records.forget(&record.id, revision, leases, vec![gone]).await?.is_none() {
            return Ok(false);
        }
        failpoint::reached(Point::Forgotten);
        info!(vm = %record.id, name = %record.name, "gone");
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
        let mut events = vec![event(&self.deps, &next, "vm.phase", message, SERVER)];
        events.extend(self.exit_event(before, &next));
        if self.records.swap(revision, next.clone(), events, durability).await?.is_some() {
            failpoint::reached(written(before, &next));
            info!(vm = %next.id, name = %next.name, from = %before.phase, to = %next.phase, "phase");
        }
        Ok(())
    }

    /// The end of an incarnation, where this change tells of it first.
    fn exit_event(&self, before: &VmRecord, next: &VmRecord) -> Option<Draft> {
        let Exit { reason, by, message, .. } = next.exit.as_ref().filter(|exit| before.exit.as_ref() != Some(exit))?;
        Some(event(&self.deps, next, "vm.exit", format!("{reason}: {message}"), by))
    }
}

/// What a change of phase is to whoever looks for a moment to die at.
fn written(before: &VmRecord, next: &VmRecord) -> Point {
    match (before.phase, next.phase) {
        (_, Phase::Quarantined) => Point::Quarantined,
        (Phase::Quarantined, _) => Point::Released,
        (_, Phase::Preparing) if before.restart.at.is_some() => Point::RestartBegun,
        _ if next.restart.at.is_some() && before.restart.at.is_none() => Point::RestartPlanned,
        _ => Point::PhaseWritten,
    }
}

fn timing(record: &VmRecord, now: clawpot_types::Timestamp) -> Timing {
    let micros = u64::try_from(now.since(record.phase_since).as_micros()).unwrap_or(u64::MAX);
    Timing { name: record.phase.to_string(), micros }
}

/// A plan's reason in words.
fn told(why: &Why, record: &VmRecord) -> Error {
    let say = |kind, text: String| Error::new(kind, format!("VM {}: {text}", record.name));
    match why {
        Why::PoweredOff => say(Kind::Unavailable, "its guest powered itself off or restarted".to_owned()),
        Why::GuestPanicked(words) => say(Kind::Internal, format!("its guest's kernel gave up: {words}"))
            .hint(format!("the console may tell why: clawpot logs {}", record.name)),
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
