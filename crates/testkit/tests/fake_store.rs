//! The fake store keeps the promises of the real one.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use clawpot_testkit::conformance::Subject;
use clawpot_testkit::store::Kept;
use clawpot_testkit::{FakeStore, Faults};

fn subject() -> Subject {
    static EPOCH: AtomicU64 = AtomicU64::new(1);
    let kept = Kept { changes: 64, events: 32, execs: 16, events_age: Duration::from_secs(3600) };
    let store = FakeStore::keeping(&Faults::new(), kept, EPOCH.fetch_add(1, Ordering::SeqCst));
    Subject {
        store: store.clone(),
        events: store,
        changes_kept: 64,
        events_kept: 32,
        execs_kept: 16,
        events_age: kept.events_age,
        keep: Box::new(()),
    }
}

clawpot_testkit::store_conformance!(super::subject);
