//! What `StateStore` promises.

use std::collections::BTreeMap;
use std::sync::Arc;

use clawpot_core::ports::{Change, Op, StateStore, TxnOutcome};
use clawpot_types::{Error, Kind, Result, Revision};

use super::{Subject, absent, at, commit, delete, next, put, quiet, take, txn};

/// Makes a new, empty store each time.
type Make = fn() -> Subject;

pub async fn a_missing_key_is_none(make: Make) {
    let subject = make();
    assert_eq!(subject.store.get("vms/a").await.unwrap(), None);
    let listing = subject.store.list("").await.unwrap();
    assert!(listing.entries.is_empty() && listing.unreadable.is_empty());
    assert_eq!(listing.revision, Revision(0));
}

pub async fn what_is_put_is_read_back(make: Make) {
    let subject = make();
    let value = r#"{"name":"ä \u0000","n":[1,2.5,null]}"#;
    let revision = commit(&subject.store, vec![], vec![put("vms/a", value)]).await;
    let entry = subject.store.get("vms/a").await.unwrap().unwrap();
    assert_eq!((entry.key.as_str(), entry.value.as_slice(), entry.revision), ("vms/a", value.as_bytes(), revision));
    let listing = subject.store.list("vms/").await.unwrap();
    assert_eq!(listing.entries, [entry]);
    assert_eq!(listing.revision, revision);
}

pub async fn revisions_count_by_one(make: Make) {
    let subject = make();
    for count in 1..=5 {
        let revision = commit(&subject.store, vec![], vec![put("vms/a", &count.to_string())]).await;
        assert_eq!(revision, Revision(count));
    }
    assert_eq!(commit(&subject.store, vec![], vec![]).await, Revision(5), "without an operation nothing changes");
    let conflict = subject.store.txn(txn(vec![absent("vms/a")], vec![put("vms/a", "0")])).await.unwrap();
    assert!(matches!(conflict, TxnOutcome::Conflict { .. }));
    assert_eq!(commit(&subject.store, vec![], vec![put("vms/b", "1")]).await, Revision(6));
    assert_eq!(subject.store.get("vms/a").await.unwrap().unwrap().revision, Revision(5), "the key's, not the store's");
}

pub async fn guards_are_all_or_nothing(make: Make) {
    let subject = make();
    let store = &subject.store;
    let first = commit(store, vec![absent("a"), absent("b")], vec![put("a", "1")]).await;
    let second = commit(store, vec![at("a", first)], vec![put("a", "2")]).await;

    for (guards, key, found) in [
        (vec![at("a", first)], "a", Some(second)),
        (vec![absent("a")], "a", Some(second)),
        (vec![at("missing", first)], "missing", None),
        (vec![absent("new"), at("a", second), at("missing", first), absent("a")], "missing", None),
    ] {
        let outcome = store.txn(txn(guards, vec![put("new", "1"), delete("a")])).await.unwrap();
        assert_eq!(outcome, TxnOutcome::Conflict { key: key.to_owned(), found });
    }
    assert_eq!(store.get("new").await.unwrap(), None);
    assert_eq!(store.get("a").await.unwrap().unwrap().value, b"2");
    assert_eq!(store.list("").await.unwrap().revision, second);
}

pub async fn a_transaction_has_one_revision(make: Make) {
    let subject = make();
    let store = &subject.store;
    commit(store, vec![], vec![put("slots/1", "\"x\"")]).await;
    let ops = vec![put("vms/a", "1"), delete("slots/1"), put("names/a", "2")];
    let revision = commit(store, vec![], ops).await;
    let listing = store.list("").await.unwrap();
    let rows: Vec<_> = listing.entries.iter().map(|entry| (entry.key.as_str(), entry.revision)).collect();
    assert_eq!(rows, [("names/a", revision), ("vms/a", revision)]);
    let mut changes = store.watch("", Revision(revision.0 - 1)).await.unwrap();
    let seen = take(&mut changes, 3).await;
    let keys: Vec<_> = seen.iter().map(|change| (change.key.as_str(), change.value.is_some())).collect();
    assert_eq!(keys, [("vms/a", true), ("slots/1", false), ("names/a", true)], "in the order of the transaction");
    assert!(seen.iter().all(|change| change.revision == revision));
}

pub async fn deleting_nothing_is_nothing(make: Make) {
    let subject = make();
    let store = &subject.store;
    let mut changes = store.watch("", Revision(0)).await.unwrap();
    assert_eq!(commit(store, vec![], vec![delete("vms/a")]).await, Revision(1));
    quiet(&mut changes).await;
    commit(store, vec![], vec![put("vms/a", "1")]).await;
    assert_eq!(next(&mut changes).await.unwrap().revision, Revision(2));
}

