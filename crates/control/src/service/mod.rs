//! The use cases, one file per verb. Each checks first, then writes intent in one transaction, then wakes the runner.
//!
//! - [`volume`] disks that outlive VMs
//! - `admit` what may be taken in · [`create`] · [`drain`] · [`read`] get, list, watch · [`intent`] start, stop, delete, time to live · [`exec`] · [`console`] · [`force`] the way
//!   out of quarantine

pub(crate) mod admit;
pub mod console;
pub mod create;
pub mod drain;
pub mod exec;
pub mod force;
pub mod intent;
pub mod read;
pub mod volume;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};

use clawpot_core::event::{About, Draft};
use clawpot_core::slot::next_free;
use clawpot_core::{Quarantine, VmRecord};
use clawpot_types::{Error, Kind, Result, Revision, Slot, VmId, VolumeId, VolumeName};
use tokio::sync::watch;
use tracing::warn;

use self::admit::Promise;
use crate::Deps;
use crate::live::Lives;
use crate::records::Records;
use crate::runner::Runner;
use crate::strays::Strays;

/// What the API calls. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Service {
    pub(crate) deps: Deps,
    pub(crate) records: Arc<Records>,
    pub(crate) lives: Arc<Lives>,
    pub(crate) strays: Arc<Strays>,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    /// Where the search for a free slot goes on.
    last_slot: Mutex<Option<Slot>>,
    /// Slots of which something was left by nobody knows whom: given to no VM.
    blocked: Mutex<BTreeSet<Slot>>,
    ledger: Arc<admit::Ledger>,
    /// Sizes of all volumes, MiB, those being made too: part of what is promised.
    volumes: Mutex<BTreeMap<VolumeId, u64>>,
    turns: Arc<volume::Turns>,
    /// Volumes that may not be as their records say, or of which a record may say what is over.
    volumes_in_doubt: Mutex<BTreeSet<VolumeName>>,
    /// VMs of which the store did not say whether a change was done.
    in_doubt: Mutex<BTreeSet<VmId>>,
    /// The server stops its VMs before it goes.
    draining: AtomicBool,
    leaving: watch::Sender<bool>,
    /// Runners and housekeeping.
    tasks: Mutex<Vec<tokio::task::JoinHandle<()>>>,
}

impl Service {
    pub(crate) fn new(deps: Deps, records: Arc<Records>) -> Self {
        let shared = Shared {
            last_slot: Mutex::new(None),
            blocked: Mutex::default(),
            in_doubt: Mutex::default(),
            ledger: Arc::default(),
            volumes: Mutex::default(),
            turns: Arc::default(),
            volumes_in_doubt: Mutex::default(),
            draining: AtomicBool::new(false),
            leaving: watch::channel(false).0,
            tasks: Mutex::new(Vec::new()),
        };
        Self { deps, records, lives: Arc::default(), strays: Arc::default(), shared: Arc::new(shared) }
    }

    #[must_use]
    pub const fn deps(&self) -> &Deps {
        &self.deps
    }

    #[must_use]
    pub const fn records(&self) -> &Arc<Records> {
        &self.records
    }

    /// Gives the VM its runner, if it is there and has none: at create, or at start of the daemon.
    pub(crate) fn run(&self, id: &VmId) {
        if self.records.get(id).is_none() {
            return;
        }
        let Some(wake) = self.lives.enter(id, self.deps.clock.now()) else { return };
        let runner = Runner {
            deps: self.deps.clone(),
            records: self.records.clone(),
            lives: self.lives.clone(),
            strays: self.strays.clone(),
            id: id.clone(),
            wake,
            leaving: self.shared.leaving.subscribe(),
        };
        self.keep_task(tokio::spawn(runner.run()));
    }

    /// Ends every runner after the step it is in. VMs stay as they are; the next daemon adopts them.
    pub async fn leave(&self) {
        self.shared.leaving.send_replace(true);
        let tasks = std::mem::take(&mut *self.shared.tasks.lock().unwrap_or_else(PoisonError::into_inner));
        for task in tasks {
            if let Err(error) = task.await {
                warn!(%error, "a runner or the housekeeping ended by panic");
            }
        }
    }

    /// Whether there may be machines that no record knows.
    #[must_use]
    pub fn may_have_strays(&self) -> bool {
        self.strays.left().is_none_or(|left| !left.is_empty())
    }

    fn unavailable(&self) -> BTreeSet<Slot> {
        let mut slots = self.records.slots_taken();
        slots.extend(self.shared.blocked.lock().unwrap_or_else(PoisonError::into_inner).iter());
        slots
    }

    pub(crate) fn block(&self, slots: &BTreeSet<Slot>) {
        self.shared.blocked.lock().unwrap_or_else(PoisonError::into_inner).extend(slots);
    }

    pub(crate) fn unblock(&self, slot: Slot) {
        self.shared.blocked.lock().unwrap_or_else(PoisonError::into_inner).remove(&slot);
    }

    /// Housekeeping ends with the runners.
    pub(crate) fn keep_house(&self, strays: BTreeSet<Slot>) {
        self.until_leaving(crate::keep::end_strays(self.clone(), strays));
        self.until_leaving(crate::keep::forget_requests(self.clone()));
    }

