//! Transactions per second and latency of the store, on the filesystem of the directory given (default: a temporary one).
//!
//! `cargo run --release -p clawpot-store --example bench [-- DIR]`

// A bench says what went wrong by panicking.
#![allow(clippy::unwrap_used, reason = "not production code")]

use std::path::PathBuf;
use std::time::{Duration, Instant};

use clawpot_core::ports::{Durability, Op, StateStore, Txn};
use clawpot_store::{Options, SqliteStore, StateLock};

/// About a VM's record.
const VALUE: usize = 1500;
const TOTAL: usize = 8000;

#[tokio::main]
async fn main() {
    let home = tempfile::tempdir().unwrap();
    let dir = std::env::args_os().nth(1).map_or_else(|| home.path().join("state"), PathBuf::from);
    let lock = StateLock::acquire(&dir).unwrap();
    let store = SqliteStore::open(&lock, Options::default()).unwrap();
    println!("{:<8} {:>9} {:>10} {:>9} {:>9}", "", "callers", "txn/s", "p50 µs", "p99 µs");
    for durability in [Durability::Normal, Durability::Full] {
        for callers in [1, 8, 64] {
            let start = Instant::now();
            let all = (0..callers).map(|caller| write(&store, durability, caller, TOTAL / callers));
            let mut times: Vec<Duration> = futures_util::future::join_all(all).await.concat();
            let per_second = u128::try_from(times.len()).unwrap() * 1_000_000 / start.elapsed().as_micros().max(1);
            times.sort_unstable();
            let name = format!("{durability:?}");
            row(&name, callers, per_second, &times);
        }
    }
    let mut times = Vec::new();
    for n in 0..TOTAL {
        let start = Instant::now();
        store.get(&format!("vms/0-{}", n % 100)).await.unwrap().unwrap();
        times.push(start.elapsed());
    }
    times.sort_unstable();
    row("get", 1, 0, &times);
}

fn row(name: &str, callers: usize, per_second: u128, times: &[Duration]) {
    let at = |percent: usize| times[times.len() * percent / 100].as_micros();
    println!("{name:<8} {callers:>9} {per_second:>10} {:>9} {:>9}", at(50), at(99));
}

async fn write(store: &SqliteStore, durability: Durability, caller: usize, count: usize) -> Vec<Duration> {
    let mut times = Vec::with_capacity(count);
    for n in 0..count {
        let value = format!("\"{}\"", "v".repeat(VALUE)).into_bytes();
        let op = Op::Put { key: format!("vms/{caller}-{}", n % 100), value };
        let start = Instant::now();
        store.txn(Txn { guards: Vec::new(), ops: vec![op], events: Vec::new(), durability }).await.unwrap();
        times.push(start.elapsed());
    }
    times
}
