//! Tables, their versions, and how an older file becomes a newer one.

use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::time::Duration;

use clawpot_types::{Error, Kind, Result};
use rusqlite::{Connection, OpenFlags, OptionalExtension as _, TransactionBehavior};

use crate::error;

/// "Claw": tells our files from other SQLite databases.
const APPLICATION_ID: i64 = 0x436c_6177;

/// How long to wait for another process that holds the database (an operator's sqlite3 shell).
const BUSY: Duration = Duration::from_secs(5);

/// Entry n takes a file of version n to n + 1; a new file takes all of them. Never edit one that was released.
const MIGRATIONS: [&str; 2] = [
    // `kv_key` covers the revision, so that a row whose value lies on a damaged page is still listed and guarded.
    // `changes` has a row id although its key is the revision: in a table without one, two records never fit one page.
    // `value` may be anything, so that what an operator or a bit flip made of it is seen and not refused.
    "CREATE TABLE meta (name TEXT PRIMARY KEY, value INTEGER NOT NULL) STRICT, WITHOUT ROWID;
     CREATE TABLE kv (id INTEGER PRIMARY KEY, key TEXT NOT NULL, revision INTEGER NOT NULL, value ANY NOT NULL) STRICT;
     CREATE UNIQUE INDEX kv_key ON kv (key, revision);
     CREATE TABLE changes (id INTEGER PRIMARY KEY, revision INTEGER NOT NULL, key TEXT NOT NULL, value TEXT) STRICT;
     CREATE INDEX changes_revision ON changes (revision);
     INSERT INTO meta VALUES ('revision', 0), ('changes_floor', 0);",
    "CREATE TABLE events (seq INTEGER PRIMARY KEY AUTOINCREMENT, id INTEGER NOT NULL, vm TEXT NOT NULL,
                          kind TEXT NOT NULL, time INTEGER NOT NULL, body ANY NOT NULL) STRICT;
     CREATE UNIQUE INDEX events_id ON events (id, vm, kind);
     CREATE INDEX events_vm ON events (vm, id);
     INSERT INTO meta VALUES ('events_floor', 0);",
];

/// Of the tables that this build reads and writes.
pub(crate) const VERSION: i64 = 2;
const _: () = assert!(MIGRATIONS.len() == 2, "VERSION is the number of migrations");

/// Opens the database for writing, makes it where it is missing, and brings it to [`VERSION`].
///
/// # Errors
/// `Unsupported`: written by a newer server; `Corrupt`: not a database, or not ours; `PermissionDenied`, `Exhausted`.
pub(crate) fn open(path: &Path) -> Result<Connection> {
    let what = || format!("state store {}", path.display());
    // Made by us first: SQLite would make it readable by everyone, and gives its -wal and -shm the mode of this one.
    OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(path).map_err(|error| {
        Error::io(what(), error).hint("the server's user must be able to write the state directory")
    })?;
    let mut conn = connect(path, OpenFlags::SQLITE_OPEN_READ_WRITE)?;
    let version = check_ours(&conn, path)?;
    let mode: String =
        conn.query_row("PRAGMA journal_mode = WAL", [], |row| row.get(0)).map_err(|error| error::sql(what(), error))?;
    if mode != "wal" {
        let text = format!("{}: its filesystem cannot hold a write-ahead log (SQLite says {mode:?})", what());
        return Err(Error::new(Kind::Unsupported, text).hint("use a local filesystem for the state directory"));
    }
    migrate(&mut conn, version).map_err(|error| error::sql(format!("{}: making its tables", what()), error))?;
    ensure_epoch(&conn).map_err(|failed| failed.context(what()))?;
    Ok(conn)
}

/// A connection that waits for others and never follows a symbolic link's name into another file.
pub(crate) fn connect(path: &Path, access: OpenFlags) -> Result<Connection> {
    let what = || format!("opening the state store {}", path.display());
    let flags = access | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let conn = Connection::open_with_flags(path, flags).map_err(|error| error::sql(what(), error))?;
    conn.busy_timeout(BUSY).map_err(|error| error::sql(what(), error))?;
    conn.set_prepared_statement_cache_capacity(32);
    // Checkpoints are made by the writer, between batches. The file is cut back to 8 MiB when it was larger.
    conn.execute_batch(
        "PRAGMA wal_autocheckpoint = 0; PRAGMA journal_size_limit = 8388608; PRAGMA cell_size_check = ON",
    )
    .map_err(|error| error::sql(what(), error))?;
    Ok(conn)
}

/// The file's schema version; 0: empty. An error where the file is not one that this build may write.
pub(crate) fn check_ours(conn: &Connection, path: &Path) -> Result<i64> {
    let what = format!("state store {}", path.display());
    let read = |pragma: &str| {
        conn.query_row(pragma, [], |row| row.get::<_, i64>(0)).map_err(|error| error::sql(what.clone(), error))
    };
    let version = read("PRAGMA user_version")?;
    let application = read("PRAGMA application_id")?;
    let tables = read("SELECT count(*) FROM sqlite_schema")?;
    if application != APPLICATION_ID && (application != 0 || tables > 0) {
        return Err(Error::new(Kind::Corrupt, format!("{what}: an SQLite database, but not one of Clawpot's"))
            .hint("move it away, or give the server another state directory"));
    }
    if version > VERSION {
        let text = format!("{what}: written by a newer server (tables of version {version}, this one knows {VERSION})");
        return Err(Error::new(Kind::Unsupported, text).hint("run that newer clawpot-server, or restore a backup"));
    }
    Ok(version)
}

/// All steps in one transaction: a crash leaves the old version.
fn migrate(conn: &mut Connection, from: i64) -> rusqlite::Result<()> {
    if from == VERSION {
        return Ok(());
    }
    let tx = conn.transaction_with_behavior(TransactionBehavior::Exclusive)?;
    for step in MIGRATIONS.iter().skip(usize::try_from(from).unwrap_or(0)) {
        tx.execute_batch(step)?;
    }
    tx.pragma_update(None, "application_id", APPLICATION_ID)?;
    tx.pragma_update(None, "user_version", VERSION)?;
    tx.commit()
}

/// A store gets its epoch when it is first opened; a backup has none, so that what was restored is another store
/// to whoever holds a revision of the old one.
fn ensure_epoch(conn: &Connection) -> Result<()> {
    let mut bytes = [0u8; 8];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())
        .map_err(|errno| Error::io("choosing its epoch", errno.into()))?;
    conn.execute("INSERT OR IGNORE INTO meta VALUES ('epoch', ?1)", [i64::from_ne_bytes(bytes)])
        .map_err(|error| error::sql("writing its epoch", error))?;
    Ok(())
}

/// What `meta` says; its names are fixed by the migrations and [`ensure_epoch`].
pub(crate) fn meta(conn: &Connection, name: &str) -> Result<i64> {
    conn.prepare_cached("SELECT value FROM meta WHERE name = ?1")
        .and_then(|mut statement| statement.query_row([name], |row| row.get(0)).optional())
        .map_err(|error| error::sql(format!("state store: reading its {name}"), error))?
        .ok_or_else(|| Error::new(Kind::Corrupt, format!("state store: it has no {name}")))
}

pub(crate) fn set_meta(conn: &Connection, name: &str, value: i64) -> rusqlite::Result<()> {
    conn.prepare_cached("UPDATE meta SET value = ?2 WHERE name = ?1")?.execute((name, value))?;
    Ok(())
}
