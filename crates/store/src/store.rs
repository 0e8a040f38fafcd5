//! The front: what callers hold.

use std::collections::{BTreeSet, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use async_trait::async_trait;
use clawpot_core::event::Event;
use clawpot_core::ports::{BoxStream, Change, Entry, EventLog, Listing, Op, StateStore, Txn, TxnOutcome};
use clawpot_types::{Error, Kind, Result, Revision, VmId};
use futures_util::StreamExt as _;
use rusqlite::Connection;
use tokio::sync::oneshot;

use crate::apply::{Kept, Room};
use crate::ballast::Ballast;
use crate::error::{closed, from_sql, sql};
use crate::hub::{Hub, Live, Positions, Written};
use crate::lock::StateLock;
use crate::queue::{Job, Queue};
use crate::readers::Readers;
use crate::rows::{self, Cursor, WHOLE};
use crate::schema;
use crate::writer::Writer;

/// Longest key, bytes. Ours are below 100.
const KEY_MAX: usize = 256;
/// Largest value, bytes: below etcd's limit for a whole request (1.5 MiB), so that what fits here fits there.
const VALUE_MAX: usize = 1 << 20;

/// How much is kept. Each number is a choice, not a measurement.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Revisions that a watcher can go back. A record has 1 to 2 KiB, so this is about 10 MiB.
    pub changes_kept: u64,
    /// Of all kinds but those of commands ([`clawpot_core::event::is_of_a_command`]).
    pub events_kept: u64,
    /// Of that kind.
    pub execs_kept: u64,
    /// Counted back from the newest event.
    pub events_age: Duration,
    /// Held back on disk so that VMs can be deleted when it is full: some hundred deletes.
    pub ballast_bytes: u64,
    /// Changes that may wait for a watcher before it is closed with `Compacted`.
    pub watcher_backlog: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            changes_kept: 8192,
            events_kept: 20_000,
            execs_kept: 10_000,
            events_age: Duration::from_secs(30 * 24 * 3600),
            ballast_bytes: 4 << 20,
            watcher_backlog: 1024,
        }
    }
}

/// `STATE/state.db`. Dropping it commits what was queued and closes the file.
pub struct SqliteStore {
    queue: Arc<Queue>,
    hub: Arc<Hub>,
    readers: Arc<Readers>,
    epoch: u64,
    options: Options,
    writer: Option<JoinHandle<()>>,
}

impl std::fmt::Debug for SqliteStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SqliteStore").field("epoch", &self.epoch).finish_non_exhaustive()
    }
}

/// Where the database of a state directory is.
#[must_use]
pub fn path(state_dir: &Path) -> PathBuf {
    state_dir.join("state.db")
}

impl SqliteStore {
    /// Opens the store of the locked directory, and makes it or brings it up to date. Blocks: call it at the start.
    /// On a full disk an existing store opens, and takes deletes only.
    ///
    /// # Errors
    /// `Unsupported`: written by a newer server; `Corrupt`: not a database, or not one of ours; `PermissionDenied`;
    /// `Exhausted`: no room to make a new one.
    pub fn open(lock: &StateLock, options: Options) -> Result<Self> {
        let ballast = Ballast::new(lock.dir(), options.ballast_bytes);
        let path = path(lock.dir());
        let conn = match schema::open(&path) {
            Err(error) if error.kind() == Kind::Exhausted => {
                ballast.free()?;
                schema::open(&path)?
            }
            other => other?,
        };
        let room = match ballast.take() {
            Ok(()) => Room::Ample,
            Err(error) => {
                tracing::error!(
                    error = error.chain(),
                    "state store: the disk is full; VMs can be deleted, not created"
                );
                Room::DeletesOnly
            }
        };
        let epoch = u64::from_ne_bytes(schema::meta(&conn, "epoch")?.to_ne_bytes());
        let hub = Arc::new(Hub::new(&positions(&conn)?));
        let readers = Arc::new(Readers::open(&path)?);
        let queue = Arc::new(Queue::new());
        let kept = Kept {
            changes: options.changes_kept,
            events: options.events_kept,
            execs: options.execs_kept,
            events_age: options.events_age,
        };
        let writer = Writer::new(conn, Arc::clone(&hub), ballast, room, kept);
        let served = Arc::clone(&queue);
        let writer = std::thread::Builder::new()
            .name("store-writer".to_owned())
            .spawn(move || writer.run(served))
            .map_err(|error| Error::io("state store: starting its writer", error))?;
        Ok(Self { queue, hub, readers, epoch, options, writer: Some(writer) })
    }

