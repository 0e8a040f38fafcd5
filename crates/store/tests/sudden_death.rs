//! `kill -9`: what was acknowledged is there, whatever its durability.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::collections::BTreeSet;
use std::io::{BufRead as _, BufReader, Write as _};
use std::process::Stdio;

use clawpot_core::ports::{Durability, StateStore};
use support::{State, put, txn};

/// Not a test: the process that is killed. It writes until then, and says what was acknowledged.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "run by the test below"]
async fn victim() {
    let Some(dir) = std::env::var_os("CLAWPOT_TEST_STATE") else { return };
    let mut state = State::in_dir(dir.as_ref());
    state.open();
    let from = state.store().list("").await.unwrap().revision.0;
    for n in from.. {
        let key = format!("vms/{n}");
        let mut txn = txn(vec![], vec![put(&key, &format!("\"{}\"", "v".repeat(500)))]);
        txn.durability = if n.is_multiple_of(8) { Durability::Full } else { Durability::Normal };
        state.store().txn(txn).await.unwrap();
        let mut out = std::io::stdout().lock();
        writeln!(out, "acknowledged {key}").and_then(|()| out.flush()).unwrap();
    }
}

#[tokio::test]
async fn what_was_acknowledged_survives_kill_9() {
    let home = tempfile::tempdir().unwrap();
    let dir = home.path().join("state");
    let mut acknowledged = BTreeSet::new();
    for round in 0..3 {
        #[expect(clippy::disallowed_methods, reason = "the test kills a process of its own, outside of any cgroup")]
        let mut command = std::process::Command::new(std::env::current_exe().unwrap());
        let mut victim = command
            .args(["--exact", "victim", "--ignored", "--nocapture"])
            .env("CLAWPOT_TEST_STATE", &dir)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(victim.stdout.take().unwrap()).lines();
        let told = |line: std::io::Result<String>| line.unwrap().split_once("acknowledged ").map(|(_, k)| k.to_owned());
        let wanted = 300 + 100 * round;
        acknowledged.extend(lines.by_ref().filter_map(told).take(wanted));
        victim.kill().unwrap();
        victim.wait().unwrap();
        acknowledged.extend(lines.filter_map(told));
    }
    let mut state = State::in_dir(&dir);
    state.open();
    let listing = state.store().list("vms/").await.unwrap();
    assert!(listing.unreadable.is_empty());
    let there: BTreeSet<String> = listing.entries.into_iter().map(|entry| entry.key).collect();
    assert!(acknowledged.len() >= 1200, "{}", acknowledged.len());
    let lost: Vec<_> = acknowledged.difference(&there).collect();
    assert!(lost.is_empty(), "acknowledged and lost: {lost:?}");
}
