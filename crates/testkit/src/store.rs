//! A state store and an event log in memory, with the same promises as the real ones (`conformance` runs on both).

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use clawpot_core::event::{Draft, Event, is_of_a_command};
use clawpot_core::ports::{
    BoxStream, Change, Entry, EventLog, Expect, Listing, Op, StateStore, Txn, TxnOutcome, Unreadable,
};
use clawpot_types::{Error, Kind, Result, Revision, Timestamp, VmId};
use futures_util::StreamExt as _;
use tokio::sync::Notify;

use crate::faults::{Faults, Line, Method};

/// How much the fake keeps.
#[derive(Clone, Copy, Debug)]
pub struct Kept {
    pub changes: usize,
    /// Of all kinds but those of commands.
    pub events: usize,
    pub execs: usize,
    pub events_age: Duration,
}

impl Default for Kept {
    fn default() -> Self {
        Self { changes: 8192, events: 20_000, execs: 10_000, events_age: Duration::from_secs(30 * 24 * 3600) }
    }
}

/// What it holds survives the daemon: the next one is given [`FakeStore::reopen`].
#[derive(Debug)]
pub struct FakeStore {
    line: Line,
    shared: Arc<Shared>,
    epoch: u64,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// At every commit.
    grew: Notify,
}

#[derive(Debug)]
struct State {
    kept: Kept,
    revision: u64,
    rows: BTreeMap<String, (Vec<u8>, u64)>,
    damaged: BTreeSet<String>,
    full: bool,
    changes: VecDeque<Change>,
    changes_floor: u64,
    /// In the order of writing, with their numbers in it.
    events: VecDeque<(u64, Event)>,
    /// How many of them are of commands.
    execs: usize,
    events_floor: u64,
    /// Events ever written.
    events_written: u64,
    /// The newest that is no longer kept.
    events_dropped: u64,
}

impl FakeStore {
    #[must_use]
    pub fn new(faults: &Arc<Faults>) -> Arc<Self> {
        Self::keeping(faults, Kept::default(), 1)
    }

    #[must_use]
    pub fn keeping(faults: &Arc<Faults>, kept: Kept, epoch: u64) -> Arc<Self> {
        let state = State {
            kept,
            revision: 0,
            rows: BTreeMap::new(),
            damaged: BTreeSet::new(),
            full: false,
            changes: VecDeque::new(),
            changes_floor: 0,
            events: VecDeque::new(),
            events_floor: 0,
            execs: 0,
            events_written: 0,
            events_dropped: 0,
        };
        let shared = Shared { state: Mutex::new(state), grew: Notify::new() };
        Arc::new(Self { line: faults.line(), shared: Arc::new(shared), epoch })
    }

    /// The same rows and events, for the daemon that lives now.
    #[must_use]
    pub fn reopen(&self, faults: &Arc<Faults>) -> Arc<Self> {
        Arc::new(Self { line: faults.line(), shared: Arc::clone(&self.shared), epoch: self.epoch })
    }

    /// The row is there and cannot be read from now on.
    pub fn damage(&self, key: &str) {
        self.shared.lock().damaged.insert(key.to_owned());
    }

    /// A full disk: what is there may be changed and deleted, nothing is added.
    pub fn set_full(&self, full: bool) {
        self.shared.lock().full = full;
    }

    /// Overwrites a row behind everyone's back, unchecked.
    pub fn scribble(&self, key: &str, value: &[u8]) {
        let mut state = self.shared.lock();
        let revision = state.revision;
        state.rows.insert(key.to_owned(), (value.to_vec(), revision));
    }

    /// Every key there is.
    #[must_use]
    pub fn keys(&self) -> Vec<String> {
        self.shared.lock().rows.keys().cloned().collect()
    }

    /// A row as it is, unchecked.
    #[must_use]
    pub fn row(&self, key: &str) -> Option<Vec<u8>> {
        self.shared.lock().rows.get(key).map(|(value, _)| value.clone())
    }

    /// Every event that is kept, in the order of writing.
    #[must_use]
    pub fn all_events(&self) -> Vec<Event> {
        self.shared.lock().events.iter().map(|(_, event)| event.clone()).collect()
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn grown(&self) {
        self.grew.notify_waiters();
    }
}

impl State {
    fn read(&self, key: &str) -> Option<Result<Entry>> {
        let (value, revision) = self.rows.get(key)?;
        if self.damaged.contains(key) || serde_json::from_slice::<serde_json::Value>(value).is_err() {
            return Some(Err(Error::new(Kind::Corrupt, format!("fake store: row {key}: damaged"))));
        }
        Some(Ok(Entry { key: key.to_owned(), value: value.clone(), revision: Revision(*revision) }))
    }

