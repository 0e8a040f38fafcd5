//! Volumes' files for real: made, copied, brought in order by a program that may do nothing else, grown. Needs root and e2fsprogs.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use clawpot_core::ports::{Check, Copied, Volumes as _};
use clawpot_host::process::{Tool, find_program};
use clawpot_image::LocalVolumes;
use clawpot_types::{Kind, MiB, VolumeId};

const SIZE: MiB = MiB(256);

fn id(n: u8) -> VolumeId {
    VolumeId::from_random([n; VolumeId::LEN])
}

fn helper() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_clawpot-unpack"))
}

/// `None`, having said why, where they cannot run.
fn place() -> Option<(tempfile::TempDir, LocalVolumes)> {
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: needs root");
        return None;
    }
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let volumes = LocalVolumes::open(dir.path(), helper()).unwrap();
    Some((dir, volumes))
}

async fn debugfs(file: &Path, request: &str) -> String {
    let tool = Tool::new(find_program("debugfs", None).unwrap());
    let said = tool.args(["-w", "-R", request]).args([file]).run().await.unwrap();
    String::from_utf8(said).unwrap()
}

/// Blocks of the file system.
async fn size_of(file: &Path) -> MiB {
    let said = debugfs(file, "show_super_stats -h").await;
    let blocks = said.lines().find_map(|line| line.strip_prefix("Block count:")).unwrap();
    MiB(blocks.trim().parse::<u64>().unwrap() / 256)
}

#[tokio::test]
async fn one_is_made_copied_grown_and_removed() {
    let Some((_dir, volumes)) = place() else { return };
    assert_eq!(volumes.look(&id(1)).await.unwrap(), None);
    volumes.create(&id(1), SIZE).await.unwrap();
    let file = volumes.look(&id(1)).await.unwrap().unwrap();
    assert!(file.clean && file.used_bytes < 32 << 20, "{file:?}");
    let path = volumes.path(&id(1));
    debugfs(&path, "mkdir kept").await;
    let copied = volumes.copy(&id(1), &id(2)).await.unwrap();
    if let Copied::Sparse { bytes } = copied {
        assert!((1..32 << 20).contains(&bytes), "{bytes} bytes are data");
    }
    let copy = volumes.path(&id(2));
    assert!(debugfs(&copy, "ls").await.contains("kept"), "{copied:?}");
    assert_eq!(volumes.check(&id(1), Check::Whole).await.unwrap(), "nothing was wrong");
    volumes.grow(&id(1), MiB(512)).await.unwrap();
    volumes.grow(&id(1), MiB(512)).await.unwrap();
    // Its file system is the next guest's to grow.
    assert_eq!((size_of(&path).await, size_of(&copy).await), (SIZE, SIZE));
    assert_eq!(volumes.look(&id(1)).await.unwrap().unwrap().size, MiB(512));
    assert_eq!(volumes.check(&id(1), Check::Whole).await.unwrap(), "nothing was wrong");
    assert!(debugfs(&path, "ls").await.contains("kept"));
    let found = std::fs::metadata(&path).unwrap();
    assert_eq!((found.uid(), found.gid(), found.mode() & 0o777), (0, 0, 0o600), "taken back");
    let mut all = volumes.list().await.unwrap();
    all.sort();
    assert_eq!(all, [id(1), id(2)]);
    for n in [1, 1, 2] {
        volumes.remove(&id(n)).await.unwrap();
    }
    assert!(volumes.list().await.unwrap().is_empty());
}

/// What a guest that was killed leaves is corrected; what it broke on purpose is told, and no VM gets it.
#[tokio::test]
async fn what_is_in_disorder_is_checked() {
    let Some((_dir, volumes)) = place() else { return };
    volumes.create(&id(1), SIZE).await.unwrap();
    let path = volumes.path(&id(1));
    debugfs(&path, "set_super_value free_blocks_count 7").await;
    debugfs(&path, "set_super_value state 0").await;
    assert!(!volumes.look(&id(1)).await.unwrap().unwrap().clean);
    let done = volumes.check(&id(1), Check::Quick).await.unwrap();
    assert!(done.starts_with("corrected: "), "{done}");
    assert!(volumes.look(&id(1)).await.unwrap().unwrap().clean);
    // No superblock, no group descriptors.
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    file.write_all_at(&vec![0xa5; 8 << 20], 0).unwrap();
    let error = volumes.check(&id(1), Check::Quick).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Corrupt, "{}", error.chain());
    assert_eq!(std::fs::metadata(&path).unwrap().uid(), 0, "taken back");
    // Nor a copy of them.
    file.set_len(0).and_then(|()| file.set_len(SIZE.bytes().unwrap())).unwrap();
    let error = volumes.check(&id(1), Check::Repair).await.unwrap_err();
    assert!(error.kind() == Kind::Corrupt && error.chain().contains("beyond repair"), "{}", error.chain());
}

#[tokio::test]
async fn a_half_made_one_is_swept_away() {
    let Some((dir, volumes)) = place() else { return };
    volumes.create(&id(1), SIZE).await.unwrap();
    std::fs::File::create(dir.path().join("volumes/.half.ext4.1.tmp")).unwrap();
    let volumes = LocalVolumes::open(dir.path(), helper()).unwrap();
    assert_eq!(std::fs::read_dir(dir.path().join("volumes")).unwrap().count(), 1);
    assert_eq!(volumes.list().await.unwrap(), [id(1)]);
}

