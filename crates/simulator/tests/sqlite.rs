//! The same seeds over the real store: the same trace, so that what the simulator says of the fake holds for SQLite too
//! (`docs/decisions/0006-simulator.md`).

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::Arc;

use clawpot_simulator::disk::Disk;
use clawpot_simulator::{Setup, run};
use clawpot_store::{Options, SqliteStore, StateLock};

#[test]
fn sqlite_gives_the_same_trace_as_the_fake() {
    for seed in 0..12 {
        let fake = run(&Setup::new(seed, 120)).unwrap();
        let home = tempfile::tempdir().unwrap();
        let lock = StateLock::acquire(&home.path().join("state")).unwrap();
        let store = Arc::new(SqliteStore::open(&lock, Options::default()).unwrap());
        let mut setup = Setup::new(seed, 120);
        setup.disk = Disk { state: store.clone(), events: store };
        let real = run(&setup).unwrap();
        assert_eq!(real.wrong, None, "seed {seed}: {}", real.trace.join("\n"));
        assert_eq!(real.hash, fake.hash, "seed {seed}");
    }
}