    /// Readers see a commit before the writer publishes it: where that leaves a doubt, what is on disk decides.
    async fn check_not_ahead(&self, from: Revision) -> Result<()> {
        if from.0 <= self.hub.changes().position() {
            return Ok(());
        }
        let revision = self.readers.with(|conn| from_sql(schema::meta(conn, "revision")?)).await?;
        if from.0 <= revision {
            return Ok(());
        }
        let text = format!("state store: revision {from} is ahead of its {revision}: it is of another store");
        Err(Error::new(Kind::Compacted, text).hint("list again and watch from the revision of the list"))
    }
}

impl Drop for SqliteStore {
    fn drop(&mut self) {
        self.queue.close();
        if self.writer.take().is_some_and(|writer| writer.join().is_err()) {
            tracing::error!("state store: its writer had panicked");
        }
    }
}

fn positions(conn: &Connection) -> Result<Positions> {
    let event_seq: i64 = conn
        .query_row("SELECT coalesce(max(seq), 0) FROM events", [], |row| row.get(0))
        .map_err(|error| sql("event log: reading its end", error))?;
    Ok(Positions {
        revision: from_sql(schema::meta(conn, "revision")?)?,
        changes_floor: from_sql(schema::meta(conn, "changes_floor")?)?,
        event_seq: from_sql(event_seq)?,
        events_floor: from_sql(schema::meta(conn, "events_floor")?)?,
    })
}

#[async_trait]
impl StateStore for SqliteStore {
    async fn get(&self, key: &str) -> Result<Option<Entry>> {
        let key = key.to_owned();
        self.readers.with(move |conn| rows::get(conn, &key)).await
    }

    async fn list(&self, prefix: &str) -> Result<Listing> {
        let prefix = prefix.to_owned();
        self.readers.with(move |conn| rows::list(conn, &prefix)).await
    }

    async fn txn(&self, txn: Txn) -> Result<TxnOutcome> {
        check(&txn)?;
        let (reply, answer) = oneshot::channel();
        self.queue.push(Job { txn, reply }).await?;
        answer.await.map_err(|_| closed())?
    }

    async fn watch(&self, prefix: &str, from: Revision) -> Result<BoxStream<Result<Change>>> {
        self.check_not_ahead(from).await?;
        let prefix = prefix.to_owned();
        let wanted = prefix.clone();
        let (live, until) = {
            let mut topic = self.hub.changes();
            check_floor(from, topic.floor())?;
            // The caller may have read what is committed and not published yet: it is not told again.
            let wants = move |change: &Change| change.revision > from && change.key.starts_with(&wanted);
            (topic.subscribe(self.options.watcher_backlog, wants), topic.position())
        };
        let page = move |conn: &Connection, cursor: Cursor| rows::changes(conn, &prefix, cursor, until);
        Ok(watching(Arc::clone(&self.readers), Arc::new(page), (from.0, WHOLE), live))
    }

    fn epoch(&self) -> u64 {
        self.epoch
    }
}

#[async_trait]
impl EventLog for SqliteStore {
    /// A page never ends between two events of one id, so that the last id is where the next page begins.
    async fn list(&self, vm: Option<&VmId>, after: Revision, limit: usize) -> Result<Vec<Event>> {
        let vm = vm.cloned();
        self.readers.with(move |conn| events_page(conn, vm.as_ref(), after, limit)).await
    }

    async fn watch(&self, vm: Option<&VmId>, after: Revision) -> Result<BoxStream<Result<Event>>> {
        let vm = vm.cloned();
        let wanted = vm.clone();
        let (live, until) = {
            let mut topic = self.hub.events();
            check_floor(after, topic.floor())?;
            let live = topic.subscribe(self.options.watcher_backlog, move |(_, event): &Written| {
                event.id > after && wanted.as_ref().is_none_or(|vm| event.about.is_vm(vm))
            });
            (live, topic.position())
        };
        let page = move |conn: &Connection, cursor: Cursor| rows::events_watched(conn, vm.as_ref(), cursor, until);
        let events = watching(Arc::clone(&self.readers), Arc::new(page), (after.0, WHOLE), live);
        Ok(events.map(|written| written.map(|(_, event)| event)).boxed())
    }
}

