//! The contract of `StateStore` and `EventLog` as a suite: what [`clawpot_core::ports`] promises, asked of an implementation.
//!
//! ```ignore
//! fn subject() -> Subject { … }                       // a new, empty store each time
//! clawpot_testkit::store_conformance!(subject);       // one #[tokio::test] per promise
//! ```
//! Each case is an `async fn(Subject)` in [`state`] and [`events`] and panics where the promise is broken.

// A suite fails by panicking, as a test does.
#![allow(clippy::unwrap_used, reason = "these are tests that several crates share")]

pub mod events;
pub mod state;

use std::any::Any;
use std::sync::Arc;
use std::time::Duration;

use clawpot_core::ports::{BoxStream, Durability, EventLog, Expect, Guard, Op, StateStore, Txn, TxnOutcome};
use clawpot_types::{Result, Revision};
use futures_util::StreamExt as _;

/// A new, empty store and its event log.
pub struct Subject {
    pub store: Arc<dyn StateStore>,
    pub events: Arc<dyn EventLog>,
    /// At least so many revisions are kept for watchers, and at most half as many again.
    pub changes_kept: u64,
    /// Of events, likewise.
    pub events_kept: usize,
    /// Of events of commands, likewise.
    pub execs_kept: usize,
    pub events_age: Duration,
    /// Dropped last: the directory that it lives in.
    pub keep: Box<dyn Any + Send + Sync>,
}

impl std::fmt::Debug for Subject {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Subject").field("changes_kept", &self.changes_kept).finish_non_exhaustive()
    }
}

/// How long a stream may take to say what it has to say.
const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) fn put(key: &str, value: &str) -> Op {
    Op::Put { key: key.to_owned(), value: value.as_bytes().to_vec() }
}

pub(crate) fn delete(key: &str) -> Op {
    Op::Delete { key: key.to_owned() }
}

pub(crate) fn absent(key: &str) -> Guard {
    Guard { key: key.to_owned(), expect: Expect::Absent }
}

pub(crate) fn at(key: &str, revision: Revision) -> Guard {
    Guard { key: key.to_owned(), expect: Expect::Revision(revision) }
}

pub(crate) fn txn(guards: Vec<Guard>, ops: Vec<Op>) -> Txn {
    Txn { guards, ops, events: Vec::new(), durability: Durability::Normal }
}

/// A transaction that must commit.
pub(crate) async fn commit(store: &Arc<dyn StateStore>, guards: Vec<Guard>, ops: Vec<Op>) -> Revision {
    match store.txn(txn(guards, ops)).await.unwrap() {
        TxnOutcome::Committed(revision) => revision,
        conflict @ TxnOutcome::Conflict { .. } => panic!("{conflict:?}"),
    }
}

/// The next thing of a stream, which must come soon.
pub(crate) async fn next<T>(stream: &mut BoxStream<Result<T>>) -> Result<T> {
    tokio::time::timeout(PATIENCE, stream.next()).await.expect("nothing came").expect("the stream ended")
}

/// The next `count` things, none of them an error.
pub(crate) async fn take<T>(stream: &mut BoxStream<Result<T>>, count: usize) -> Vec<T> {
    let mut things = Vec::new();
    while things.len() < count {
        things.push(next(stream).await.unwrap());
    }
    things
}

/// Nothing comes, for a moment that is long for a store.
pub(crate) async fn quiet<T>(stream: &mut BoxStream<Result<T>>) {
    let came = tokio::time::timeout(Duration::from_millis(50), stream.next()).await;
    assert!(came.is_err(), "something came that should not");
}

/// A test for each promise. `$subject`: a `fn() -> Subject`.
#[macro_export]
macro_rules! store_conformance {
    ($subject:path) => {
        $crate::store_conformance!(@cases $subject, state:
            a_missing_key_is_none, what_is_put_is_read_back, revisions_count_by_one, guards_are_all_or_nothing,
            a_transaction_has_one_revision, deleting_nothing_is_nothing, a_prefix_is_a_prefix, bad_input_is_refused,
            large_values_fit, of_two_creators_one_wins, compare_and_swap_loses_nothing, a_model_agrees,
            a_watcher_sees_what_comes, a_watcher_sees_what_was, a_watcher_misses_nothing_while_others_write,
            list_and_watch_make_a_projection, below_the_floor_is_compacted, ahead_of_the_store_is_compacted,
            a_slow_watcher_is_told, a_dropped_transaction_harms_nobody, another_store_has_another_epoch);
        $crate::store_conformance!(@cases $subject, events:
            events_come_back_in_order, an_event_is_part_of_its_transaction, one_event_of_a_kind,
            ids_are_in_order_whoever_writes, events_are_found_by_vm, pages_lose_nothing, old_events_go_by_count,
            commands_push_out_only_commands, old_events_go_by_age, an_event_watcher_sees_was_and_comes,
            an_event_watcher_below_the_floor_is_told);
    };
    (@cases $subject:path, $module:ident: $($case:ident),*) => {
        mod $module {
            $(
                #[tokio::test]
                async fn $case() {
                    $crate::conformance::$module::$case($subject).await;
                }
            )*
        }
    };
}
