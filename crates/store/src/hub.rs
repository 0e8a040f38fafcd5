//! Who watches, and how they are told: by the writer, after the commit, without ever waiting for them.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use clawpot_core::event::Event;
use clawpot_core::ports::Change;
use clawpot_types::{Error, Kind};
use tokio::sync::mpsc;

use crate::error;

/// One kind of thing that is watched.
pub(crate) struct Topic<T> {
    /// Of the last thing published.
    position: u64,
    /// Things up to it are no longer kept.
    floor: u64,
    watchers: Vec<Watcher<T>>,
    closed: bool,
}

struct Watcher<T> {
    wants: Box<dyn Fn(&T) -> bool + Send>,
    send: mpsc::Sender<T>,
    lagged: Arc<AtomicBool>,
}

/// The watcher's end.
pub(crate) struct Live<T> {
    receive: mpsc::Receiver<T>,
    lagged: Arc<AtomicBool>,
}

impl<T> Live<T> {
    /// The next thing, or why there is none.
    pub(crate) async fn next(&mut self) -> Result<T, Error> {
        if let Some(thing) = self.receive.recv().await {
            return Ok(thing);
        }
        if self.lagged.load(Ordering::Acquire) {
            return Err(Error::new(Kind::Compacted, "watching the state store: the watcher is too slow")
                .hint("list again and watch from there"));
        }
        Err(error::closed())
    }
}

impl<T: Clone> Topic<T> {
    fn new(position: u64, floor: u64) -> Self {
        Self { position, floor, watchers: Vec::new(), closed: false }
    }

    /// A watcher whose queue is full is closed; it drains what it has and then learns that it was too slow.
    pub(crate) fn publish(&mut self, things: &[T], position: u64, floor: u64) {
        self.position = position;
        self.floor = floor;
        self.watchers.retain(|watcher| {
            things.iter().filter(|thing| (watcher.wants)(thing)).all(|thing| {
                let told = watcher.send.try_send(thing.clone());
                if matches!(told, Err(mpsc::error::TrySendError::Full(_))) {
                    watcher.lagged.store(true, Ordering::Release);
                }
                told.is_ok()
            }) && !watcher.send.is_closed()
        });
    }

    /// From now on; everything up to [`Self::position`] is committed and can be read.
    pub(crate) fn subscribe(&mut self, backlog: usize, wants: impl Fn(&T) -> bool + Send + 'static) -> Live<T> {
        let (send, receive) = mpsc::channel(backlog);
        let lagged = Arc::new(AtomicBool::new(false));
        if !self.closed {
            self.watchers.push(Watcher { wants: Box::new(wants), send, lagged: Arc::clone(&lagged) });
        }
        Live { receive, lagged }
    }

    pub(crate) fn position(&self) -> u64 {
        self.position
    }

    pub(crate) fn floor(&self) -> u64 {
        self.floor
    }

    fn close(&mut self) {
        self.closed = true;
        self.watchers.clear();
    }
}

/// Numbered in the order of writing, which is the order of ids too; several may have one id.
pub(crate) type Written = (u64, Event);

/// Where each topic was when the store was opened.
pub(crate) struct Positions {
    pub(crate) revision: u64,
    pub(crate) changes_floor: u64,
    /// Of the last event written.
    pub(crate) event_seq: u64,
    /// Highest id of an event that is no longer kept.
    pub(crate) events_floor: u64,
}

pub(crate) struct Hub {
    changes: Mutex<Topic<Change>>,
    events: Mutex<Topic<Written>>,
}

impl Hub {
    pub(crate) fn new(at: &Positions) -> Self {
        Self {
            changes: Mutex::new(Topic::new(at.revision, at.changes_floor)),
            events: Mutex::new(Topic::new(at.event_seq, at.events_floor)),
        }
    }

    pub(crate) fn changes(&self) -> MutexGuard<'_, Topic<Change>> {
        self.changes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn events(&self) -> MutexGuard<'_, Topic<Written>> {
        self.events.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn close(&self) {
        self.changes().close();
        self.events().close();
    }
}