fn events_page(conn: &Connection, vm: Option<&VmId>, after: Revision, limit: usize) -> Result<Vec<Event>> {
    let all = WHOLE;
    let mut page = rows::events(conn, vm, (after.0, WHOLE), all, limit.saturating_add(1))?;
    if page.len() > limit {
        let cut = page[limit].0.0;
        page.retain(|((id, _), _)| *id < cut);
        if page.is_empty() && limit > 0 {
            // More events of one id than a page holds; ids are few, so the page is made larger.
            page = rows::events(conn, vm, (after.0, WHOLE), all, usize::MAX)?;
            page.retain(|((id, _), _)| *id == cut);
        }
    }
    Ok(page.into_iter().map(|(_, (_, event))| event).collect())
}

fn check_floor(from: Revision, floor: u64) -> Result<()> {
    if from.0 < floor { Err(rows::compacted(from.0, floor)) } else { Ok(()) }
}

/// Keys and values as the port promises them; each key, and each kind of event of a VM, at most once.
fn check(txn: &Txn) -> Result<()> {
    let mut told = BTreeSet::new();
    if let Some(twice) = txn.events.iter().find(|event| !told.insert((event.about.id(), event.kind))) {
        let text = format!("state store: event {} of {} twice in one transaction", twice.kind, twice.about);
        return Err(Error::new(Kind::InvalidArgument, text));
    }
    let mut seen = BTreeSet::new();
    for guard in &txn.guards {
        check_key(&guard.key)?;
    }
    for op in &txn.ops {
        let (Op::Put { key, .. } | Op::Delete { key }) = op;
        check_key(key)?;
        if !seen.insert(key) {
            let text = format!("state store: key {key} twice in one transaction");
            return Err(Error::new(Kind::InvalidArgument, text));
        }
        if let Op::Put { value, .. } = op {
            check_value(key, value)?;
        }
    }
    Ok(())
}

fn check_key(key: &str) -> Result<()> {
    if (1..=KEY_MAX).contains(&key.len()) && key.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Ok(());
    }
    let shown: String = key.chars().take(40).collect();
    let text = format!("state store: key {shown:?}: must be 1 to {KEY_MAX} printable ASCII characters without spaces");
    Err(Error::new(Kind::InvalidArgument, text))
}

fn check_value(key: &str, value: &[u8]) -> Result<()> {
    let refused = |why: String| Error::new(Kind::InvalidArgument, format!("state store: value of {key}: {why}"));
    if value.len() > VALUE_MAX {
        return Err(refused(format!("{} bytes, the limit is {VALUE_MAX}", value.len())));
    }
    rows::check_json(value).map_err(|error| refused("not JSON".to_owned()).because(error))
}

/// Reads a page of a backlog.
type Page<T> = Arc<dyn Fn(&Connection, Cursor) -> Result<Vec<(Cursor, T)>> + Send + Sync>;

struct Watching<T> {
    readers: Arc<Readers>,
    page: Page<T>,
    cursor: Cursor,
    ready: VecDeque<T>,
    backlog_done: bool,
    live: Live<T>,
}

/// What is on disk after `cursor`, then what comes; ends after the first error.
fn watching<T: Clone + Send + 'static>(
    readers: Arc<Readers>,
    page: Page<T>,
    cursor: Cursor,
    live: Live<T>,
) -> BoxStream<Result<T>> {
    let start = Watching { readers, page, cursor, ready: VecDeque::new(), backlog_done: false, live };
    futures_util::stream::unfold(Some(start), |state| async move {
        let mut state = state?;
        match state.next().await {
            Ok(thing) => Some((Ok(thing), Some(state))),
            Err(error) => Some((Err(error), None)),
        }
    })
    .boxed()
}

impl<T: Clone + Send + 'static> Watching<T> {
    async fn next(&mut self) -> Result<T> {
        loop {
            if let Some(thing) = self.ready.pop_front() {
                return Ok(thing);
            }
            if self.backlog_done {
                return self.live.next().await;
            }
            let (page, cursor) = (Arc::clone(&self.page), self.cursor);
            let things = self.readers.with(move |conn| page(conn, cursor)).await?;
            match things.last() {
                Some((last, _)) => self.cursor = *last,
                None => self.backlog_done = true,
            }
            self.ready.extend(things.into_iter().map(|(_, thing)| thing));
        }
    }
}