    fn txn(&mut self, txn: &Txn) -> Result<TxnOutcome> {
        check(txn)?;
        for guard in &txn.guards {
            let found = self.rows.get(&guard.key).map(|(_, revision)| Revision(*revision));
            let holds = match guard.expect {
                Expect::Absent => found.is_none(),
                Expect::Revision(revision) => found == Some(revision),
            };
            if !holds {
                return Ok(TxnOutcome::Conflict { key: guard.key.clone(), found });
            }
        }
        let adds = |op: &Op| matches!(op, Op::Put { key, .. } if !self.rows.contains_key(key));
        if self.full && txn.ops.iter().any(adds) {
            return Err(Error::new(Kind::Exhausted, "fake store: the disk is full"));
        }
        if !txn.ops.is_empty() || !txn.events.is_empty() {
            self.revision += 1;
            txn.ops.iter().for_each(|op| self.apply(op));
            txn.events.iter().for_each(|draft| self.append(draft));
            let floor = self.revision.saturating_sub(u64::try_from(self.kept.changes).unwrap_or(u64::MAX));
            self.changes_floor = self.changes_floor.max(floor);
            while self.changes.front().is_some_and(|change| change.revision.0 <= floor) {
                self.changes.pop_front();
            }
        }
        Ok(TxnOutcome::Committed(Revision(self.revision)))
    }

    fn apply(&mut self, op: &Op) {
        let revision = Revision(self.revision);
        match op {
            Op::Put { key, value } => {
                self.damaged.remove(key);
                self.rows.insert(key.clone(), (value.clone(), self.revision));
                self.changes.push_back(Change { key: key.clone(), value: Some(value.clone()), revision });
            }
            Op::Delete { key } => {
                self.damaged.remove(key);
                if self.rows.remove(key).is_some() {
                    self.changes.push_back(Change { key: key.clone(), value: None, revision });
                }
            }
        }
    }

    fn append(&mut self, draft: &Draft) {
        let event = draft.committed(Revision(self.revision));
        let too_old = Timestamp(event.time.0.saturating_sub(Timestamp(0).after(self.kept.events_age).0));
        self.events_written += 1;
        self.execs += usize::from(is_of_a_command(&event.kind));
        self.events.push_back((self.events_written, event));
        loop {
            let over = if self.events.front().is_some_and(|(_, event)| event.time < too_old) {
                Some(0)
            } else if self.execs > self.kept.execs {
                self.events.iter().position(|(_, event)| is_of_a_command(&event.kind))
            } else if self.events.len() - self.execs > self.kept.events {
                self.events.iter().position(|(_, event)| !is_of_a_command(&event.kind))
            } else {
                None
            };
            let Some((number, gone)) = over.and_then(|at| self.events.remove(at)) else { return };
            self.execs -= usize::from(is_of_a_command(&gone.kind));
            self.events_floor = self.events_floor.max(gone.id.0);
            self.events_dropped = self.events_dropped.max(number);
        }
    }
}

fn check(txn: &Txn) -> Result<()> {
    let refused = |text: String| Err(Error::new(Kind::InvalidArgument, text));
    let mut seen = BTreeSet::new();
    let keys = txn.ops.iter().map(|op| match op {
        Op::Put { key, .. } | Op::Delete { key } => key,
    });
    for key in keys.clone().chain(txn.guards.iter().map(|guard| &guard.key)) {
        if key.is_empty() || key.len() > 256 || !key.bytes().all(|byte| byte.is_ascii_graphic()) {
            return refused(format!("fake store: key {key:?}"));
        }
    }
    for key in keys {
        if !seen.insert(key) {
            return refused(format!("fake store: key {key} twice in one transaction"));
        }
    }
    let mut told = BTreeSet::new();
    if let Some(twice) = txn.events.iter().find(|event| !told.insert((event.about.id(), event.kind))) {
        return refused(format!("fake store: event {} of {} twice in one transaction", twice.kind, twice.about));
    }
    for op in &txn.ops {
        if let Op::Put { key, value } = op
            && (value.len() > 1 << 20 || serde_json::from_slice::<serde_json::Value>(value).is_err())
        {
            return refused(format!("fake store: value of {key} is not JSON, or too large"));
        }
    }
    Ok(())
}

#[async_trait]
impl StateStore for FakeStore {
    async fn get(&self, key: &str) -> Result<Option<Entry>> {
        self.line.call(Method::StoreGet, || self.shared.lock().read(key).transpose()).await
    }

    async fn list(&self, prefix: &str) -> Result<Listing> {
        let work = || {
            let state = self.shared.lock();
            let mut listing = Listing { entries: vec![], unreadable: vec![], revision: Revision(state.revision) };
            for key in state.rows.keys().filter(|key| key.starts_with(prefix)) {
                match state.read(key) {
                    Some(Ok(entry)) => listing.entries.push(entry),
                    Some(Err(error)) => {
                        let revision = Revision(state.rows.get(key).map_or(0, |(_, revision)| *revision));
                        listing.unreadable.push(Unreadable { key: key.clone(), revision, error });
                    }
                    None => {}
                }
            }
            Ok(listing)
        };
        self.line.call(Method::StoreList, work).await
    }

