//! The one thread that writes: group commit, publishing, and room for deletes on a full disk.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::apply::{Batch, Kept, Room};
use crate::ballast::Ballast;
use crate::error::{closed, sql};
use crate::hub::Hub;
use crate::queue::{Job, Queue, Woken};
use clawpot_core::ports::{Durability, TxnOutcome};
use clawpot_failpoint::{self as failpoint, Point};
use clawpot_types::{Kind, Result};
use rusqlite::{Connection, TransactionBehavior};

/// Commits between two checkpoints. At one or two pages each, the log stays within a few MiB.
const CHECKPOINT_EVERY: u32 = 256;
/// Between two looks whether the disk has room for the ballast again.
const BALLAST_RETRY: Duration = Duration::from_secs(2);

pub(crate) struct Writer {
    pub(crate) conn: Connection,
    pub(crate) hub: Arc<Hub>,
    pub(crate) ballast: Ballast,
    pub(crate) room: Room,
    pub(crate) kept: Kept,
    /// What `PRAGMA synchronous` was last set to.
    synchronous: Option<Durability>,
    commits_since_checkpoint: u32,
}

/// Closes what the writer serves however it ends, so that nobody waits for it.
struct CloseAtEnd(Arc<Queue>, Arc<Hub>);

impl Drop for CloseAtEnd {
    fn drop(&mut self) {
        self.0.close();
        while let Woken::Batch(jobs) = self.0.take(None) {
            drop(jobs);
        }
        self.1.close();
    }
}

impl Writer {
    pub(crate) fn new(conn: Connection, hub: Arc<Hub>, ballast: Ballast, room: Room, kept: Kept) -> Self {
        Self { conn, hub, ballast, room, kept, synchronous: None, commits_since_checkpoint: 0 }
    }

    /// Until the queue is closed and empty.
    pub(crate) fn run(mut self, queue: Arc<Queue>) {
        let _close = CloseAtEnd(Arc::clone(&queue), Arc::clone(&self.hub));
        let mut looked = Instant::now();
        loop {
            let idle = (self.room == Room::DeletesOnly).then_some(BALLAST_RETRY);
            match queue.take(idle) {
                Woken::Batch(jobs) => {
                    self.serve(jobs);
                    self.checkpoint_if_due();
                }
                Woken::Idle => {}
                Woken::Closed => return,
            }
            // Also when it is never idle.
            if self.room == Room::DeletesOnly && looked.elapsed() >= BALLAST_RETRY {
                self.retake_ballast();
                looked = Instant::now();
            }
        }
    }

    fn serve(&mut self, jobs: Vec<Job>) {
        if jobs.len() > 1 {
            match self.commit(&jobs) {
                Ok(outcomes) => {
                    for (job, outcome) in jobs.into_iter().zip(outcomes) {
                        answer(job, Ok(outcome));
                    }
                    return;
                }
                Err(error) => tracing::debug!(error = error.chain(), "a batch failed; its members are tried alone"),
            }
        }
        // One member's failure is not the others'.
        for job in jobs {
            let outcome = self.alone(&job);
            answer(job, outcome);
        }
    }

    fn alone(&mut self, job: &Job) -> Result<TxnOutcome> {
        let one = std::slice::from_ref(job);
        let outcome = match self.commit(one) {
            Err(error) if error.kind() == Kind::Exhausted && self.room == Room::Ample => {
                self.give_up_ballast();
                self.commit(one)
            }
            other => other,
        };
        // One for each member.
        outcome.and_then(|mut outcomes| outcomes.pop().ok_or_else(closed))
    }

    /// All of `jobs` in one transaction, or none. Publishes what was committed.
    fn commit(&mut self, jobs: &[Job]) -> Result<Vec<TxnOutcome>> {
        let write = |error| sql("state store: committing", error);
        self.set_synchronous(jobs)?;
        let tx = self.conn.transaction_with_behavior(TransactionBehavior::Immediate).map_err(write)?;
        let mut batch = Batch::begin(&tx, self.room)?;
        let before = batch.revision;
        let mut outcomes = Vec::with_capacity(jobs.len());
        for job in jobs {
            outcomes.push(batch.txn(&job.txn)?);
        }
        if batch.revision == before {
            // Nothing to write: conflicts.
            return Ok(outcomes);
        }
        batch.finish(&self.kept)?;
        let Batch { revision, changes_floor, events_floor, changes, events, .. } = batch;
        failpoint::reached(Point::StoreWritten);
        tx.commit().map_err(write)?;
        failpoint::reached(Point::StoreCommitted);
        self.commits_since_checkpoint += 1;
        self.hub.changes().publish(&changes, revision, changes_floor);
        let mut topic = self.hub.events();
        let seq = events.last().map_or(topic.position(), |(seq, _)| *seq);
        topic.publish(&events, seq, events_floor);
        Ok(outcomes)
    }

    fn set_synchronous(&mut self, jobs: &[Job]) -> Result<()> {
        let full = jobs.iter().any(|job| job.txn.durability == Durability::Full);
        let wanted = if full { Durability::Full } else { Durability::Normal };
        if self.synchronous != Some(wanted) {
            let level = if full { "FULL" } else { "NORMAL" };
            self.conn
                .pragma_update(None, "synchronous", level)
                .map_err(|error| sql("state store: setting its durability", error))?;
            self.synchronous = Some(wanted);
        }
        Ok(())
    }

    /// After the answers, so that nobody waits for it. With a full disk after each batch: only a log that was copied
    /// back is begun anew instead of growing.
    fn checkpoint_if_due(&mut self) {
        if self.commits_since_checkpoint < CHECKPOINT_EVERY && self.room == Room::Ample {
            return;
        }
        self.commits_since_checkpoint = 0;
        if let Err(error) = self.conn.query_row("PRAGMA wal_checkpoint(PASSIVE)", [], |_| Ok(())) {
            tracing::warn!(
                error = error.to_string(),
                "state store: a checkpoint failed; the log grows until one works"
            );
        }
    }

    fn give_up_ballast(&mut self) {
        self.room = Room::DeletesOnly;
        match self.ballast.free() {
            Ok(()) => tracing::error!("state store: the disk is full; VMs can be deleted and no longer created"),
            Err(error) => tracing::error!(error = error.chain(), "state store: the disk is full"),
        }
        // What the log holds is copied back, so that it can begin anew in the space it has.
        self.checkpoint_if_due();
    }

    fn retake_ballast(&mut self) {
        if self.ballast.has_room() && self.ballast.take().is_ok() {
            self.room = Room::Ample;
            tracing::info!("state store: the disk has room again");
        }
    }
}

fn answer(job: Job, outcome: Result<TxnOutcome>) {
    if job.reply.send(outcome).is_err() {
        tracing::trace!("whoever asked has gone; the transaction stands");
    }
}