    /// A task that ends with the runners.
    fn until_leaving(&self, work: impl Future<Output = ()> + Send + 'static) {
        let mut leaving = self.shared.leaving.subscribe();
        self.keep_task(tokio::spawn(async move {
            tokio::select! {
                biased;
                // The sender is gone only when the daemon is: both mean leave.
                _ = leaving.wait_for(|leaving| *leaving) => {}
                () = work => {}
            }
        }));
    }

    fn keep_task(&self, task: tokio::task::JoinHandle<()>) {
        let mut tasks = self.shared.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        tasks.retain(|task| !task.is_finished());
        tasks.push(task);
    }

    fn volumes(&self) -> std::sync::MutexGuard<'_, BTreeMap<VolumeId, u64>> {
        self.shared.volumes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn turns(&self) -> &Arc<volume::Turns> {
        &self.shared.turns
    }

    fn volumes_in_doubt(&self) -> std::sync::MutexGuard<'_, BTreeSet<VolumeName>> {
        self.shared.volumes_in_doubt.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn in_doubt(&self) -> std::sync::MutexGuard<'_, BTreeSet<VmId>> {
        self.shared.in_doubt.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a change of `id` was done is not known, since the store did not say: asked until it does. A VM that is there
    /// gets its runner, and the runner is woken. What it was promised, others are not until then.
    pub(crate) fn find_out(&self, id: VmId, promise: Option<Promise>) {
        // One asks for all who were promised nothing.
        if !self.in_doubt().insert(id.clone()) && promise.is_none() {
            return;
        }
        let this = self.clone();
        self.until_leaving(async move {
            loop {
                tokio::time::sleep(this.deps.settings.limits.retry).await;
                // Before it is asked: what fails from now on is asked for anew.
                this.in_doubt().remove(&id);
                if this.records.refresh(&id).await.is_ok() {
                    this.run(&id);
                    drop(promise);
                    return this.lives.wake(&id);
                }
                this.in_doubt().insert(id.clone());
            }
        });
    }

    /// The next free slot; each call goes on from the last one's.
    fn next_slot(&self) -> Option<Slot> {
        let taken = self.unavailable();
        let mut last = self.shared.last_slot.lock().unwrap_or_else(PoisonError::into_inner);
        let slot = next_free(&taken, *last, self.deps.net.slots())?;
        *last = Some(slot);
        Some(slot)
    }

    /// Lets the network prepare the slots that will be asked for next.
    pub(crate) async fn warm(&self) {
        let mut taken = self.unavailable();
        let mut last = *self.shared.last_slot.lock().unwrap_or_else(PoisonError::into_inner);
        let mut next = Vec::new();
        while next.len() < self.deps.settings.warm_slots {
            let Some(slot) = next_free(&taken, last, self.deps.net.slots()) else { break };
            taken.insert(slot);
            last = Some(slot);
            next.push(slot);
        }
        self.deps.net.warm(&next).await;
    }
}

/// Runs `work` to its end, also when its caller goes away: a client's hang-up must not come between a commit and what
/// follows from it.
pub(crate) async fn to_its_end<T: Send + 'static>(work: impl Future<Output = Result<T>> + Send + 'static) -> Result<T> {
    let task = tokio::spawn(work);
    task.await.map_err(|error| Error::new(Kind::Internal, "the server's own task ended by panic").because(error))?
}

/// An event of `record` as it is written with it.
pub(crate) fn event(deps: &Deps, record: &VmRecord, kind: &'static str, message: String, actor: &str) -> Draft {
    Draft {
        time: deps.clock.now(),
        about: About::Vm { vm: record.id.clone(), name: record.name.clone(), incarnation: record.incarnation },
        kind,
        message,
        actor: actor.to_owned(),
    }
}

/// `error` with what the VM is quarantined for, if it is.
pub(crate) fn because_quarantined(record: &VmRecord, error: Error) -> Error {
    match &record.quarantine {
        Some(Quarantine { message, .. }) => error.because(message.clone()).hint(quarantine_hint(&record.name)),
        None => error,
    }
}

/// What to do about a VM whose machine cannot be proven to be its own.
#[must_use]
pub fn quarantine_hint(name: &clawpot_types::VmName) -> String {
    format!(
        "put its cgroup in order (others' processes out of it, its own back into it), or give the VM up with all of them: \
         clawpot rm --force {name}"
    )
}

/// `Row` or an error that says what is wrong with it.
pub(crate) fn known(id: &VmId, row: Option<crate::Row>) -> Result<(Revision, Arc<VmRecord>)> {
    match row {
        Some(crate::Row::Known { revision, record }) => Ok((revision, record)),
        Some(crate::Row::Unreadable { why, .. }) => {
            Err(Error::new(Kind::FailedPrecondition, format!("VM {id}: quarantined: {why}"))
                .hint(format!("restore the store from a backup, or give the VM up: clawpot rm --force {id}")))
        }
        None => Err(Error::new(Kind::NotFound, format!("VM {id}: it is gone"))),
    }
}
