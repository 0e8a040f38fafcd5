//! SQLite keeps the promises of the port.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::Duration;

use clawpot_store::{Options, SqliteStore, StateLock};
use clawpot_testkit::conformance::Subject;

fn subject() -> Subject {
    let dir = tempfile::tempdir().unwrap();
    let lock = StateLock::acquire(&dir.path().join("state")).unwrap();
    let options = Options {
        changes_kept: 64,
        events_kept: 32,
        execs_kept: 16,
        events_age: Duration::from_secs(3600),
        ballast_bytes: 4096,
        watcher_backlog: 64,
    };
    let store = std::sync::Arc::new(SqliteStore::open(&lock, options).unwrap());
    Subject {
        store: store.clone(),
        events: store,
        changes_kept: options.changes_kept,
        events_kept: 32,
        execs_kept: 16,
        events_age: options.events_age,
        keep: Box::new((lock, dir)),
    }
}

clawpot_testkit::store_conformance!(super::subject);
