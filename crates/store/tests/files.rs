//! The store as files: opening, versions, damage, backup, full disks, sudden death.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use clawpot_core::ports::{EventLog, StateStore, TxnOutcome};
use clawpot_store::{Options, SqliteStore, backup, store::path};
use clawpot_types::{Kind, Revision};
use futures_util::StreamExt as _;
use rusqlite::Connection;
use support::{State, absent, delete, draft, put, txn};

fn raw(state: &Path) -> Connection {
    Connection::open(path(state)).unwrap()
}

#[tokio::test]
async fn what_was_committed_is_there_after_a_restart() {
    let mut state = State::new();
    let revision = state.commit(vec![put("vms/a", "1"), put("slots/1", "\"a\"")]).await;
    let told = state.tell(&[draft(1), draft(2)]).await;
    let epoch = state.store().epoch();
    state.restart();
    assert_eq!(state.store().epoch(), epoch);
    assert_eq!(state.store().get("vms/a").await.unwrap().unwrap().value, b"1");
    assert_eq!(EventLog::list(state.store(), None, Revision(0), 10).await.unwrap(), told);
    assert_eq!(state.commit(vec![put("vms/b", "1")]).await, told[1].id.next());
    let mut changes = StateStore::watch(state.store(), "", Revision(0)).await.unwrap();
    assert_eq!(changes.next().await.unwrap().unwrap().revision, revision, "watchers may go back beyond the restart");
}

/// Readers see a commit before its writer has published it: a list of that moment can be watched from.
#[tokio::test]
async fn what_is_committed_and_not_published_yet_can_be_watched_from() {
    let state = State::new();
    let Revision(published) = state.commit(vec![put("vms/a", "1")]).await;
    // The writer between its commit and its publishing.
    raw(&state.dir()).execute("UPDATE meta SET value = value + 1 WHERE name = 'revision'", []).unwrap();
    let committed = Revision(published + 1);
    assert_eq!(StateStore::list(state.store(), "").await.unwrap().revision, committed);
    let mut changes = StateStore::watch(state.store(), "", committed).await.unwrap();
    let refused = StateStore::watch(state.store(), "", committed.next()).await.err().unwrap();
    assert_eq!(refused.kind(), Kind::Compacted);
    let next = state.commit(vec![put("vms/a", "2")]).await;
    assert_eq!(changes.next().await.unwrap().unwrap().revision, next);
}

#[tokio::test]
async fn only_the_owner_may_read() {
    let state = State::new();
    state.commit(vec![put("vms/a", "1")]).await;
    for name in ["state.db", "state.db-wal", "state.db-shm", "ballast", "lock"] {
        let mode = std::fs::metadata(state.dir().join(name)).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode, 0o600, "{name}");
    }
}

