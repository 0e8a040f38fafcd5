//! Reading rows. What cannot be read is told, never skipped.

use clawpot_core::event::{About, Event};
use clawpot_core::ports::{Change, Entry, Listing, Unreadable};
use clawpot_types::{Error, Incarnation, Kind, Result, Revision, Timestamp, VmId};
use rusqlite::types::ValueRef;
use rusqlite::{Connection, OptionalExtension as _, Row};

use crate::error::{from_sql, sql, to_sql};
use crate::hub::Written;
use crate::schema;

/// Rows of one page of a watcher's backlog.
pub(crate) const PAGE: usize = 256;

/// A row as its index tells it, whether or not its value can be read.
pub(crate) struct Found {
    pub(crate) id: i64,
    pub(crate) revision: Revision,
}

pub(crate) fn find(conn: &Connection, key: &str) -> Result<Option<Found>> {
    let found: Option<(i64, i64)> = conn
        .prepare_cached("SELECT id, revision FROM kv WHERE key = ?1")
        .and_then(|mut statement| statement.query_row([key], |row| Ok((row.get(0)?, row.get(1)?))).optional())
        .map_err(|error| sql(format!("state store: looking for {key}"), error))?;
    found.map(|(id, revision)| Ok(Found { id, revision: Revision(from_sql(revision)?) })).transpose()
}

pub(crate) fn get(conn: &Connection, key: &str) -> Result<Option<Entry>> {
    // One snapshot for both statements.
    let read = conn.unchecked_transaction().map_err(|error| sql(format!("state store: reading {key}"), error))?;
    let Some(found) = find(&read, key)? else { return Ok(None) };
    let value = value(&read, found.id, key)?;
    Ok(Some(Entry { key: key.to_owned(), value, revision: found.revision }))
}

fn value(conn: &Connection, id: i64, key: &str) -> Result<Vec<u8>> {
    let corrupt = |why: String| {
        Error::new(Kind::Corrupt, format!("state store: row {key}: {why}"))
            .hint("nothing was changed; a backup may have it still")
    };
    let read = |row: &Row<'_>| {
        Ok(match row.get_ref(0)? {
            ValueRef::Text(bytes) => Ok(bytes.to_vec()),
            other => Err(format!("its value is of type {}, not text", other.data_type())),
        })
    };
    let bytes = conn
        .prepare_cached("SELECT value FROM kv WHERE id = ?1")
        .and_then(|mut statement| statement.query_row([id], read).optional())
        .map_err(|error| sql(format!("state store: row {key}: reading its value"), error))?
        .ok_or_else(|| corrupt("the index names it and the table does not have it".to_owned()))?
        .map_err(corrupt)?;
    check_json(&bytes).map_err(|why| corrupt(why.to_string()))?;
    Ok(bytes)
}

/// Whether `bytes` are one JSON value in UTF-8.
pub(crate) fn check_json(bytes: &[u8]) -> serde_json::Result<()> {
    // Strings are only checked for UTF-8 when they are read, so the text as a whole is read as such first.
    let text = std::str::from_utf8(bytes).map_err(<serde_json::Error as serde::de::Error>::custom)?;
    serde_json::from_str::<serde::de::IgnoredAny>(text).map(drop)
}

pub(crate) fn list(conn: &Connection, prefix: &str) -> Result<Listing> {
    let what = || format!("state store: listing {prefix}");
    let read = conn.unchecked_transaction().map_err(|error| sql(what(), error))?;
    let revision = Revision(from_sql(schema::meta(&read, "revision")?)?);
    let mut listing = Listing { entries: Vec::new(), unreadable: Vec::new(), revision };
    let mut statement = read
        .prepare_cached("SELECT id, key, revision FROM kv WHERE key >= ?1 AND key < ?2 ORDER BY key")
        .map_err(|error| sql(what(), error))?;
    let mut rows = statement.query((prefix, after_prefix(prefix))).map_err(|error| sql(what(), error))?;
    while let Some(row) = rows.next().map_err(|error| sql(what(), error))? {
        let (id, key, at) = head(row).map_err(|error| sql(what(), error))?;
        let at = Revision(from_sql(at)?);
        match value(&read, id, &key) {
            Ok(value) => listing.entries.push(Entry { key, value, revision: at }),
            Err(error) => listing.unreadable.push(Unreadable { key, revision: at, error }),
        }
    }
    Ok(listing)
}

fn head(row: &Row<'_>) -> rusqlite::Result<(i64, String, i64)> {
    let key = String::from_utf8_lossy(row.get_ref(1)?.as_bytes()?).into_owned();
    Ok((row.get(0)?, key, row.get(2)?))
}

/// The first text that is after every key that starts with `prefix`.
fn after_prefix(prefix: &str) -> String {
    // Keys are ASCII, so DEL is after every character of a key.
    format!("{prefix}\u{7f}")
}

/// A place in a log: a number, and which of those that share it.
pub(crate) type Cursor = (u64, u64);

