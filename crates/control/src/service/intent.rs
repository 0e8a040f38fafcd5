//! Start, stop, delete, time to live: they change what is wanted, by compare-and-swap, and wake the runner.

use std::sync::Arc;

use clawpot_core::ports::Durability;
use clawpot_core::request::{Answer, Request, answer};
use clawpot_core::{Desired, Fact, VmRecord, VmmFact};
use clawpot_failpoint::{self as failpoint, Point};
use clawpot_types::{Error, Kind, Millis, Result, Revision, Timestamp, VmId};

use super::{Service, because_quarantined, event, known, to_its_end};
use crate::Deps;
use crate::records::Records;

/// Longest grace a stop may ask for.
const MAX_GRACE: Millis = Millis(3_600_000);

/// Longest time to live: a year. Whoever wants more wants `never`.
pub const MAX_TTL: Millis = Millis(365 * 24 * 3_600_000);

/// What a verb changes beside what is wanted.
type Set<'a> = &'a (dyn Fn(&mut VmRecord, Timestamp) + Send + Sync);

impl Service {
    pub async fn start(&self, vm: &str, actor: &str) -> Result<(Revision, Arc<VmRecord>)> {
        let set = |record: &mut VmRecord, now| {
            record.restart = record.restart.afresh();
            record.keep(record.ttl, now);
        };
        self.change(vm, Request::Start, Some(Desired::Running), set, actor).await
    }

    /// `grace`: for an orderly shutdown; 0 keeps the default.
    pub async fn stop(&self, vm: &str, grace: Millis, actor: &str) -> Result<(Revision, Arc<VmRecord>)> {
        if grace > MAX_GRACE {
            return Err(Error::new(Kind::InvalidArgument, format!("grace_ms: {}: at most {}", grace.0, MAX_GRACE.0)));
        }
        let set = move |record: &mut VmRecord, _| {
            record.restart = record.restart.afresh();
            if grace.0 > 0 {
                record.stop_grace = grace;
            }
        };
        self.change(vm, Request::Stop, Some(Desired::Stopped), set, actor).await
    }

    /// Keep-alive: from now on the VM has `ttl`, also after its next start; `None`: for ever.
    pub async fn keep(&self, vm: &str, ttl: Option<Millis>, actor: &str) -> Result<(Revision, Arc<VmRecord>)> {
        check_ttl(ttl)?;
        let set = move |record: &mut VmRecord, now| record.keep(ttl, now);
        self.change(vm, Request::Keep, None, set, actor).await
    }

    pub async fn delete(&self, vm: &str, force: bool, actor: &str) -> Result<VmId> {
        let id = self.records.find(vm)?;
        if force && let Some(crate::Row::Unreadable { revision, .. }) = self.records.get(&id) {
            let (this, actor) = (self.clone(), actor.to_owned());
            return to_its_end(async move { this.force(&id, revision, &actor).await.map(|()| id) }).await;
        }
        let request = if force { Request::Force } else { Request::Delete };
        let set = move |record: &mut VmRecord, _| {
            if force {
                // Its guest is not asked to unmount its volumes.
                record.stop_grace = Millis(0);
            }
        };
        let (_, record) = self.change(id.as_str(), request, Some(Desired::Deleted), set, actor).await?;
        if force {
            self.end_strangers(&record).await?;
            self.end_strays_of(&record).await?;
        }
        Ok(id)
    }

    /// Of a machine whose processes cannot be told to be its own nothing is touched, except on this word.
    async fn end_strangers(&self, record: &VmRecord) -> Result<()> {
        let Some(choice) = &record.vmm else { return Ok(()) };
        let vmm = self.deps.vmms.get(choice.kind)?;
        if let Fact::Unknown(why) | Fact::Present(VmmFact::Unproven { why }) = vmm.inspect(&record.machine()).await {
            tracing::warn!(vm = %record.id, why, "ended by force");
            vmm.stop(&record.machine()).await?;
            self.lives.wake(&record.id);
        }
        Ok(())
    }

    /// Likewise of machines of its other incarnations, beside which its slot is never given up.
    async fn end_strays_of(&self, record: &VmRecord) -> Result<()> {
        let found = self.strays.left().unwrap_or_default();
        for vmm in self.deps.vmms.iter() {
            for machine in found.iter().filter(|machine| machine.vm == record.id) {
                if vmm.inspect(machine).await.is_absent() {
                    continue;
                }
                tracing::warn!(%machine, "ended by force");
                vmm.stop(machine).await?;
            }
        }
        Ok(())
    }

