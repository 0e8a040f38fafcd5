//! What the tests of this crate share: a state directory and a machine in it.
#![allow(dead_code, reason = "each test binary uses its part")]

use std::fs::File;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clawpot_core::MachineId;
use clawpot_core::ports::{BootFiles, Machine, Seat};
use clawpot_types::{Digest, Incarnation, InstanceId, MiB, Slot, Vcpus, VmId};

/// A state directory of this test's own, beside the build's output: on one file system with the images.
pub struct Place {
    dir: tempfile::TempDir,
    pub instance: InstanceId,
}

fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty()).unwrap();
    bytes
}

pub fn needs_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        eprintln!("SKIPPED: needs root");
    }
    root
}

impl Place {
    pub fn new() -> Self {
        let dir = tempfile::Builder::new().prefix("vmm-").tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        Self { dir, instance: InstanceId::from_random(random()) }
    }

    pub fn state(&self) -> &Path {
        self.dir.path()
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.state().join(name)
    }

    /// A machine of empty files, with a slot that no server would use.
    pub fn machine(&self) -> Machine {
        for name in ["kernel", "initramfs", "rootfs"] {
            let path = self.file(name);
            if !path.exists() {
                File::create(&path).unwrap();
                std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o444)).unwrap();
            }
        }
        let disk = self.file("vm-disk");
        File::create(&disk).unwrap().set_len(64 << 20).unwrap();
        Machine {
            id: MachineId { vm: VmId::from_random(random()), incarnation: Incarnation(1) },
            name: "test".parse().unwrap(),
            vcpus: Vcpus::try_from(1).unwrap(),
            memory: MiB(128),
            files: BootFiles {
                kernel: self.file("kernel"),
                kernel_digest: Digest::from_sha256(&[0; 32]),
                initramfs: self.file("initramfs"),
                rootfs: self.file("rootfs"),
            },
            disk,
            seat: Seat {
                slot: Slot(0),
                uid: 1_999_999_000,
                gid: 1_999_999_000,
                netns: "/proc/self/ns/net".into(),
                address: std::net::Ipv4Addr::LOCALHOST,
            },
        }
    }

    /// Every machine was destroyed: no directory, no group is left.
    pub fn nothing_left(&self, listed: &[MachineId]) {
        assert!(listed.is_empty(), "{listed:?}");
        let jails = self.file("jail");
        if jails.exists() {
            for kind in std::fs::read_dir(jails).unwrap() {
                assert_eq!(std::fs::read_dir(kind.unwrap().path()).unwrap().count(), 0);
            }
        }
        let groups = clawpot_host::cgroup::Cgroups::find().unwrap();
        assert!(!groups.group(&format!("clawpot/{}", self.instance)).unwrap().exists().unwrap());
    }
}

/// What a test that failed left behind.
impl Drop for Place {
    fn drop(&mut self) {
        let groups = clawpot_host::cgroup::Cgroups::find().unwrap();
        let parent = format!("clawpot/{}", self.instance);
        for name in groups.list(&parent).unwrap() {
            let group = groups.group(&format!("{parent}/{name}")).unwrap();
            group.kill().unwrap();
            for _ in 0..500 {
                if group.populated().unwrap() != Some(true) {
                    break;
                }
                std::thread::sleep(Duration::from_millis(10));
            }
            std::fs::remove_dir(group.path()).unwrap();
        }
        std::fs::remove_dir(groups.root().join(&parent)).ok();
        std::fs::remove_dir(groups.root().join("clawpot")).ok();
    }
}

/// Waits until `done`, at most 60 s.
pub async fn until(what: &str, mut done: impl AsyncFnMut() -> bool) {
    let started = Instant::now();
    while !done().await {
        assert!(started.elapsed() < Duration::from_secs(60), "waited 60 s for {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
