//! A state directory that can be opened and closed.

#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::path::{Path, PathBuf};

use clawpot_core::event::{About, Draft, Event};
use clawpot_core::ports::{Durability, Expect, Guard, Op, StateStore, Txn, TxnOutcome};
use clawpot_store::{Options, SqliteStore, StateLock};
use clawpot_types::{Incarnation, Revision, Timestamp, VmId};

pub struct State {
    dir: PathBuf,
    store: Option<SqliteStore>,
    lock: Option<StateLock>,
    _home: Option<tempfile::TempDir>,
}

impl State {
    pub fn new() -> Self {
        let home = tempfile::tempdir().unwrap();
        let mut state = Self::in_dir(&home.path().join("state"));
        state._home = Some(home);
        state.open();
        state
    }

    /// Not opened yet.
    pub fn in_dir(dir: &Path) -> Self {
        Self { dir: dir.to_owned(), store: None, lock: Some(StateLock::acquire(dir).unwrap()), _home: None }
    }

    pub fn dir(&self) -> PathBuf {
        self.dir.clone()
    }

    pub fn lock(&self) -> &StateLock {
        self.lock.as_ref().unwrap()
    }

    pub fn store(&self) -> &SqliteStore {
        self.store.as_ref().unwrap()
    }

    pub fn open(&mut self) {
        self.store = Some(SqliteStore::open(self.lock(), Options::default()).unwrap());
    }

    pub fn close(&mut self) {
        self.store = None;
    }

    pub fn restart(&mut self) {
        self.close();
        self.open();
    }

    /// Each in a transaction of its own; as they are read back.
    pub async fn tell(&self, drafts: &[Draft]) -> Vec<Event> {
        let mut events = Vec::new();
        for draft in drafts {
            let told = Txn { events: vec![draft.clone()], ..Txn::default() };
            match self.store().txn(told).await.unwrap() {
                TxnOutcome::Committed(id) => events.push(draft.committed(id)),
                conflict @ TxnOutcome::Conflict { .. } => panic!("{conflict:?}"),
            }
        }
        events
    }

    pub async fn commit(&self, ops: Vec<Op>) -> Revision {
        match self.store().txn(txn(vec![], ops)).await.unwrap() {
            TxnOutcome::Committed(revision) => revision,
            conflict @ TxnOutcome::Conflict { .. } => panic!("{conflict:?}"),
        }
    }
}

pub fn put(key: &str, value: &str) -> Op {
    Op::Put { key: key.to_owned(), value: value.as_bytes().to_vec() }
}

pub fn delete(key: &str) -> Op {
    Op::Delete { key: key.to_owned() }
}

pub fn absent(key: &str) -> Guard {
    Guard { key: key.to_owned(), expect: Expect::Absent }
}

pub fn at(key: &str, revision: Revision) -> Guard {
    Guard { key: key.to_owned(), expect: Expect::Revision(revision) }
}

pub fn txn(guards: Vec<Guard>, ops: Vec<Op>) -> Txn {
    Txn { guards, ops, events: Vec::new(), durability: Durability::Normal }
}

/// Of the VM with the number `n`.
pub fn draft(n: u8) -> Draft {
    Draft {
        time: Timestamp(1_800_000_000_000_000 + u64::from(n)),
        about: About::Vm {
            vm: VmId::from_random([n; VmId::LEN]),
            name: "web".parse().unwrap(),
            incarnation: Incarnation(1),
        },
        kind: "vm.phase",
        message: "running".to_owned(),
        actor: "server".to_owned(),
    }
}