pub async fn a_prefix_is_a_prefix(make: Make) {
    let subject = make();
    let store = &subject.store;
    for key in ["vms", "vms/", "vms/a", "vms/a/b", "vms/b", "vms/~", "vms0", "vmr/z"] {
        commit(store, vec![], vec![put(key, "1")]).await;
    }
    for (prefix, expected) in [
        ("vms/", vec!["vms/", "vms/a", "vms/a/b", "vms/b", "vms/~"]),
        ("vms/a", vec!["vms/a", "vms/a/b"]),
        ("vms/~", vec!["vms/~"]),
        ("vms", vec!["vms", "vms/", "vms/a", "vms/a/b", "vms/b", "vms/~", "vms0"]),
        ("vms/c", vec![]),
        ("%", vec![]),
        ("", vec!["vmr/z", "vms", "vms/", "vms/a", "vms/a/b", "vms/b", "vms/~", "vms0"]),
    ] {
        let listing = store.list(prefix).await.unwrap();
        let keys: Vec<_> = listing.entries.iter().map(|entry| entry.key.as_str()).collect();
        assert_eq!(keys, expected, "prefix {prefix:?}");
        let mut changes = store.watch(prefix, Revision(0)).await.unwrap();
        let mut seen: Vec<_> = take(&mut changes, expected.len()).await.into_iter().map(|change| change.key).collect();
        seen.sort();
        assert_eq!(seen, expected, "watching {prefix:?}");
    }
}

pub async fn bad_input_is_refused(make: Make) {
    let subject = make();
    let store = &subject.store;
    let long = "k".repeat(257);
    let large = format!("\"{}\"", "v".repeat(1 << 20));
    let not_utf8 = Op::Put { key: "a".to_owned(), value: vec![b'"', 0xff, b'"'] };
    for ops in [
        vec![put("", "1")],
        vec![put(&long, "1")],
        vec![put("a b", "1")],
        vec![put("ä", "1")],
        vec![delete("a\n")],
        vec![put("a", "")],
        vec![put("a", "{")],
        vec![put("a", "1 2")],
        vec![not_utf8],
        vec![put("a", &large)],
        vec![put("a", "1"), delete("a")],
    ] {
        let error = store.txn(txn(vec![], ops)).await.unwrap_err();
        assert_eq!(error.kind(), Kind::InvalidArgument, "{}", error.chain());
        assert!(error.chain().len() < 400, "an error is a line: {}", error.chain());
    }
    let listing = store.list("").await.unwrap();
    assert!(listing.entries.is_empty() && listing.revision == Revision(0), "nothing was changed");
}

pub async fn large_values_fit(make: Make) {
    let subject = make();
    let value = format!("\"{}\"", "v".repeat(512 << 10));
    commit(&subject.store, vec![], vec![put("a", &value)]).await;
    assert_eq!(subject.store.get("a").await.unwrap().unwrap().value, value.as_bytes());
}

pub async fn of_two_creators_one_wins(make: Make) {
    let subject = make();
    let tries = (0..16).map(|n| {
        let store = Arc::clone(&subject.store);
        async move { store.txn(txn(vec![absent("names/web")], vec![put("names/web", &n.to_string())])).await.unwrap() }
    });
    let outcomes = futures_util::future::join_all(tries).await;
    let won = outcomes.iter().filter(|outcome| matches!(outcome, TxnOutcome::Committed(_))).count();
    assert_eq!(won, 1, "{outcomes:?}");
}

/// Adds one, by compare-and-swap.
async fn increment(store: &Arc<dyn StateStore>) {
    loop {
        let entry = store.get("counter").await.unwrap();
        let count: u64 = entry.as_ref().map_or(0, |entry| serde_json::from_slice(&entry.value).unwrap());
        let guard = entry.map_or(absent("counter"), |entry| at("counter", entry.revision));
        let swap = txn(vec![guard], vec![put("counter", &(count + 1).to_string())]);
        if let TxnOutcome::Committed(_) = store.txn(swap).await.unwrap() {
            return;
        }
    }
}

