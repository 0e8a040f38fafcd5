//! The store of the simulated control plane: any store, asked so that the order of its answers is the order of the questions,
//! with faults on the way to it and the oracle behind it.

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::Thread;

use async_trait::async_trait;
use clawpot_core::event::Event;
use clawpot_core::ports::{BoxStream, Change, Entry, EventLog, Listing, Op, StateStore, Txn, TxnOutcome};
use clawpot_testkit::{FakeStore, Faults, Line, Method};
use clawpot_types::{Error, Kind, Result, Revision, VmId};

use crate::oracle::Oracle;

/// What is on disk; it survives every daemon.
#[derive(Clone)]
pub struct Disk {
    pub state: Arc<dyn StateStore>,
    pub events: Arc<dyn EventLog>,
}

impl Disk {
    /// The fake, which keeps the promises of the real one (`crates/testkit/tests/fake_store.rs`).
    #[must_use]
    pub fn fake() -> Self {
        // Its own faults are never planned: they come on the way to it.
        let store = FakeStore::new(&Faults::new());
        Self { state: store.clone(), events: store }
    }
}

impl std::fmt::Debug for Disk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Disk").finish_non_exhaustive()
    }
}

/// One daemon's way to the disk.
#[derive(Debug)]
pub struct SimStore {
    pub disk: Disk,
    pub line: Line,
    pub oracle: Arc<Oracle>,
    /// Whether the disk is full: what is there may be changed and deleted, nothing is added.
    pub full: Arc<AtomicBool>,
}

impl SimStore {
    fn commit(&self, txn: Txn) -> Result<TxnOutcome> {
        if self.full.load(Ordering::SeqCst) {
            for op in &txn.ops {
                if let Op::Put { key, .. } = op
                    && at_once(self.disk.state.get(key))?.is_none()
                {
                    return Err(Error::new(Kind::Exhausted, format!("store: adding {key}: the disk is full")));
                }
            }
        }
        let outcome = at_once(self.disk.state.txn(txn.clone()))?;
        if let TxnOutcome::Committed(revision) = outcome
            && (!txn.ops.is_empty() || !txn.events.is_empty())
        {
            self.oracle.committed(&txn, revision);
        }
        Ok(outcome)
    }
}

#[async_trait]
impl StateStore for SimStore {
    async fn get(&self, key: &str) -> Result<Option<Entry>> {
        self.line.call(Method::StoreGet, || at_once(self.disk.state.get(key))).await
    }

    async fn list(&self, prefix: &str) -> Result<Listing> {
        self.line.call(Method::StoreList, || at_once(self.disk.state.list(prefix))).await
    }

    async fn txn(&self, txn: Txn) -> Result<TxnOutcome> {
        self.oracle.asked(&txn);
        self.line.call(Method::StoreTxn, || self.commit(txn)).await
    }

    async fn watch(&self, prefix: &str, from: Revision) -> Result<BoxStream<Result<Change>>> {
        self.line.call(Method::StoreWatch, || Ok(())).await?;
        self.disk.state.watch(prefix, from).await
    }

    fn epoch(&self) -> u64 {
        self.disk.state.epoch()
    }
}

#[async_trait]
impl EventLog for SimStore {
    async fn list(&self, vm: Option<&VmId>, after: Revision, limit: usize) -> Result<Vec<Event>> {
        self.line.call(Method::EventsList, || at_once(self.disk.events.list(vm, after, limit))).await
    }

    async fn watch(&self, vm: Option<&VmId>, after: Revision) -> Result<BoxStream<Result<Event>>> {
        self.line.call(Method::EventsWatch, || Ok(())).await?;
        self.disk.events.watch(vm, after).await
    }
}

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// Waits with the whole simulation standing still, so that a store with threads of its own answers in the order it is
/// asked, and costs no virtual time.
pub fn at_once<T>(future: impl Future<Output = T>) -> T {
    // The budget of the task around it would never be filled up here.
    let mut future = pin!(tokio::task::coop::unconstrained(future));
    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    loop {
        match future.as_mut().poll(&mut Context::from_waker(&waker)) {
            Poll::Ready(answer) => return answer,
            Poll::Pending => std::thread::park(),
        }
    }
}