/// Changes under `prefix` after `cursor` and up to revision `until`, in order.
/// `Compacted` where some may be missing.
pub(crate) fn changes(conn: &Connection, prefix: &str, cursor: Cursor, until: u64) -> Result<Vec<(Cursor, Change)>> {
    let what = || format!("state store: reading the changes under {prefix}");
    let read = conn.unchecked_transaction().map_err(|error| sql(what(), error))?;
    check_floor(&read, "changes_floor", cursor)?;
    let text = "SELECT revision, id, key, value FROM changes WHERE (revision, id) > (?1, ?2) AND revision <= ?3
                AND key >= ?4 AND key < ?5 ORDER BY revision, id LIMIT ?6";
    let limit = i64::try_from(PAGE).unwrap_or(i64::MAX);
    let mut statement = read.prepare_cached(text).map_err(|error| sql(what(), error))?;
    let parameters = (to_sql(cursor.0)?, to_sql(cursor.1)?, to_sql(until)?, prefix, after_prefix(prefix), limit);
    let page = statement
        .query_map(parameters, |row| {
            let value: Option<String> = row.get(3)?;
            Ok((row.get::<_, i64>(0)?, row.get::<_, i64>(1)?, row.get::<_, String>(2)?, value))
        })
        .and_then(Iterator::collect::<rusqlite::Result<Vec<_>>>)
        .map_err(|error| sql(what(), error))?;
    page.into_iter()
        .map(|(revision, id, key, value)| {
            let at = (from_sql(revision)?, from_sql(id)?);
            Ok((at, Change { key, value: value.map(String::into_bytes), revision: Revision(at.0) }))
        })
        .collect()
}

/// A cursor inside of a number that was dropped may miss the rest of it.
fn check_floor(conn: &Connection, name: &str, cursor: Cursor) -> Result<()> {
    let floor = from_sql(schema::meta(conn, name)?)?;
    if floor > cursor.0 || (floor == cursor.0 && cursor.1 != WHOLE) {
        return Err(compacted(cursor.0, floor));
    }
    Ok(())
}

/// The cursor after all of a number.
pub(crate) const WHOLE: u64 = i64::MAX.unsigned_abs();

pub(crate) fn compacted(asked: u64, floor: u64) -> Error {
    let text = format!("state store: what came after revision {asked} is no longer kept (it goes back to {floor})");
    Error::new(Kind::Compacted, text).hint("list again and watch from the revision of the list")
}

/// Events after `cursor` that were written up to `until`, by id, then as they were written.
pub(crate) fn events(
    conn: &Connection,
    vm: Option<&VmId>,
    cursor: Cursor,
    until: u64,
    limit: usize,
) -> Result<Vec<(Cursor, Written)>> {
    let what = || "event log: reading".to_owned();
    let text = "SELECT seq, id, vm, kind, time, body FROM events WHERE (id, seq) > (?1, ?2) AND seq <= ?3
                AND (?4 IS NULL OR vm = ?4) ORDER BY id, seq LIMIT ?5";
    let mut statement = conn.prepare_cached(text).map_err(|error| sql(what(), error))?;
    let limit = i64::try_from(limit).unwrap_or(i64::MAX);
    let parameters = (to_sql(cursor.0)?, to_sql(cursor.1)?, to_sql(until)?, vm.map(VmId::as_str), limit);
    let page = statement
        .query_map(parameters, |row| {
            let (seq, id): (i64, i64) = (row.get(0)?, row.get(1)?);
            Ok((seq, id, event(row)))
        })
        .and_then(Iterator::collect::<rusqlite::Result<Vec<_>>>)
        .map_err(|error| sql(what(), error))?;
    page.into_iter()
        .map(|(seq, id, event)| {
            let seq = from_sql(seq)?;
            Ok(((from_sql(id)?, seq), (seq, event?)))
        })
        .collect()
}

/// As [`events`], for a watcher: `Compacted` where some may be missing.
pub(crate) fn events_watched(
    conn: &Connection,
    vm: Option<&VmId>,
    cursor: Cursor,
    until: u64,
) -> Result<Vec<(Cursor, Written)>> {
    let read = conn.unchecked_transaction().map_err(|error| sql("event log: reading", error))?;
    check_floor(&read, "events_floor", cursor)?;
    events(&read, vm, cursor, until, PAGE)
}

/// A body that cannot be read becomes an event that says so.
fn event(row: &Row<'_>) -> Result<Event> {
    let body = row.get_ref(5).map_err(|error| sql("event log: reading", error))?;
    let why = match body.as_bytes() {
        Ok(bytes) => match serde_json::from_slice(bytes) {
            Ok(event) => return Ok(event),
            Err(error) => error.to_string(),
        },
        Err(error) => error.to_string(),
    };
    unreadable_event(row, &why)
}

fn unreadable_event(row: &Row<'_>, why: &str) -> Result<Event> {
    let column = |error| sql("event log: reading", error);
    let (id, time): (i64, i64) = (row.get(1).map_err(column)?, row.get(4).map_err(column)?);
    let (of, kind): (String, String) = (row.get(2).map_err(column)?, row.get(3).map_err(column)?);
    let about = if kind.starts_with("volume.") {
        About::Volume { volume: of.parse()?, volume_name: "unreadable".parse()? }
    } else {
        About::Vm { vm: of.parse()?, name: "unreadable".parse()?, incarnation: Incarnation(0) }
    };
    Ok(Event {
        id: Revision(from_sql(id)?),
        time: Timestamp(from_sql(time)?),
        about,
        kind,
        message: format!("this event cannot be read: {why}"),
        actor: "server".to_owned(),
    })
}