#[tokio::test]
async fn damaged_rows_are_listed_as_unreadable() {
    let mut state = State::new();
    for key in ["a", "b", "c", "d", "e"] {
        state.commit(vec![put(&format!("vms/{key}"), r#"{"ok":true}"#)]).await;
    }
    state.close();
    raw(&state.dir())
        .execute_batch(
            "UPDATE kv SET value = '{\"ok\":tr' WHERE key = 'vms/a';
             UPDATE kv SET value = CAST(x'22ff22' AS TEXT) WHERE key = 'vms/b';
             UPDATE kv SET value = 42 WHERE key = 'vms/c';
             UPDATE kv SET value = x'7b7d' WHERE key = 'vms/d';",
        )
        .unwrap();
    state.open();
    let listing = StateStore::list(state.store(), "vms/").await.unwrap();
    assert_eq!(listing.entries.iter().map(|entry| entry.key.as_str()).collect::<Vec<_>>(), ["vms/e"]);
    let unreadable: Vec<_> = listing.unreadable.iter().map(|row| (row.key.as_str(), row.revision.0)).collect();
    assert_eq!(unreadable, [("vms/a", 1), ("vms/b", 2), ("vms/c", 3), ("vms/d", 4)]);
    for row in &listing.unreadable {
        assert_eq!(row.error.kind(), Kind::Corrupt);
        assert!(row.error.chain().contains(&row.key), "{}", row.error.chain());
        assert_eq!(state.store().get(&row.key).await.unwrap_err().kind(), Kind::Corrupt);
    }
    // It can be replaced and removed by whoever names its revision.
    let guard = support::at("vms/a", Revision(1));
    let swapped = state.store().txn(txn(vec![guard], vec![put("vms/a", "1"), delete("vms/b")])).await.unwrap();
    assert!(matches!(swapped, TxnOutcome::Committed(_)));
    assert_eq!(StateStore::list(state.store(), "vms/").await.unwrap().unreadable.len(), 2);
}

#[tokio::test]
async fn a_damaged_page_hides_no_row() {
    let mut state = State::new();
    let value = |n: usize| format!("\"{}\"", "v".repeat(900 + n));
    for n in 0..40 {
        state.commit(vec![put(&format!("vms/{n:02}"), &value(n))]).await;
    }
    state.close();
    let page = {
        let conn = raw(&state.dir());
        conn.execute_batch("PRAGMA wal_checkpoint(TRUNCATE)").unwrap();
        // The page that row 20 lies on: its bytes are found in the file.
        let bytes = std::fs::read(path(&state.dir())).unwrap();
        // In the table, a value stands behind its key and revision; in the log of changes too: take the table's pages.
        let root: i64 =
            conn.query_row("SELECT rootpage FROM sqlite_schema WHERE name = 'kv'", [], |row| row.get(0)).unwrap();
        second_leaf(&bytes, usize::try_from(root).unwrap())
    };
    let mut bytes = std::fs::read(path(&state.dir())).unwrap();
    bytes[(page - 1) * 4096..page * 4096].fill(0xa5);
    std::fs::File::create(path(&state.dir()))
        .and_then(|mut file| std::io::Write::write_all(&mut file, &bytes))
        .unwrap();
    state.open();
    let listing = StateStore::list(state.store(), "vms/").await.unwrap();
    assert!(!listing.unreadable.is_empty() && !listing.entries.is_empty());
    assert_eq!(listing.entries.len() + listing.unreadable.len(), 40);
    for row in &listing.unreadable {
        assert!(row.revision > Revision(0) && row.error.kind() == Kind::Corrupt, "{}", row.error.chain());
    }
}

/// The second child of a table's root page (a table b-tree's interior page: SQLite file format §1.6).
fn second_leaf(file: &[u8], root: usize) -> usize {
    let page = &file[(root - 1) * 4096..root * 4096];
    assert_eq!(page[0], 5, "the table has grown beyond one page");
    let cell = usize::from(u16::from_be_bytes([page[14], page[15]]));
    usize::try_from(u32::from_be_bytes(page[cell..cell + 4].try_into().unwrap())).unwrap()
}

#[tokio::test]
async fn an_unreadable_event_is_told() {
    let mut state = State::new();
    let told = state.tell(&[draft(1), draft(2)]).await;
    state.close();
    raw(&state.dir()).execute_batch("UPDATE events SET body = '{' WHERE seq = 1").unwrap();
    state.open();
    let events = EventLog::list(state.store(), None, Revision(0), 10).await.unwrap();
    assert_eq!(events.len(), 2);
    assert!(events[0].message.contains("cannot be read"), "{}", events[0].message);
    assert_eq!((events[0].id, &events[0].kind), (told[0].id, &told[0].kind));
}

fn open_error(state: &State) -> clawpot_types::Error {
    SqliteStore::open(state.lock(), Options::default()).unwrap_err()
}

#[tokio::test]
async fn a_newer_store_is_refused() {
    let mut state = State::new();
    state.close();
    raw(&state.dir()).execute_batch("PRAGMA user_version = 99").unwrap();
    let error = open_error(&state);
    assert_eq!(error.kind(), Kind::Unsupported);
    assert!(error.chain().contains("version 99") && error.next_step().unwrap().contains("newer"), "{}", error.chain());
    let version: i64 = raw(&state.dir()).query_row("PRAGMA user_version", [], |row| row.get(0)).unwrap();
    assert_eq!(version, 99, "nothing was changed");
}

#[tokio::test]
async fn an_older_store_is_migrated() {
    let mut state = State::new();
    state.close();
    std::fs::remove_file(path(&state.dir())).unwrap();
    raw(&state.dir()).execute_batch(include_str!("fixtures/version-1.sql")).unwrap();
    state.open();
    let listing = StateStore::list(state.store(), "").await.unwrap();
    assert_eq!(listing.revision, Revision(3));
    assert_eq!(listing.entries.len(), 1);
    assert_eq!(state.store().epoch(), 4711);
    let told = state.tell(&[draft(1)]).await;
    assert_eq!(EventLog::list(state.store(), None, Revision(0), 10).await.unwrap(), told);
    assert_eq!(state.commit(vec![put("vms/c", "1")]).await, Revision(5));
}

#[tokio::test]
async fn what_is_not_our_database_is_left_alone() {
    let mut state = State::new();
    state.close();
    std::fs::remove_file(path(&state.dir())).unwrap();
    raw(&state.dir()).execute_batch("CREATE TABLE photos (name TEXT)").unwrap();
    let error = open_error(&state);
    assert_eq!(error.kind(), Kind::Corrupt);
    assert!(error.chain().contains("not one of Clawpot's") && error.next_step().is_some(), "{}", error.chain());

    let text = "this is a letter, and not a database; ".repeat(100);
    let mut file = std::fs::File::create(path(&state.dir())).unwrap();
    std::io::Write::write_all(&mut file, text.as_bytes()).unwrap();
    let error = open_error(&state);
    assert_eq!(error.kind(), Kind::Corrupt, "{}", error.chain());
    assert_eq!(std::fs::read(path(&state.dir())).unwrap(), text.as_bytes());
}

#[tokio::test]
async fn a_directory_in_its_place_is_said() {
    let mut state = State::new();
    state.close();
    std::fs::remove_file(path(&state.dir())).unwrap();
    std::fs::create_dir(path(&state.dir())).unwrap();
    let error = open_error(&state);
    assert!(error.chain().contains("state.db"), "{}", error.chain());
}

#[tokio::test]
async fn a_backup_is_whole_and_another_store() {
    let mut state = State::new();
    for n in 0..200 {
        state.commit(vec![put(&format!("vms/{n}"), &format!("\"{}\"", "v".repeat(1000)))]).await;
    }
    let told = state.tell(&[draft(1)]).await;
    let to = state.dir().join("../copy.db");
    backup(&state.dir(), &to).unwrap();
    assert_eq!(std::fs::metadata(&to).unwrap().permissions().mode() & 0o777, 0o600);
    let error = backup(&state.dir(), &to).unwrap_err();
    assert_eq!(error.kind(), Kind::AlreadyExists, "{}", error.chain());
    let beside: Vec<_> = std::fs::read_dir(state.dir().join("..")).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(beside.len(), 2, "the state and the copy, nothing half-made: {beside:?}");

    let epoch = state.store().epoch();
    state.commit(vec![put("vms/after", "1")]).await;
    state.close();
    for name in ["state.db", "state.db-wal", "state.db-shm"] {
        std::fs::remove_file(state.dir().join(name)).unwrap_or_default();
    }
    std::fs::rename(&to, path(&state.dir())).unwrap();
    state.open();
    let listing = StateStore::list(state.store(), "vms/").await.unwrap();
    assert_eq!((listing.entries.len(), listing.unreadable.len()), (200, 0));
    assert_eq!(EventLog::list(state.store(), None, Revision(0), 10).await.unwrap(), told);
    assert_ne!(state.store().epoch(), epoch, "its revisions are counted anew from there");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_under_load_is_one_moment() {
    let state = State::new();
    let writing = async {
        for n in 0..400 {
            // Both or none, in any copy.
            state.commit(vec![put("left", &n.to_string()), put("right", &n.to_string())]).await;
        }
    };
    let dir = state.dir();
    let copies = tokio::task::spawn_blocking(move || {
        (0..5).map(|n| dir.join(format!("../copy-{n}.db"))).inspect(|to| backup(&dir, to).unwrap()).collect::<Vec<_>>()
    });
    let ((), copies) = futures_util::future::join(writing, copies).await;
    for copy in copies.unwrap() {
        let conn = Connection::open(copy).unwrap();
        let values: Vec<String> = conn
            .prepare("SELECT value FROM kv ORDER BY key")
            .unwrap()
            .query_map([], |row| row.get(0))
            .unwrap()
            .map(Result::unwrap)
            .collect();
        assert!(values.is_empty() || (values.len() == 2 && values[0] == values[1]), "{values:?}");
    }
}

#[test]
fn there_must_be_something_to_back_up() {
    let dir = tempfile::tempdir().unwrap();
    let error = backup(dir.path(), &dir.path().join("copy.db")).unwrap_err();
    assert_eq!(error.kind(), Kind::NotFound);
    assert!(error.chain().contains("no state store"), "{}", error.chain());
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[tokio::test]
async fn many_writers_share_commits() {
    let state = State::new();
    let writers = (0..200).map(|n| {
        let key = format!("vms/{n}");
        async move { (key.clone(), vec![put(&key, "1")]) }
    });
    let jobs = futures_util::future::join_all(writers).await;
    let commits = jobs.into_iter().map(|(key, ops)| state.store().txn(txn(vec![absent(&key)], ops)));
    for outcome in futures_util::future::join_all(commits).await {
        assert!(matches!(outcome.unwrap(), TxnOutcome::Committed(_)));
    }
    assert_eq!(StateStore::list(state.store(), "").await.unwrap().revision, Revision(200));
}

#[tokio::test]
async fn one_bad_member_does_not_spoil_the_batch() {
    let mut state = State::new();
    state.close();
    // A row whose page cannot be found stands for any failure inside of a member.
    raw(&state.dir())
        .execute_batch(
            "CREATE TRIGGER bad BEFORE INSERT ON kv WHEN new.key = 'bad' BEGIN SELECT raise(ABORT, 'refused'); END",
        )
        .unwrap();
    state.open();
    let keys = ["a", "bad", "b"];
    let commits = keys.map(|key| state.store().txn(txn(vec![], vec![put(key, "1")])));
    let outcomes = futures_util::future::join_all(commits).await;
    let fine: Vec<bool> = outcomes.iter().map(Result::is_ok).collect();
    assert_eq!(fine, [true, false, true]);
    assert_eq!(StateStore::list(state.store(), "").await.unwrap().entries.len(), 2);
}
