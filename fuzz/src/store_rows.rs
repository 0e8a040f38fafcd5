//! What lies in the store after a bit flip, an operator's sqlite3 or another version of the server: rows of the real
//! database, as the real store lists them and as the control plane takes them in.
//!
//! Input: lines of `KEY T VALUE`, T the column's type: t(ext), b(lob), i(nteger, the value's length).
//! Compiled into the fuzz target and into the test that replays its corpus.

use std::collections::BTreeSet;
use std::sync::{Arc, OnceLock};

use clawpot_control::{Records, Row};
use clawpot_core::VmRecord;
use clawpot_core::ports::StateStore;
use clawpot_core::record::RECORD_VERSION;
use clawpot_store::{Options, SqliteStore, StateLock};
use clawpot_types::{Kind, VmId};
use rusqlite::Connection;

/// One database for all inputs: it is emptied for each.
struct World {
    store: Arc<SqliteStore>,
    raw: std::sync::Mutex<Connection>,
    runtime: tokio::runtime::Runtime,
}

fn world() -> &'static World {
    static WORLD: OnceLock<World> = OnceLock::new();
    WORLD.get_or_init(|| {
        // Left behind: the process has one, in the directory for temporary files.
        let directory = tempfile::tempdir().expect("a directory").keep();
        let lock = StateLock::acquire(&directory).expect("the directory is ours");
        let options = Options { ballast_bytes: 0, ..Options::default() };
        let store = SqliteStore::open(&lock, options).expect("a new store");
        let raw = Connection::open(directory.join("state.db")).expect("the same file");
        raw.execute_batch("PRAGMA synchronous = OFF").expect("no need to survive");
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime without drivers");
        std::mem::forget(lock);
        World { store: Arc::new(store), raw: std::sync::Mutex::new(raw), runtime }
    })
}

pub fn run(data: &[u8]) {
    one_record(data);
    let world = world();
    let keys = fill(&world.raw.lock().expect("one thread"), data);
    let mut shown = 0;
    for prefix in ["vms/", "slots/", "names/"] {
        let listing = world.runtime.block_on(world.store.list(prefix)).expect("a bad row is no reason not to list");
        shown += listing.entries.len() + listing.unreadable.len();
        for entry in &listing.entries {
            serde_json::from_slice::<serde::de::IgnoredAny>(&entry.value).expect("readable means JSON");
        }
    }
    assert_eq!(shown, keys.len(), "every row is shown, readable or not: {keys:?}");
    // What is under no VM's id is no VM's: it is told of, and left alone.
    let vms = keys.iter().filter(|key| is_of_a_vm(key)).count();
    if let Ok(records) = world.runtime.block_on(Records::load(Arc::clone(&world.store) as Arc<dyn StateStore>)) {
        let rows = records.rows_after(None);
        assert_eq!(rows.len(), vms, "none is lost on the way");
        for (id, row) in rows {
            if let Row::Known { record, .. } = row {
                assert_eq!(record.id, id, "a record of another VM");
                assert!(records.slots_taken().contains(&record.slot));
            }
        }
    }
}

/// A record that can be read is written again as it is read, and is of this build's version.
fn one_record(data: &[u8]) {
    match VmRecord::decode(data) {
        Ok(record) => {
            assert_eq!(record.version, RECORD_VERSION);
            let written = record.encode().expect("what was read can be written");
            assert_eq!(VmRecord::decode(&written).expect("what was written can be read"), record);
        }
        Err(error) => assert!(matches!(error.kind(), Kind::Corrupt | Kind::Unsupported), "{error:?}"),
    }
}

fn is_of_a_vm(key: &[u8]) -> bool {
    let id = key.strip_prefix(b"vms/").and_then(|id| std::str::from_utf8(id).ok());
    id.is_some_and(|id| id.parse::<VmId>().is_ok())
}

/// The keys of ours that are in the table now.
fn fill(raw: &Connection, data: &[u8]) -> BTreeSet<Vec<u8>> {
    let mut keys = BTreeSet::new();
    let mut seen = BTreeSet::new();
    raw.execute_batch("BEGIN; DELETE FROM kv").expect("our table");
    for line in data.split(|byte| *byte == b'\n').take(64) {
        let mut parts = line.splitn(3, |byte| *byte == b' ');
        let (Some(key), Some(kind), Some(value)) = (parts.next(), parts.next(), parts.next()) else { continue };
        // Only such keys are ever written: ASCII. The rest of the row may be anything.
        if key.len() > 256 || !key.iter().all(u8::is_ascii_graphic) || seen.contains(key) {
            continue;
        }
        let column = match kind {
            b"t" => "CAST(?2 AS TEXT)",
            b"b" => "?2",
            b"i" => "length(?2)",
            _ => continue,
        };
        seen.insert(key);
        let insert = format!("INSERT INTO kv (key, revision, value) VALUES (CAST(?1 AS TEXT), 1, {column})");
        raw.prepare_cached(&insert).and_then(|mut insert| insert.execute((key, value))).expect("any value fits");
        if [&b"vms/"[..], b"slots/", b"names/"].iter().any(|prefix| key.starts_with(prefix)) {
            keys.insert(key.to_vec());
        }
    }
    raw.execute_batch("COMMIT").expect("nobody else writes");
    keys
}
