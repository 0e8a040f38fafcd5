//! Start, stop, delete: they change what is wanted, by compare-and-swap, and wake the runner.

use std::sync::Arc;

use clawpot_core::ports::Durability;
use clawpot_core::request::{Answer, Request, answer};
use clawpot_core::{Desired, VmRecord};
use clawpot_failpoint::{self as failpoint, Point};
use clawpot_types::{Error, Kind, Millis, Result, Revision, VmId};

use super::{Service, known, tell, to_its_end};
use crate::Deps;
use crate::records::Records;

/// Longest grace a stop may ask for.
const MAX_GRACE: Millis = Millis(3_600_000);

impl Service {
    pub async fn start(&self, vm: &str, actor: &str) -> Result<(Revision, Arc<VmRecord>)> {
        self.change(vm, Request::Start, Desired::Running, |_| {}, actor).await
    }

    /// `grace`: for an orderly shutdown; 0 keeps the default.
    pub async fn stop(&self, vm: &str, grace: Millis, actor: &str) -> Result<(Revision, Arc<VmRecord>)> {
        if grace > MAX_GRACE {
            return Err(Error::new(Kind::InvalidArgument, format!("grace_ms: {}: at most {}", grace.0, MAX_GRACE.0)));
        }
        let set = move |record: &mut VmRecord| {
            if grace.0 > 0 {
                record.stop_grace = grace;
            }
        };
        self.change(vm, Request::Stop, Desired::Stopped, set, actor).await
    }

    pub async fn delete(&self, vm: &str, force: bool, actor: &str) -> Result<VmId> {
        let id = self.records.find(vm)?;
        if force && let Some(crate::Row::Unreadable { revision, .. }) = self.records.get(&id) {
            let this = self.clone();
            return to_its_end(async move { this.force(&id, revision).await.map(|()| id) }).await;
        }
        self.change(id.as_str(), Request::Delete, Desired::Deleted, |_| {}, actor).await?;
        Ok(id)
    }

    async fn change(
        &self,
        vm: &str,
        request: Request,
        desired: Desired,
        set: impl Fn(&mut VmRecord) + Send + Sync + 'static,
        actor: &str,
    ) -> Result<(Revision, Arc<VmRecord>)> {
        let id = self.records.find(vm)?;
        let (this, actor) = (self.clone(), actor.to_owned());
        to_its_end(async move { this.change_until_written(&id, request, desired, set, &actor).await }).await
    }

    async fn change_until_written(
        &self,
        id: &VmId,
        request: Request,
        desired: Desired,
        set: impl Fn(&mut VmRecord) + Send + Sync,
        actor: &str,
    ) -> Result<(Revision, Arc<VmRecord>)> {
        loop {
            let (revision, record) = known(id, self.records.get(id))?;
            match answer(request, record.phase, record.desired) {
                Answer::Ignore => return Ok((revision, record)),
                Answer::Deny(why) => {
                    let what = format!("VM {}: cannot {} it: {why}", record.name, request.verb());
                    return Err(Error::new(Kind::FailedPrecondition, what));
                }
                Answer::Accept | Answer::Await => {}
            }
            let mut asked = (*record).clone();
            set(&mut asked);
            if let Some(done) = set_desired(&self.deps, &self.records, (revision, asked), desired, actor).await? {
                self.lives.wake(id);
                return Ok(done);
            }
        }
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
    record.generation = record.generation.next();
    let Some(revision) = records.swap(revision, record.clone(), Durability::Full).await? else { return Ok(None) };
    failpoint::reached(Point::Intended);
    let kind = match desired {
        Desired::Running => "vm.start",
        Desired::Stopped => "vm.stop",
        Desired::Deleted => "vm.delete",
    };
    tell(deps, revision, &record, kind, actor).await;
    Ok(Some((revision, Arc::new(record))))
}
