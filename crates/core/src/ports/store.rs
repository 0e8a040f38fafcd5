use async_trait::async_trait;
use clawpot_types::{Error, Result, Revision, VmId};

use super::BoxStream;
use crate::event::{Draft, Event};

/// A revisioned key-value store with guarded transactions and watch. SQLite here, etcd later; one conformance suite.
///
/// Keys are `/`-separated ASCII: `vms/<id>`, `slots/<n>`, `names/<name>`, `requests/<id>`. Values are JSON.
/// Every committed transaction with an operation or an event has one revision, one more than the last.
#[async_trait]
pub trait StateStore: Send + Sync {
    /// `Corrupt` when the row is there and cannot be read.
    async fn get(&self, key: &str) -> Result<Option<Entry>>;

    /// All keys under `prefix` in order: the readable *and* the unreadable, as of one revision.
    async fn list(&self, prefix: &str) -> Result<Listing>;

    /// All guards hold → all operations and events at one revision; else nothing and which guard failed.
    /// `Exhausted` on a full disk: nothing was changed. Where only what is there can be changed, events take the place of the
    /// oldest.
    async fn txn(&self, txn: Txn) -> Result<TxnOutcome>;

    /// Every change under `prefix` after `from`, in order. Ends with `Compacted` where those are no longer kept or the
    /// watcher is too slow: list again.
    async fn watch(&self, prefix: &str, from: Revision) -> Result<BoxStream<Result<Change>>>;

    /// Random, made with the store: page tokens and watchers of another store are refused by it.
    fn epoch(&self) -> u64;
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub key: String,
    pub value: Vec<u8>,
    /// Of the last change of this key.
    pub revision: Revision,
}

#[derive(Debug)]
pub struct Listing {
    pub entries: Vec<Entry>,
    pub unreadable: Vec<Unreadable>,
    /// Of the whole store: watch from here.
    pub revision: Revision,
}

#[derive(Debug)]
pub struct Unreadable {
    pub key: String,
    /// Of the row where that much can be read, else of the store.
    pub revision: Revision,
    pub error: Error,
}

#[derive(Clone, Debug, Default)]
pub struct Txn {
    pub guards: Vec<Guard>,
    pub ops: Vec<Op>,
    /// Committed with the operations or not at all, and never without.
    pub events: Vec<Draft>,
    pub durability: Durability,
}

#[derive(Clone, Debug)]
pub struct Guard {
    pub key: String,
    pub expect: Expect,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expect {
    Absent,
    Revision(Revision),
}

#[derive(Clone, Debug)]
pub enum Op {
    Put {
        key: String,
        value: Vec<u8>,
    },
    /// Of an absent key: nothing.
    Delete {
        key: String,
    },
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Durability {
    /// Survives `kill -9`.
    #[default]
    Normal,
    /// Survives loss of power: what a client was told of create, delete, snapshot, volume.
    Full,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TxnOutcome {
    Committed(Revision),
    /// The first guard that did not hold: its key and the revision that was there (`None`: absent).
    Conflict {
        key: String,
        found: Option<Revision>,
    },
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    pub key: String,
    /// `None`: deleted.
    pub value: Option<Vec<u8>>,
    pub revision: Revision,
}

/// Events, as [`StateStore::txn`] wrote them: local, bounded by count and age, never in a cluster's store.
#[async_trait]
pub trait EventLog: Send + Sync {
    /// Up to `limit` events after `after`, oldest first, of one VM or of all.
    async fn list(&self, vm: Option<&VmId>, after: Revision, limit: usize) -> Result<Vec<Event>>;

    /// Events after `after`, then those that come. `Compacted` where they are no longer kept.
    async fn watch(&self, vm: Option<&VmId>, after: Revision) -> Result<BoxStream<Result<Event>>>;
}
