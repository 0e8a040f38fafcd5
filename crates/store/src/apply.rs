//! What a batch does inside its one SQLite transaction.

use std::time::Duration;

use clawpot_core::event::{ATTACH, Draft, EXEC};
use clawpot_core::ports::{Change, Expect, Guard, Op, Txn, TxnOutcome};
use clawpot_types::{Error, Kind, Result, Revision, Timestamp};
use rusqlite::{Connection, OptionalExtension as _};

use crate::error::{from_sql, sql, to_sql};
use crate::hub::Written;
use crate::{rows, schema};

/// How much is kept.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Kept {
    pub(crate) changes: u64,
    /// Of all kinds but those of commands.
    pub(crate) events: u64,
    pub(crate) execs: u64,
    pub(crate) events_age: Duration,
}

/// On a full disk fewer changes are kept: the pages of the others are what deleting is written to.
const CHANGES_ON_A_FULL_DISK: u64 = 256;

/// Free pages of the file that make room for a transaction's events: their rows and three indices may each need one.
const FREE_PAGES: i64 = 8;
/// So many of the oldest events make room for new ones, those of commands first: some dozen pages.
const OLDEST_ON_A_FULL_DISK: i64 = 256;

/// Whether new keys are taken in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Room {
    Ample,
    /// The ballast is spent: what is there may be changed and deleted, nothing is added.
    DeletesOnly,
}

/// A batch on its way. Thrown away with the transaction when a member fails.
pub(crate) struct Batch<'a> {
    conn: &'a Connection,
    room: Room,
    pub(crate) revision: u64,
    pub(crate) changes_floor: u64,
    pub(crate) events_floor: u64,
    pub(crate) changes: Vec<Change>,
    pub(crate) events: Vec<Written>,
}

impl<'a> Batch<'a> {
    /// Counters are read from the file each time: whoever else wrote it, they are never used twice.
    pub(crate) fn begin(conn: &'a Connection, room: Room) -> Result<Self> {
        Ok(Self {
            conn,
            room,
            revision: from_sql(schema::meta(conn, "revision")?)?,
            changes_floor: from_sql(schema::meta(conn, "changes_floor")?)?,
            events_floor: from_sql(schema::meta(conn, "events_floor")?)?,
            changes: Vec::new(),
            events: Vec::new(),
        })
    }

    pub(crate) fn txn(&mut self, txn: &Txn) -> Result<TxnOutcome> {
        for Guard { key, expect } in &txn.guards {
            let found = rows::find(self.conn, key)?.map(|row| row.revision);
            let holds = match expect {
                Expect::Absent => found.is_none(),
                Expect::Revision(revision) => found == Some(*revision),
            };
            if !holds {
                return Ok(TxnOutcome::Conflict { key: key.clone(), found });
            }
        }
        if txn.ops.is_empty() && txn.events.is_empty() {
            return Ok(TxnOutcome::Committed(Revision(self.revision)));
        }
        self.revision += 1;
        for op in &txn.ops {
            match op {
                Op::Put { key, value } => self.put(key, value)?,
                Op::Delete { key } => self.delete(key)?,
            }
        }
        if self.room == Room::Ample || self.room_for_events(&txn.events)? {
            txn.events.iter().try_for_each(|draft| self.append(draft))?;
        }
        Ok(TxnOutcome::Committed(Revision(self.revision)))
    }

    fn put(&mut self, key: &str, value: &[u8]) -> Result<()> {
        let what = || format!("state store: writing {key}");
        let text =
            std::str::from_utf8(value).map_err(|error| Error::new(Kind::InvalidArgument, what()).because(error))?;
        let revision = to_sql(self.revision)?;
        let done = match rows::find(self.conn, key)? {
            Some(row) => self
                .conn
                .prepare_cached("UPDATE kv SET revision = ?2, value = ?3 WHERE id = ?1")
                .and_then(|mut statement| statement.execute((row.id, revision, text))),
            None if self.room == Room::DeletesOnly => return Err(no_room(key)),
            None => self
                .conn
                .prepare_cached("INSERT INTO kv (key, revision, value) VALUES (?1, ?2, ?3)")
                .and_then(|mut statement| statement.execute((key, revision, text))),
        };
        done.map_err(|error| sql(what(), error))?;
        self.log_change(key, Some(text)).map_err(|error| sql(what(), error))
    }

    fn delete(&mut self, key: &str) -> Result<()> {
        let what = || format!("state store: deleting {key}");
        let Some(row) = rows::find(self.conn, key)? else { return Ok(()) };
        self.conn
            .prepare_cached("DELETE FROM kv WHERE id = ?1")
            .and_then(|mut statement| statement.execute([row.id]))
            .map_err(|error| sql(what(), error))?;
        self.log_change(key, None).map_err(|error| sql(what(), error))
    }

    fn log_change(&mut self, key: &str, value: Option<&str>) -> rusqlite::Result<()> {
        let revision = Revision(self.revision);
        self.conn.prepare_cached("INSERT INTO changes (revision, key, value) VALUES (?1, ?2, ?3)")?.execute((
            self.revision.cast_signed(),
            key,
            value,
        ))?;
        self.changes.push(Change { key: key.to_owned(), value: value.map(|text| text.as_bytes().to_vec()), revision });
        Ok(())
    }

