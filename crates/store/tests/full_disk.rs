//! A full disk, for real: a small tmpfs in a mount namespace of this test's own.
//!
//! Needs CAP_SYS_ADMIN; without it the test says that it was skipped.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::Duration;

use clawpot_core::ports::{Durability, EventLog, StateStore, TxnOutcome};
use clawpot_types::{Kind, Result, Revision};
use rustix::mount::{MountFlags, MountPropagationFlags};
use support::{State, at, delete, draft, put, txn};

/// Runs `work` on a thread whose `dir` is a tmpfs of `bytes`; the mount goes with the thread (and those it starts).
fn with_small_disk(dir: &Path, bytes: u64, work: impl FnOnce(&Path) + Send) {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            // SAFETY: it unshares this thread's mount namespace and working directory; no file descriptor is shared away.
            let unshared = unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNS) };
            if unshared.is_err() {
                eprintln!("SKIPPED: making a mount namespace needs CAP_SYS_ADMIN");
                return;
            }
            rustix::mount::mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
            let options = std::ffi::CString::new(format!("size={bytes}")).unwrap();
            rustix::mount::mount("tmpfs", dir, "tmpfs", MountFlags::empty(), options.as_c_str()).unwrap();
            work(dir);
        });
        thread.join().unwrap();
    });
}

fn fill(dir: &Path) {
    use std::io::Write as _;
    let mut file = std::fs::File::options().append(true).create(true).open(dir.join("filler")).unwrap();
    for block in [1 << 16, 4096, 512] {
        while file.write_all(&vec![1u8; block]).is_ok() {}
    }
}

async fn add(state: &State, n: u32) -> Result<TxnOutcome> {
    let value = format!("\"{}\"", "v".repeat(1500));
    let mut txn = txn(vec![], vec![put(&format!("vms/{n}"), &value)]);
    txn.events.push(draft(u8::try_from(n % 250).unwrap()));
    txn.durability = if n.is_multiple_of(2) { Durability::Full } else { Durability::Normal };
    state.store().txn(txn).await
}

#[test]
fn vms_can_be_deleted_on_a_full_disk() {
    let home = tempfile::tempdir().unwrap();
    with_small_disk(home.path(), 24 << 20, |disk| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(deleted_on_a_full_disk(disk));
    });
}

async fn deleted_on_a_full_disk(disk: &Path) {
    let mut state = State::in_dir(&disk.join("state"));
    state.open();
    for n in 0..300 {
        add(&state, n).await.unwrap();
    }
    fill(disk);

    // Sooner or later (the log has some room of its own) nothing more is added, and that is said.
    let mut refused = None;
    for n in 300..6000 {
        if let Err(error) = add(&state, n).await {
            refused = Some((n, error));
            break;
        }
    }
    let (full_at, error) = refused.expect("the disk is full");
    assert_eq!(error.kind(), Kind::Exhausted, "{}", error.chain());
    assert!(error.next_step().unwrap().contains("free some space"), "{:?}", error.next_step());
    assert!(!state.dir().join("ballast").exists(), "the ballast was given up");
    assert_eq!(state.store().get(&format!("vms/{full_at}")).await.unwrap(), None, "nothing was changed");

    let mut told = TxnOutcome::Committed(Revision(0));
    // What deleting takes: the intent is written, the phase is written a few times, the record goes.
    for n in 0..full_at {
        let key = format!("vms/{n}");
        for round in 0..3 {
            let entry = state.store().get(&key).await.unwrap().unwrap();
            let value = format!("\"deleting {round} {}\"", "v".repeat(1400));
            let swap = txn(vec![at(&key, entry.revision)], vec![put(&key, &value)]);
            state.store().txn(swap).await.unwrap_or_else(|error| panic!("{key}: {}", error.chain()));
        }
        let mut gone = txn(vec![], vec![delete(&key)]);
        gone.events.push(draft(u8::try_from(n % 250).unwrap()));
        told = state.store().txn(gone).await.unwrap();
    }
    assert!(StateStore::list(state.store(), "vms/").await.unwrap().entries.is_empty());
    // Events took the place of the oldest, and none was dropped as long as there were older ones.
    let events = EventLog::list(state.store(), None, Revision(0), usize::MAX - 1).await.unwrap();
    let newest = events.last().map(|event| TxnOutcome::Committed(event.id));
    assert_eq!(newest, Some(told), "the last delete's event is there, of {}", events.len());
    assert!(events.len() > 100, "{} events are left", events.len());

    // Closing gave the log's room back: the next start takes its ballast again.
    state.restart();
    add(&state, 1).await.unwrap();
    assert!(state.dir().join("ballast").exists());

    // A start on a disk without a free byte spends it at once, and deletes.
    state.close();
    fill(disk);
    state.open();
    assert_eq!(add(&state, 2).await.unwrap_err().kind(), Kind::Exhausted);
    state.store().txn(txn(vec![], vec![delete("vms/1")])).await.unwrap();

    // Room again: the ballast comes back by itself, and so do creates.
    std::fs::remove_file(disk.join("filler")).unwrap();
    tokio::time::timeout(Duration::from_secs(20), async {
        while add(&state, 1).await.is_err() {
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    })
    .await
    .expect("creates work again");
    let ballast = std::fs::metadata(state.dir().join("ballast")).unwrap();
    assert_eq!(ballast.blocks() * 512, 4 << 20);
}

#[test]
fn a_new_store_on_a_full_disk_says_so() {
    let home = tempfile::tempdir().unwrap();
    with_small_disk(home.path(), 1 << 20, |disk| {
        let state = State::in_dir(&disk.join("state"));
        fill(disk);
        let error = clawpot_store::SqliteStore::open(state.lock(), clawpot_store::Options::default()).unwrap_err();
        assert_eq!(error.kind(), Kind::Exhausted, "{}", error.chain());
        assert!(error.chain().contains("state.db") && error.next_step().is_some(), "{}", error.chain());
    });
}