/// Whatever content makes of the program: nobody's user, without privileges, without network, with one file.
#[tokio::test]
async fn the_program_may_do_nothing_else() {
    let Some((dir, _)) = place() else { return };
    let secret = dir.path().join("readable");
    std::fs::File::create(&secret).unwrap();
    let own = dir.path().join("own");
    std::fs::File::create(&own).unwrap();
    let file = || std::fs::File::options().read(true).write(true).open(&own).unwrap();
    let run = async |arguments: &[&str]| {
        let tool = Tool::new(helper()).args(["program", "1899999998"]).args(arguments);
        let tool = tool.with(|spawn| spawn.fd(file().into(), 3));
        let done = tool.finish().await.unwrap();
        (done.exit.is_success(), String::from_utf8_lossy(&[done.stdout, done.stderr].concat()).into_owned())
    };
    assert_eq!(run(&["/usr/bin/id", "-u"]).await, (true, "1899999998\n".to_owned()));
    assert!(run(&["/usr/bin/cat", "/proc/self/fd/3"]).await.0);
    let (fine, said) = run(&["/usr/bin/cat", secret.to_str().unwrap()]).await;
    assert!(!fine && said.contains("denied"), "{said}");
    // Landlock alone keeps it from what everybody may read.
    let (fine, said) = run(&["/usr/bin/cat", "/proc/self/status"]).await;
    assert!(!fine && said.contains("denied"), "{said}");
    let (fine, said) = run(&["/usr/bin/cat", "/proc/mounts"]).await;
    assert!(fine, "{said}");
    let (fine, said) = run(&["/usr/bin/sh", "-c", "true & wait"]).await;
    assert!(!fine, "it starts no process: {said}");
}

/// A server was killed in the middle of a check; its program goes on by itself, and the next server is there already.
#[tokio::test]
async fn what_a_dead_server_had_started_is_waited_for() {
    let Some((_dir, volumes)) = place() else { return };
    volumes.create(&id(1), SIZE).await.unwrap();
    let works = std::fs::File::open(volumes.path(&id(1))).unwrap();
    rustix::fs::flock(&works, rustix::fs::FlockOperation::LockExclusive).unwrap();
    let one = id(1);
    let mut checking = std::pin::pin!(volumes.check(&one, Check::Whole));
    let early = tokio::time::timeout(std::time::Duration::from_secs(2), &mut checking).await;
    assert!(early.is_err(), "beside the other: {early:?}");
    drop(works);
    assert_eq!(checking.await.unwrap(), "nothing was wrong");
}

/// What a check reads of all but the smallest it reads with a thread for each CPU.
#[tokio::test]
async fn a_large_one_is_checked_as_well() {
    let Some((_dir, volumes)) = place() else { return };
    volumes.create(&id(1), MiB(16 << 10)).await.unwrap();
    for how in [Check::Whole, Check::Repair] {
        assert_eq!(volumes.check(&id(1), how).await.unwrap(), "nothing was wrong");
    }
}

/// A line for each of 120,000 inodes: no reason to give up in the middle.
#[tokio::test]
async fn one_in_shreds_is_repaired_however_much_there_is_to_say() {
    let Some((_dir, volumes)) = place() else { return };
    volumes.create(&id(1), SIZE).await.unwrap();
    let path = volumes.path(&id(1));
    // As a guest may make it anew: without checksums every inode is looked at.
    let mke2fs = Tool::new(find_program("mke2fs", None).unwrap());
    let features = ["-q", "-F", "-t", "ext4", "-b", "4096", "-O", "^metadata_csum,^uninit_bg", "-N", "120000"];
    mke2fs.args(features).args([&path]).run().await.unwrap();
    let said = debugfs(&path, "show_super_stats").await;
    let table = said.split("inode table at ").nth(1).unwrap().split_whitespace().next().unwrap();
    let table: u64 = table.trim_end_matches(',').parse().unwrap();
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    // Behind the first 64, the root and the journal among them; all groups' tables lie behind each other.
    file.write_all_at(&vec![0xa5; 7_400 * 4096], (table + 4) * 4096).unwrap();
    let done = volumes.check(&id(1), Check::Repair).await.unwrap();
    assert!(done.starts_with("corrected: ") && done.contains("very many more"), "{done}");
    assert_eq!(volumes.check(&id(1), Check::Whole).await.unwrap(), "nothing was wrong");
}

/// One that hangs, of whatever its guest made of it, keeps no other VM from its start.
#[tokio::test]
async fn checks_do_not_wait_for_each_other() {
    let Some((_dir, volumes)) = place() else { return };
    for n in [1, 2] {
        volumes.create(&id(n), SIZE).await.unwrap();
    }
    let works = std::fs::File::open(volumes.path(&id(1))).unwrap();
    rustix::fs::flock(&works, rustix::fs::FlockOperation::LockExclusive).unwrap();
    let (one, two) = (id(1), id(2));
    let hangs = volumes.check(&one, Check::Whole);
    let other = async {
        // The first has had its turn.
        tokio::time::sleep(std::time::Duration::from_millis(200)).await;
        let done = tokio::time::timeout(std::time::Duration::from_secs(60), volumes.check(&two, Check::Whole)).await;
        drop(works);
        done
    };
    let (first, second) = tokio::join!(hangs, other);
    assert_eq!(second.unwrap().unwrap(), "nothing was wrong");
    assert_eq!(first.unwrap(), "nothing was wrong");
}
