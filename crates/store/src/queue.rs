//! The way to the writer: bounded, and taken by the batch.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use clawpot_core::ports::{Txn, TxnOutcome};
use clawpot_types::Result;
use tokio::sync::{Semaphore, oneshot};

use crate::error;

/// Jobs that may wait; whoever comes later waits outside.
const DEPTH: usize = 1024;
/// Jobs of one commit.
const BATCH: usize = 256;
pub(crate) struct Job {
    pub(crate) txn: Txn,
    pub(crate) reply: oneshot::Sender<Result<TxnOutcome>>,
}

pub(crate) struct Queue {
    room: Semaphore,
    waiting: Mutex<Waiting>,
    came: Condvar,
}

struct Waiting {
    jobs: VecDeque<Job>,
    closed: bool,
}

/// What the writer is woken for.
pub(crate) enum Woken {
    Batch(Vec<Job>),
    /// Nothing came for the time it wanted to wait.
    Idle,
    Closed,
}

impl Queue {
    pub(crate) fn new() -> Self {
        let waiting = Waiting { jobs: VecDeque::new(), closed: false };
        Self { room: Semaphore::new(DEPTH), waiting: Mutex::new(waiting), came: Condvar::new() }
    }

    /// Waits for room. Cancelled before that, nothing was queued.
    pub(crate) async fn push(&self, job: Job) -> Result<()> {
        let permit = self.room.acquire().await.map_err(|_| error::closed())?;
        let mut waiting = self.lock();
        if waiting.closed {
            return Err(error::closed());
        }
        // Given back by `take`.
        permit.forget();
        waiting.jobs.push_back(job);
        drop(waiting);
        self.came.notify_one();
        Ok(())
    }

    /// For the writer alone. `idle`: come back after that long even when there is nothing. What was queued before
    /// [`Self::close`] is still handed out.
    pub(crate) fn take(&self, idle: Option<Duration>) -> Woken {
        let mut waiting = self.lock();
        while waiting.jobs.is_empty() && !waiting.closed {
            waiting = match idle {
                Some(patience) => {
                    let (waiting, timeout) =
                        self.came.wait_timeout(waiting, patience).unwrap_or_else(PoisonError::into_inner);
                    if timeout.timed_out() && waiting.jobs.is_empty() && !waiting.closed {
                        return Woken::Idle;
                    }
                    waiting
                }
                None => self.came.wait(waiting).unwrap_or_else(PoisonError::into_inner),
            };
        }
        if waiting.jobs.is_empty() {
            return Woken::Closed;
        }
        let count = waiting.jobs.len().min(BATCH);
        let batch: Vec<Job> = waiting.jobs.drain(..count).collect();
        drop(waiting);
        self.room.add_permits(count);
        Woken::Batch(batch)
    }

    /// Nothing more is taken in.
    pub(crate) fn close(&self) {
        self.lock().closed = true;
        self.room.close();
        self.came.notify_one();
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