    async fn txn(&self, txn: Txn) -> Result<TxnOutcome> {
        let work = || {
            let outcome = self.shared.lock().txn(&txn);
            self.shared.grown();
            outcome
        };
        self.line.call(Method::StoreTxn, work).await
    }

    async fn watch(&self, prefix: &str, from: Revision) -> Result<BoxStream<Result<Change>>> {
        let work = || {
            let state = self.shared.lock();
            reach(from, state.changes_floor, state.revision)
        };
        self.line.call(Method::StoreWatch, work).await?;
        let prefix = prefix.to_owned();
        // How many changes of the revision were seen: several have the same one.
        let next = move |state: &State, cursor: &mut (Revision, usize)| {
            if state.changes_floor > cursor.0.0 {
                return Some(Err(compacted()));
            }
            let mut after = state.changes.iter().filter(|change| change.revision >= cursor.0);
            let mut seen = 0;
            let change = after.find(|change| {
                if change.revision > cursor.0 {
                    return change.key.starts_with(&prefix);
                }
                seen += 1;
                seen > cursor.1 && change.key.starts_with(&prefix)
            })?;
            let nth = if change.revision == cursor.0 {
                seen
            } else {
                let same = state.changes.iter().filter(|other| other.revision == change.revision);
                same.take_while(|other| !std::ptr::eq(*other, change)).count() + 1
            };
            *cursor = (change.revision, nth);
            Some(Ok(change.clone()))
        };
        Ok(follow(&self.shared, (from, usize::MAX), next))
    }

    fn epoch(&self) -> u64 {
        self.epoch
    }
}

#[async_trait]
impl EventLog for FakeStore {
    async fn list(&self, vm: Option<&VmId>, after: Revision, limit: usize) -> Result<Vec<Event>> {
        let work = || {
            let state = self.shared.lock();
            let mut events: Vec<Event> = matching(&state, vm, after).cloned().collect();
            events.sort_by_key(|event| event.id);
            if let Some(cut) = events.get(limit).map(|event| event.id) {
                let whole = events.iter().filter(|event| event.id < cut).count();
                let first = events.iter().filter(|event| event.id <= cut).count();
                events.truncate(if whole > 0 || limit == 0 { whole } else { first });
            }
            Ok(events)
        };
        self.line.call(Method::EventsList, work).await
    }

    async fn watch(&self, vm: Option<&VmId>, after: Revision) -> Result<BoxStream<Result<Event>>> {
        let work = || reach(after, self.shared.lock().events_floor, u64::MAX);
        self.line.call(Method::EventsWatch, work).await?;
        let vm = vm.cloned();
        let backlog = {
            let state = self.shared.lock();
            let mut events: Vec<Event> = matching(&state, vm.as_ref(), after).cloned().collect();
            events.sort_by_key(|event| event.id);
            (VecDeque::from(events), state.events_written)
        };
        let next = move |state: &State, (backlog, seen): &mut (VecDeque<Event>, u64)| {
            if let Some(event) = backlog.pop_front() {
                return Some(Ok(event));
            }
            if state.events_dropped > *seen {
                return Some(Err(compacted()));
            }
            let first = state.events.partition_point(|(number, _)| *number <= *seen);
            for (number, event) in state.events.range(first..) {
                *seen = *number;
                if event.id > after && vm.as_ref().is_none_or(|vm| event.about.is_vm(vm)) {
                    return Some(Ok(event.clone()));
                }
            }
            None
        };
        Ok(follow(&self.shared, backlog, next))
    }
}

fn matching<'a>(state: &'a State, vm: Option<&'a VmId>, after: Revision) -> impl Iterator<Item = &'a Event> {
    let events = state.events.iter().map(|(_, event)| event);
    events.filter(move |event| event.id > after && vm.is_none_or(|vm| event.about.is_vm(vm)))
}

fn reach(from: Revision, floor: u64, position: u64) -> Result<()> {
    if from.0 < floor || from.0 > position { Err(compacted()) } else { Ok(()) }
}

fn compacted() -> Error {
    Error::new(Kind::Compacted, "fake store: no longer kept").hint("list again")
}

/// `next` whenever there is something, else after the next commit; ends after the first error.
fn follow<C: Send + 'static, T: Send + 'static>(
    shared: &Arc<Shared>,
    cursor: C,
    next: impl Fn(&State, &mut C) -> Option<Result<T>> + Send + Sync + 'static,
) -> BoxStream<Result<T>> {
    let start = Some((Arc::clone(shared), cursor, Arc::new(next)));
    futures_util::stream::unfold(start, |state| async move {
        let (shared, mut cursor, next) = state?;
        loop {
            let found = {
                let mut grew = std::pin::pin!(shared.grew.notified());
                grew.as_mut().enable();
                let found = next(&shared.lock(), &mut cursor);
                if found.is_none() {
                    grew.await;
                }
                found
            };
            match found {
                Some(Ok(thing)) => return Some((Ok(thing), Some((shared, cursor, next)))),
                Some(Err(error)) => return Some((Err(error), None)),
                None => {}
            }
        }
    })
    .boxed()
}