    /// `desired`: what is wanted from now on; `None` leaves it, and the generation, as it is.
    async fn change(
        &self,
        vm: &str,
        request: Request,
        desired: Option<Desired>,
        set: impl Fn(&mut VmRecord, Timestamp) + Send + Sync + 'static,
        actor: &str,
    ) -> Result<(Revision, Arc<VmRecord>)> {
        let id = self.records.find(vm)?;
        let (this, actor) = (self.clone(), actor.to_owned());
        to_its_end(async move { this.change_until_written(&id, request, desired, &set, &actor).await }).await
    }

    async fn change_until_written(
        &self,
        id: &VmId,
        request: Request,
        desired: Option<Desired>,
        set: Set<'_>,
        actor: &str,
    ) -> Result<(Revision, Arc<VmRecord>)> {
        loop {
            let (revision, record) = known(id, self.records.get(id))?;
            match answer(request, record.phase, record.desired) {
                Answer::Ignore => return Ok((revision, record)),
                Answer::Deny(why) => {
                    let what = format!("VM {}: cannot {} it: {why}", record.name, request.verb());
                    return Err(because_quarantined(&record, Error::new(Kind::FailedPrecondition, what)));
                }
                Answer::Accept | Answer::Await => {}
            }
            if request == Request::Start {
                self.check_stays(&format!("VM {}: start", record.name))?;
            }
            // Kept until it is written down.
            let promise = match request {
                Request::Start => self.admit_start(&record).await?,
                _ => None,
            };
            let mut asked = (*record).clone();
            set(&mut asked, self.deps.clock.now());
            if request == Request::Force && record.desired == Desired::Deleted && asked == *record {
                return Ok((revision, record));
            }
            let done = match desired {
                Some(desired) => set_desired(&self.deps, &self.records, (revision, asked), desired, actor).await,
                None => set_life(&self.deps, &self.records, (revision, asked), actor).await,
            };
            match done {
                Ok(Some(done)) => {
                    self.lives.wake(id);
                    return Ok(done);
                }
                Ok(None) => {}
                Err(error) => {
                    self.find_out(id.clone(), promise);
                    return Err(error);
                }
            }
        }
    }
}

pub(super) fn check_ttl(ttl: Option<Millis>) -> Result<()> {
    match ttl {
        Some(ttl) if !(1..=MAX_TTL.0).contains(&ttl.0) => {
            let what = format!("ttl_ms: {}: must be 1 to {} (a year)", ttl.0, MAX_TTL.0);
            Err(Error::new(Kind::InvalidArgument, what).hint("leave it out for no limit"))
        }
        _ => Ok(()),
    }
}

/// Changes what is wanted of the VM. `None`: somebody changed it meanwhile.
pub(crate) async fn set(
    deps: &Deps,
    records: &Records,
    (revision, record): (Revision, &VmRecord),
    desired: Desired,
    actor: &str,
) -> Result<Option<(Revision, Arc<VmRecord>)>> {
    set_desired(deps, records, (revision, record.clone()), desired, actor).await
}

async fn set_desired(
    deps: &Deps,
    records: &Records,
    (revision, mut record): (Revision, VmRecord),
    desired: Desired,
    actor: &str,
) -> Result<Option<(Revision, Arc<VmRecord>)>> {
    record.desired = desired;
    record.intent_by = actor.to_owned();
    record.generation = record.generation.next();
    let kind = match desired {
        Desired::Running => "vm.start",
        Desired::Stopped => "vm.stop",
        Desired::Deleted => "vm.delete",
    };
    let told = event(deps, &record, kind, format!("generation {}", record.generation), actor);
    let Some(revision) = records.swap(revision, record.clone(), vec![told], Durability::Full).await? else {
        return Ok(None);
    };
    failpoint::reached(Point::Intended);
    Ok(Some((revision, Arc::new(record))))
}

/// Writes down how long the VM lives. No change of intent: a VM that failed is not asked for again.
async fn set_life(
    deps: &Deps,
    records: &Records,
    (revision, record): (Revision, VmRecord),
    actor: &str,
) -> Result<Option<(Revision, Arc<VmRecord>)>> {
    let message = match record.ttl {
        Some(ttl) => format!("time to live: {} s from now", std::time::Duration::from(ttl).as_secs_f64()),
        None => "time to live: for ever".to_owned(),
    };
    let told = event(deps, &record, "vm.ttl", message, actor);
    let Some(revision) = records.swap(revision, record.clone(), vec![told], Durability::Full).await? else {
        return Ok(None);
    };
    failpoint::reached(Point::Intended);
    Ok(Some((revision, Arc::new(record))))
}
