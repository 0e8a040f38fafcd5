//! The driver on real files: what it accepts, what it refuses and in which words, and what it leaves behind.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail the test")]

use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clawpot_core::ImagePin;
use clawpot_core::ports::Images;
use clawpot_host::fs::replace;
use clawpot_image::LocalImages;
use clawpot_types::{Digest, ImageRef, Kind, MiB, VmId};
use sha2::{Digest as _, Sha256};
use tempfile::TempDir;

fn digest(bytes: &[u8]) -> Digest {
    Digest::from_sha256(&Sha256::digest(bytes).into())
}

/// A store as the scripts write it, with small files.
struct Host {
    dir: TempDir,
}

impl Host {
    fn empty() -> Self {
        let dir = tempfile::tempdir().unwrap();
        for name in ["images/blobs/sha256", "images/manifests", "state"] {
            std::fs::create_dir_all(dir.path().join(name)).unwrap();
        }
        Self { dir }
    }

    fn with_debian() -> Self {
        let host = Self::empty();
        host.boot();
        host.image("debian", b"root file system");
        host
    }

    fn path(&self, below: &str) -> PathBuf {
        self.dir.path().join(below)
    }

    fn blob(&self, bytes: &[u8]) -> String {
        let digest = digest(bytes);
        replace(&self.blob_path(&digest), bytes, 0o444).unwrap();
        format!(r#""digest":"{digest}","size":{}"#, bytes.len())
    }

    fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.path("images/blobs/sha256").join(digest.hex())
    }