pub async fn compare_and_swap_loses_nothing(make: Make) {
    let subject = make();
    let tasks: Vec<_> = (0..8)
        .map(|_| {
            let store = Arc::clone(&subject.store);
            tokio::spawn(async move {
                for _ in 0..25 {
                    increment(&store).await;
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    assert_eq!(subject.store.get("counter").await.unwrap().unwrap().value, b"200");
}

/// 500 transactions, drawn from a seed, on the store and on a map.
pub async fn a_model_agrees(make: Make) {
    let subject = make();
    let mut model: BTreeMap<String, (String, Revision)> = BTreeMap::new();
    let mut revision = Revision(0);
    for step in 0..500u64 {
        let draw = crate::time::mix(step);
        let keys = [format!("k/{}", draw % 7), format!("k/{}", 7 + (draw >> 8) % 7)];
        let known = model.get(&keys[0]).map(|(_, revision)| *revision);
        let guard = match ((draw >> 16) % 4, known) {
            (0, _) => absent(&keys[0]),
            (1, Some(revision)) => at(&keys[0], revision),
            (1, None) => at(&keys[0], Revision(1)),
            (2, Some(revision)) => at(&keys[0], Revision(revision.0 + 1)),
            _ => absent("never"),
        };
        let holds = match guard.expect {
            clawpot_core::ports::Expect::Absent => !model.contains_key(&guard.key),
            clawpot_core::ports::Expect::Revision(revision) => known == Some(revision),
        };
        let value = step.to_string();
        let ops = keys.iter().zip([24, 32]).map(|(key, shift)| match (draw >> shift) % 3 {
            0 => delete(key),
            _ => put(key, &value),
        });
        let ops: Vec<Op> = ops.collect();
        let outcome = subject.store.txn(txn(vec![guard], ops.clone())).await.unwrap();
        assert_eq!(matches!(outcome, TxnOutcome::Committed(_)), holds, "step {step}");
        if holds {
            revision = revision.next();
            for op in ops {
                match op {
                    Op::Put { key, .. } => drop(model.insert(key, (value.clone(), revision))),
                    Op::Delete { key } => drop(model.remove(&key)),
                }
            }
        }
    }
    let listing = subject.store.list("k/").await.unwrap();
    let rows = listing.entries.into_iter().map(|row| (row.key, (String::from_utf8(row.value).unwrap(), row.revision)));
    assert_eq!(rows.collect::<BTreeMap<_, _>>(), model);
    assert_eq!(listing.revision, revision);
}

pub async fn a_watcher_sees_what_comes(make: Make) {
    let subject = make();
    let store = &subject.store;
    let mut changes = store.watch("vms/", Revision(0)).await.unwrap();
    quiet(&mut changes).await;
    commit(store, vec![], vec![put("slots/1", "1")]).await;
    commit(store, vec![], vec![put("vms/a", "1")]).await;
    commit(store, vec![], vec![put("vms/a", "2")]).await;
    commit(store, vec![], vec![delete("vms/a")]).await;
    let seen = take(&mut changes, 3).await;
    let change = |value: Option<&str>, revision| Change {
        key: "vms/a".to_owned(),
        value: value.map(|text| text.as_bytes().to_vec()),
        revision: Revision(revision),
    };
    assert_eq!(seen, [change(Some("1"), 2), change(Some("2"), 3), change(None, 4)]);
    quiet(&mut changes).await;
}

pub async fn a_watcher_sees_what_was(make: Make) {
    let subject = make();
    let store = &subject.store;
    let last = subject.changes_kept;
    for count in 1..=last {
        commit(store, vec![], vec![put("vms/a", &count.to_string())]).await;
    }
    let mut changes = store.watch("", Revision(last / 2)).await.unwrap();
    let count = usize::try_from(last - last / 2).unwrap();
    let seen: Vec<u64> = take(&mut changes, count).await.iter().map(|change| change.revision.0).collect();
    assert_eq!(seen, (last / 2 + 1..=last).collect::<Vec<_>>());
    quiet(&mut changes).await;
    commit(store, vec![], vec![put("vms/a", "0")]).await;
    assert_eq!(next(&mut changes).await.unwrap().revision, Revision(last + 1), "and then what comes");
}

pub async fn a_watcher_misses_nothing_while_others_write(make: Make) {
    let subject = make();
    // Fewer than a watcher can be behind, so that none is closed.
    let total = subject.changes_kept / 2;
    let store = Arc::clone(&subject.store);
    let writing = tokio::spawn(async move {
        for count in 1..=total {
            commit(&store, vec![], vec![put("vms/a", &count.to_string())]).await;
        }
    });
    let watching = (0..8).map(|_| async {
        tokio::task::yield_now().await;
        let from = subject.store.list("").await.unwrap().revision;
        let mut changes = subject.store.watch("", from).await.unwrap();
        let count = usize::try_from(total - from.0).unwrap();
        let seen: Vec<u64> = take(&mut changes, count).await.iter().map(|change| change.revision.0).collect();
        assert_eq!(seen, (from.0 + 1..=total).collect::<Vec<_>>());
    });
    futures_util::future::join_all(watching).await;
    writing.await.unwrap();
}

/// A projection from list + watch, following the hints it is given.
async fn project(store: &Arc<dyn StateStore>, until: &str) -> BTreeMap<String, Vec<u8>> {
    'list: loop {
        let listing = store.list("k/").await.unwrap();
        let mut rows: BTreeMap<_, _> = listing.entries.into_iter().map(|row| (row.key, row.value)).collect();
        if rows.contains_key(until) {
            return rows;
        }
        let Ok(mut changes) = store.watch("k/", listing.revision).await else { continue };
        loop {
            match next(&mut changes).await {
                Ok(change) => {
                    let last = change.key == until;
                    match change.value {
                        Some(value) => rows.insert(change.key, value),
                        None => rows.remove(&change.key),
                    };
                    if last {
                        return rows;
                    }
                }
                Err(error) => {
                    assert_eq!(error.kind(), Kind::Compacted, "{}", error.chain());
                    continue 'list;
                }
            }
        }
    }
}

pub async fn list_and_watch_make_a_projection(make: Make) {
    let subject = make();
    let total = subject.changes_kept * 3;
    let store = Arc::clone(&subject.store);
    let writing = tokio::spawn(async move {
        for step in 0..total {
            let draw = crate::time::mix(step);
            let key = format!("k/{}", draw % 10);
            let op = if draw.is_multiple_of(3) { delete(&key) } else { put(&key, &step.to_string()) };
            commit(&store, vec![], vec![op]).await;
        }
        commit(&store, vec![], vec![put("k/last", "1")]).await;
    });
    let projection = project(&subject.store, "k/last").await;
    writing.await.unwrap();
    let listing = subject.store.list("k/").await.unwrap();
    let rows: BTreeMap<_, _> = listing.entries.into_iter().map(|row| (row.key, row.value)).collect();
    assert_eq!(projection, rows);
}

/// What a watch says that cannot begin: at the call, or as the stream's first and only word.
async fn watch_error(store: &Arc<dyn StateStore>, from: Revision) -> Error {
    match store.watch("", from).await {
        Err(error) => error,
        Ok(mut changes) => next(&mut changes).await.unwrap_err(),
    }
}

pub async fn below_the_floor_is_compacted(make: Make) {
    let subject = make();
    let store = &subject.store;
    let kept = subject.changes_kept;
    for count in 1..=kept * 3 {
        commit(store, vec![], vec![put("vms/a", &count.to_string())]).await;
    }
    for from in [0, kept] {
        let error = watch_error(store, Revision(from)).await;
        assert_eq!(error.kind(), Kind::Compacted);
        assert!(error.next_step().is_some(), "it says to list again");
    }
    let mut changes = store.watch("", Revision(kept * 2)).await.unwrap();
    let seen = take(&mut changes, usize::try_from(kept).unwrap()).await;
    assert_eq!(seen[0].revision, Revision(kept * 2 + 1), "as many as promised are kept");
}

pub async fn ahead_of_the_store_is_compacted(make: Make) {
    let subject = make();
    commit(&subject.store, vec![], vec![put("a", "1")]).await;
    assert_eq!(watch_error(&subject.store, Revision(1000)).await.kind(), Kind::Compacted);
}

/// What a watcher sees until it is closed.
async fn until_closed(mut changes: clawpot_core::ports::BoxStream<Result<Change>>) -> (Vec<u64>, Kind) {
    let mut seen = Vec::new();
    loop {
        match next(&mut changes).await {
            Ok(change) => seen.push(change.revision.0),
            Err(error) => return (seen, error.kind()),
        }
    }
}

pub async fn a_slow_watcher_is_told(make: Make) {
    let subject = make();
    let store = &subject.store;
    let slow = store.watch("", Revision(0)).await.unwrap();
    for count in 1..=subject.changes_kept * 3 {
        commit(store, vec![], vec![put("vms/a", &count.to_string())]).await;
    }
    let (seen, why) = until_closed(slow).await;
    assert_eq!(why, Kind::Compacted);
    let contiguous: Vec<u64> = (1..).take(seen.len()).collect();
    assert_eq!(seen, contiguous, "no gap before it is told");
}

pub async fn a_dropped_transaction_harms_nobody(make: Make) {
    let subject = make();
    let store = &subject.store;
    for count in 0..20 {
        // Polled once and dropped: done or not done, never half.
        tokio::select! {
            biased;
            done = store.txn(txn(vec![], vec![put("a", &count.to_string())])) => drop(done.unwrap()),
            () = std::future::ready(()) => {}
        }
    }
    let before = store.list("").await.unwrap().revision;
    let revision = commit(store, vec![], vec![put("b", "1")]).await;
    assert!(revision > before);
    assert_eq!(store.get("b").await.unwrap().unwrap().value, b"1");
}

pub async fn another_store_has_another_epoch(make: Make) {
    let (one, two) = (make(), make());
    assert_ne!(one.store.epoch(), two.store.epoch());
    assert_eq!(one.store.epoch(), one.store.epoch());
}