    fn append(&mut self, draft: &Draft) -> Result<()> {
        let event = draft.committed(Revision(self.revision));
        let what = || format!("event log: writing {} of {}", event.kind, event.about);
        let body = serde_json::to_string(&event).map_err(|error| Error::new(Kind::Internal, what()).because(error))?;
        let row = (to_sql(event.id.0)?, event.about.id(), &event.kind, to_sql(event.time.0)?, body);
        self.conn
            .prepare_cached("INSERT INTO events (id, vm, kind, time, body) VALUES (?1, ?2, ?3, ?4, ?5)")
            .and_then(|mut statement| statement.execute(row))
            .map_err(|error| sql(what(), error))?;
        self.events.push((from_sql(self.conn.last_insert_rowid())?, event));
        Ok(())
    }

    /// On a full disk events take the pages of the oldest. Where too few can be had they are dropped, so that a delete goes
    /// through all the same.
    fn room_for_events(&mut self, events: &[Draft]) -> Result<bool> {
        let look = |error| sql("event log: looking for room", error);
        let free = |conn: &Connection| conn.query_row("PRAGMA freelist_count", [], |row| row.get::<_, i64>(0));
        if events.is_empty() || free(self.conn).map_err(look)? >= FREE_PAGES {
            return Ok(true);
        }
        self.drop_events(
            "DELETE FROM events WHERE seq IN
                 (SELECT seq FROM events ORDER BY kind IN (?2, ?3) DESC, seq LIMIT ?1) RETURNING id",
            (OLDEST_ON_A_FULL_DISK, EXEC, ATTACH),
        )?;
        let room = free(self.conn).map_err(look)? >= FREE_PAGES;
        if !room {
            tracing::warn!(count = events.len(), "events dropped: the disk is full");
        }
        Ok(room)
    }

    /// Drops what is beyond `kept` and writes the counters down.
    pub(crate) fn finish(&mut self, kept: &Kept) -> Result<()> {
        self.trim_events(kept)?;
        let write = |error| sql("state store: writing its counters", error);
        let keep = if self.room == Room::Ample { kept.changes } else { kept.changes.min(CHANGES_ON_A_FULL_DISK) };
        // Not at every commit: a quarter more than is kept is the price of trimming a quarter at a time.
        if self.revision - self.changes_floor > keep + keep / 4 {
            self.changes_floor = self.revision.saturating_sub(keep);
            let floor = to_sql(self.changes_floor)?;
            self.conn.execute("DELETE FROM changes WHERE revision <= ?1", [floor]).map_err(write)?;
            schema::set_meta(self.conn, "changes_floor", floor).map_err(write)?;
        }
        schema::set_meta(self.conn, "revision", to_sql(self.revision)?).map_err(write)
    }

    fn trim_events(&mut self, kept: &Kept) -> Result<()> {
        let Some((last, newest)) = self.events.last().cloned() else { return Ok(()) };
        let write = |error| sql("event log: dropping old events", error);
        let oldest: Option<i64> = self
            .conn
            .prepare_cached("SELECT time FROM events ORDER BY seq LIMIT 1")
            .and_then(|mut statement| statement.query_row([], |row| row.get(0)).optional())
            .map_err(write)?;
        let Some(time) = oldest else { return Ok(()) };
        // Measured against the newest event, so that the log needs no clock.
        let too_old = Timestamp(newest.time.0.saturating_sub(Timestamp(0).after(kept.events_age).0));
        if from_sql(time)? < too_old.0 {
            self.drop_events(
                "DELETE FROM events WHERE time < ?1 AND seq < ?2 RETURNING id",
                (to_sql(too_old.0).unwrap_or(0), last.cast_signed()),
            )?;
        }
        let written = u64::try_from(self.events.len()).unwrap_or(u64::MAX);
        for (execs, keep) in [(true, kept.execs), (false, kept.events)] {
            // Not at every commit: to count is to read the whole log. An eighth more than is kept is the price.
            let step = (keep / 8).max(1);
            if last / step != last.saturating_sub(written) / step {
                self.drop_events(
                    "DELETE FROM events WHERE (kind IN (?1, ?2)) = ?3 AND seq <=
                         (SELECT seq FROM events WHERE (kind IN (?1, ?2)) = ?3 ORDER BY seq DESC LIMIT 1 OFFSET ?4)
                     RETURNING id",
                    (EXEC, ATTACH, execs, to_sql(keep)?),
                )?;
            }
        }
        Ok(())
    }

    /// `text` returns the ids that it drops; watchers that far back are told.
    fn drop_events(&mut self, text: &str, parameters: impl rusqlite::Params) -> Result<()> {
        let write = |error| sql("event log: dropping old events", error);
        let gone: Option<i64> = self
            .conn
            .prepare_cached(text)
            .and_then(|mut statement| {
                let ids = statement.query_map(parameters, |row| row.get(0))?;
                ids.collect::<rusqlite::Result<Vec<i64>>>()
            })
            .map_err(write)?
            .into_iter()
            .max();
        if let Some(id) = gone {
            self.events_floor = self.events_floor.max(from_sql(id)?);
            schema::set_meta(self.conn, "events_floor", to_sql(self.events_floor)?).map_err(write)?;
        }
        Ok(())
    }
}

fn no_room(key: &str) -> Error {
    Error::new(Kind::Exhausted, format!("state store: adding {key}: the disk is full"))
        .hint("free some space on the state directory's filesystem, or delete VMs")
}