    fn boot(&self) {
        let (kernel, initramfs) = (self.blob(b"kernel"), self.blob(b"initramfs"));
        let text = format!(r#"{{"version":1,"kernel":{{{kernel}}},"initramfs":{{{initramfs},"agent_version":"0"}}}}"#);
        replace(&self.path("images/boot.json"), text.as_bytes(), 0o444).unwrap();
    }

    fn image(&self, name: &str, rootfs: &[u8]) -> Digest {
        let blob = self.blob(rootfs);
        let text = format!(r#"{{"version":1,"created_at_us":7,"rootfs":{{{blob},"format":"ext4"}}}}"#);
        self.blob(text.as_bytes());
        replace(&self.manifest(name), text.as_bytes(), 0o444).unwrap();
        digest(text.as_bytes())
    }

    fn manifest(&self, name: &str) -> PathBuf {
        self.path("images/manifests").join(format!("{name}.json"))
    }

    fn driver(&self) -> LocalImages {
        LocalImages::open(&self.path("images"), &self.path("state")).unwrap()
    }

    /// Files in `disks/`, whatever their names.
    fn disks(&self) -> Vec<PathBuf> {
        files(&self.path("state/disks"))
    }
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let mut files: Vec<_> = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

/// Without the spare, or half of one, that comes in the background, at whatever moment that is.
fn templates(state: &Path) -> Vec<PathBuf> {
    let mut found = files(&state.join("templates"));
    found.retain(|path| !path.to_string_lossy().contains(".spare."));
    found
}

fn named(name: &str) -> ImageRef {
    name.parse().unwrap()
}

fn vm(n: u8) -> VmId {
    VmId::from_random([n; 16])
}

async fn pinned(driver: &LocalImages) -> ImagePin {
    driver.resolve(&named("debian")).await.unwrap()
}

#[tokio::test]
async fn an_image_is_found_verified_and_known_from_then_on() {
    let host = Host::with_debian();
    let driver = host.driver();
    let pin = pinned(&driver).await;
    assert_eq!(driver.look(&pin).await.unwrap(), None);
    let boot = driver.ensure(&pin).await.unwrap();
    assert_eq!(std::fs::read(&boot.kernel).unwrap(), b"kernel");
    assert_eq!(std::fs::read(&boot.initramfs).unwrap(), b"initramfs");
    assert_eq!(std::fs::read(&boot.rootfs).unwrap(), b"root file system");
    assert_eq!(boot.kernel_digest, digest(b"kernel"));
    assert_eq!(driver.look(&pin).await.unwrap(), Some(()));
    // A VM's hard link changes nothing, nor does a restart.
    std::fs::hard_link(&boot.rootfs, host.path("state/rootfs")).unwrap();
    assert_eq!(driver.look(&pin).await.unwrap(), Some(()));
    assert_eq!(host.driver().look(&pin).await.unwrap(), Some(()));
    // By digest too, and after the name has come to mean another image.
    host.image("debian", b"another");
    let again = driver.resolve(&ImageRef::Digest(pin.digest.clone())).await.unwrap();
    assert_eq!(again, pin);
    assert_eq!(driver.ensure(&pin).await.unwrap(), boot);
    assert_ne!(pinned(&driver).await, pin);
}

#[tokio::test]
async fn an_unknown_image_is_told_with_those_that_exist() {
    let host = Host::with_debian();
    let error = host.driver().resolve(&named("nixos")).await.unwrap_err();
    assert_eq!(error.kind(), Kind::NotFound);
    assert!(error.what().contains("image nixos"), "{}", error.what());
    assert!(error.next_step().unwrap().contains("debian"), "{:?}", error.next_step());
    let error = host.driver().resolve(&ImageRef::Digest(digest(b"nothing"))).await.unwrap_err();
    assert_eq!(error.kind(), Kind::NotFound);
    // What a list shows of a digest is no name.
    let whole = pinned(&host.driver()).await.digest.to_string();
    let begun = whole["sha256:".len()..][..12].to_owned();
    let error = host.driver().resolve(&named(&begun)).await.unwrap_err();
    let hint = error.next_step().unwrap();
    assert!(hint.contains(&whole) && hint.contains("debian"), "{hint}");

    let host = Host::empty();
    let error = host.driver().resolve(&named("debian")).await.unwrap_err();
    assert!(error.next_step().unwrap().contains("setup-rootfs.sh"), "{:?}", error.next_step());
    // Images, but no kernel.
    host.image("debian", b"root");
    let error = host.driver().resolve(&named("debian")).await.unwrap_err();
    assert_eq!(error.kind(), Kind::FailedPrecondition);
    assert!(error.next_step().unwrap().contains("install-vm-assets.sh"), "{:?}", error.next_step());
}

#[tokio::test]
async fn a_missing_kernel_is_named() {
    let host = Host::with_debian();
    let driver = host.driver();
    let pin = pinned(&driver).await;
    let kernel = host.blob_path(&digest(b"kernel"));
    std::fs::remove_file(&kernel).unwrap();
    assert_eq!(driver.look(&pin).await.unwrap(), None);
    let error = driver.ensure(&pin).await.unwrap_err();
    assert_eq!(error.kind(), Kind::NotFound);
    assert!(error.what().contains("kernel") && error.what().contains(kernel.to_str().unwrap()), "{}", error.what());
    assert!(error.next_step().unwrap().contains("install-vm-assets.sh"));
}

#[tokio::test]
async fn a_truncated_file_is_told_with_both_sizes_also_when_it_was_good_before() {
    let host = Host::with_debian();
    let driver = host.driver();
    let pin = pinned(&driver).await;
    let boot = driver.ensure(&pin).await.unwrap();
    std::fs::set_permissions(&boot.kernel, std::fs::Permissions::from_mode(0o644)).unwrap();
    std::fs::OpenOptions::new().write(true).open(&boot.kernel).unwrap().set_len(3).unwrap();
    std::fs::set_permissions(&boot.kernel, std::fs::Permissions::from_mode(0o444)).unwrap();
    let error = driver.ensure(&pin).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Corrupt);
    assert!(error.what().contains("truncated, 3 bytes where 6 are expected"), "{}", error.what());
}

#[tokio::test]
async fn one_wrong_byte_is_found_also_when_the_file_was_good_before() {
    let host = Host::with_debian();
    let driver = host.driver();
    let pin = pinned(&driver).await;
    let boot = driver.ensure(&pin).await.unwrap();
    std::fs::set_permissions(&boot.rootfs, std::fs::Permissions::from_mode(0o644)).unwrap();
    let file = std::fs::OpenOptions::new().write(true).open(&boot.rootfs).unwrap();
    file.write_all_at(b"R", 0).unwrap();
    // Writable by its owner: refused before it is read.
    assert_eq!(driver.ensure(&pin).await.unwrap_err().kind(), Kind::FailedPrecondition);
    std::fs::set_permissions(&boot.rootfs, std::fs::Permissions::from_mode(0o444)).unwrap();
    assert_eq!(driver.look(&pin).await.unwrap(), None);
    let error = driver.ensure(&pin).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Corrupt);
    let (found, expected) = (digest(b"Root file system"), digest(b"root file system"));
    assert!(error.what().contains(found.as_str()) && error.what().contains(expected.as_str()), "{}", error.what());
}

#[tokio::test]
async fn a_link_in_place_of_a_file_is_refused() {
    let host = Host::with_debian();
    let driver = host.driver();
    let pin = pinned(&driver).await;
    let kernel = host.blob_path(&digest(b"kernel"));
    std::fs::rename(&kernel, host.path("elsewhere")).unwrap();
    std::os::unix::fs::symlink(host.path("elsewhere"), &kernel).unwrap();
    assert!(driver.ensure(&pin).await.is_err());
}

#[tokio::test]
async fn bad_manifests_are_listed_beside_the_good() {
    let host = Host::with_debian();
    replace(&host.manifest("broken"), b"{", 0o444).unwrap();
    replace(&host.manifest("newer"), br#"{"version":9}"#, 0o444).unwrap();
    let driver = host.driver();
    let (good, bad) = driver.list().await.unwrap();
    let good: Vec<_> =
        good.iter().map(|image| (image.name.as_str(), image.size_bytes, image.format.as_str())).collect();
    assert_eq!(good, [("debian", 16, "ext4")]);
    let bad: Vec<_> = bad.iter().map(|image| (image.name.as_str(), image.error.kind())).collect();
    assert_eq!(bad, [("broken", Kind::Corrupt), ("newer", Kind::Unsupported)]);
    assert_eq!(driver.resolve(&named("broken")).await.unwrap_err().kind(), Kind::Corrupt);
    assert_eq!(driver.resolve(&named("newer")).await.unwrap_err().kind(), Kind::Unsupported);
    // No store at all is an empty one.
    let nowhere = LocalImages::open(&host.path("none"), &host.path("state")).unwrap();
    assert!(nowhere.list().await.unwrap().0.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn many_ensure_one_image_at_once() {
    let host = Host::with_debian();
    let driver = Arc::new(host.driver());
    let pin = pinned(&driver).await;
    let tasks: Vec<_> = (0..16)
        .map(|n| {
            let (driver, pin) = (Arc::clone(&driver), pin.clone());
            let task = tokio::spawn(async move { driver.ensure(&pin).await });
            // Some lose interest at once.
            if n % 4 == 3 {
                task.abort();
            }
            task
        })
        .collect();
    for task in tasks {
        if let Ok(result) = task.await {
            result.unwrap();
        }
    }
    assert_eq!(driver.look(&pin).await.unwrap(), Some(()));
}

#[tokio::test]
async fn an_unreadable_list_of_verdicts_costs_a_reading_and_nothing_else() {
    let host = Host::with_debian();
    let pin = pinned(&host.driver()).await;
    for bad in ["", "{", r#"{"version":9,"files":{}}"#] {
        replace(&host.path("state/verified.json"), bad.as_bytes(), 0o600).unwrap();
        let driver = host.driver();
        driver.ensure(&pin).await.unwrap();
        assert_eq!(host.driver().look(&pin).await.unwrap(), Some(()));
    }
}

#[tokio::test]
async fn a_disk_is_cloned_kept_and_removed() {
    let host = Host::empty();
    let driver = host.driver();
    assert_eq!(driver.look_disk(&vm(1)).await.unwrap(), None);
    let path = driver.create_disk(&vm(1), MiB(4096)).await.unwrap();
    assert_eq!(path, driver.disk_path(&vm(1)));
    assert_eq!(driver.look_disk(&vm(1)).await.unwrap(), Some(()));
    let meta = std::fs::metadata(&path).unwrap();
    assert_eq!((meta.len(), meta.mode() & 0o777), (4096 << 20, 0o600));
    assert!(meta.blocks() * 512 < 8 << 20, "{} bytes are allocated", meta.blocks() * 512);
    let mut magic = [0; 2];
    std::fs::File::open(&path).unwrap().read_exact_at(&mut magic, 1024 + 56).unwrap();
    assert_eq!(magic, [0x53, 0xef], "no ext4");

    // What is there is kept, whatever is asked for.
    std::fs::OpenOptions::new().write(true).open(&path).unwrap().write_all_at(b"mine", 0).unwrap();
    driver.create_disk(&vm(1), MiB(64)).await.unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().len(), 4096 << 20);
    driver.create_disk(&vm(2), MiB(4096)).await.unwrap();
    let mut start = [0; 4];
    std::fs::File::open(driver.disk_path(&vm(2))).unwrap().read_exact_at(&mut start, 0).unwrap();
    assert_eq!(start, [0; 4], "two VMs share a disk");

    for _ in 0..2 {
        driver.remove_disk(&vm(1)).await.unwrap();
        driver.remove_disk(&vm(2)).await.unwrap();
    }
    assert!(host.disks().is_empty());
    assert_eq!(templates(&host.path("state")).len(), 1);
}

#[tokio::test]
async fn one_disk_of_a_size_that_was_asked_for_is_kept_ready() {
    let host = Host::empty();
    let driver = host.driver();
    driver.create_disk(&vm(1), MiB(64)).await.unwrap();
    let spare = host.path("state/templates/upper-v1-64.spare.ext4");
    let made = async {
        while !spare.exists() {
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(60), made).await.unwrap();
    let inode = std::fs::metadata(&spare).unwrap().ino();
    let path = driver.create_disk(&vm(2), MiB(64)).await.unwrap();
    assert_eq!(std::fs::metadata(path).unwrap().ino(), inode);
    assert!(!spare.exists(), "two VMs could get it");
    // The next comes before there is another.
    let path = driver.create_disk(&vm(3), MiB(64)).await.unwrap();
    assert_ne!(std::fs::metadata(path).unwrap().ino(), inode);
}

#[tokio::test]
async fn the_smallest_and_the_largest_disk() {
    let host = Host::empty();
    let driver = host.driver();
    for size in [*MiB::DISK.start(), *MiB::DISK.end()] {
        let path = driver.create_disk(&vm(1), MiB(size)).await.unwrap();
        assert_eq!(std::fs::metadata(path).unwrap().len(), size << 20);
        driver.remove_disk(&vm(1)).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_nobody_waits_for_any_more_is_removed_all_the_same() {
    let host = Host::empty();
    let driver = Arc::new(host.driver());
    driver.create_disk(&vm(0), MiB(64)).await.unwrap();
    for n in 1..=35u8 {
        let creating = Arc::clone(&driver);
        let task = tokio::spawn(async move { creating.create_disk(&vm(n), MiB(64)).await });
        tokio::time::sleep(std::time::Duration::from_micros(u64::from(n) * 50)).await;
        task.abort();
        // Either it was never made, or it is gone after this.
        drop(task.await);
        driver.remove_disk(&vm(n)).await.unwrap();
    }
    assert_eq!(host.disks(), [driver.disk_path(&vm(0))]);
}

#[tokio::test(flavor = "multi_thread")]
async fn first_disks_of_one_size_are_made_together() {
    let host = Host::empty();
    let driver = Arc::new(host.driver());
    let tasks: Vec<_> = (0..8u8)
        .map(|n| {
            let driver = Arc::clone(&driver);
            tokio::spawn(async move { driver.create_disk(&vm(n), MiB(128)).await })
        })
        .collect();
    for task in tasks {
        task.await.unwrap().unwrap();
    }
    assert_eq!(host.disks().len(), 8);
    assert_eq!(templates(&host.path("state")).len(), 1);
}

#[tokio::test]
async fn what_a_crash_left_half_made_is_swept_at_the_next_start() {
    let host = Host::empty();
    let driver = host.driver();
    let path = driver.create_disk(&vm(1), MiB(64)).await.unwrap();
    std::fs::File::create(host.path("state/disks/.aaaa.ext4.1-0.tmp")).unwrap();
    std::fs::create_dir(host.path("state/templates/.tree.1-0.tmp")).unwrap();
    drop(driver);
    host.driver();
    assert_eq!(host.disks(), [path]);
    assert_eq!(files(&host.path("state/templates")).len(), 1);
}

/// On a tmpfs of 16 MiB, in a mount namespace of this thread: needs root, and without it says so.
#[test]
fn a_full_disk_is_told_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_owned();
    let on_tmpfs = move || {
        if !enter_small_tmpfs(&path) {
            eprintln!("not run: mounting a tmpfs needs root");
            return;
        }
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(fill(&path));
    };
    std::thread::spawn(on_tmpfs).join().unwrap();
}

/// The thread that calls this alone sees the mount, and ends with it.
fn enter_small_tmpfs(path: &Path) -> bool {
    use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
    use rustix::thread::{UnshareFlags, unshare_unsafe};
    // SAFETY: the calling thread is a test's own and runs nothing that another thread relies on.
    let apart = unsafe { unshare_unsafe(UnshareFlags::NEWNS) };
    apart.is_ok()
        && mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).is_ok()
        && mount("tmpfs", path, "tmpfs", MountFlags::empty(), c"size=16m").is_ok()
}

async fn fill(state: &Path) {
    let driver = LocalImages::open(&state.join("images"), state).unwrap();
    driver.create_disk(&vm(1), MiB(64)).await.unwrap();
    let ballast = state.join("ballast");
    let left = clawpot_host::fs::space(state).unwrap().free_bytes;
    let file = std::fs::File::create(&ballast).unwrap();
    file.write_all_at(&vec![1; usize::try_from(left).unwrap() - (64 << 10)], 0).unwrap();
    // Cloning a template that is there, and formatting one that is not.
    for size in [64, 4096] {
        let error = driver.create_disk(&vm(2), MiB(size)).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Exhausted, "{}", error.chain());
        assert!(error.next_step().unwrap().contains("free some space"), "{:?}", error.next_step());
        assert_eq!(files(&state.join("disks")), [driver.disk_path(&vm(1))]);
        assert_eq!(templates(state).len(), 1);
    }
    drop(file);
    std::fs::remove_file(&ballast).unwrap();
    driver.create_disk(&vm(2), MiB(64)).await.unwrap();
}
