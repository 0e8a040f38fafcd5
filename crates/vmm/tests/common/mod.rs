//! What the tests of this crate share: a state directory and a machine in it.
#![allow(dead_code, reason = "each test binary uses its part")]

use std::fs::File;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clawpot_core::MachineId;
use clawpot_core::ports::{BootFiles, Machine, Seat};
use clawpot_host::process::{Tool, find_program};
use clawpot_types::guest::{LINK_PREFIX, MANAGEMENT_HOST_ADDRESS, MANAGEMENT_TAP, TAP};
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
            extra_disks: Vec::new(),
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
        // In no hierarchy.
        let groups = clawpot_host::cgroup::Cgroups::find().unwrap();
        assert!(!groups.group(&format!("clawpot/{}", self.instance)).unwrap().exists().unwrap());
    }
}

/// What a test that failed left behind.
impl Drop for Place {
    fn drop(&mut self) {
        let groups = clawpot_host::cgroup::Cgroups::find().unwrap();
        let parent = format!("clawpot/{}", self.instance);
        let left = groups.list(&parent).unwrap();
        let clear = async {
            for name in &left {
                let group = groups.group(&format!("{parent}/{name}")).unwrap();
                group.kill().unwrap();
                group.empty().await.unwrap();
                group.remove().await.unwrap();
            }
        };
        // Not on a thread that runs a test's runtime.
        std::thread::scope(|scope| {
            let run = || tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(clear);
            scope.spawn(run).join().unwrap();
        });
    }
}

/// A network namespace that lives as long as this does, with a loopback device that is up.
pub struct Netns {
    pub path: PathBuf,
    _end: std::sync::mpsc::Sender<()>,
}

impl Netns {
    pub async fn new() -> Self {
        let (tell, told) = std::sync::mpsc::channel();
        let (end, ended) = std::sync::mpsc::channel::<()>();
        std::thread::spawn(move || {
            // SAFETY: only this thread's network namespace changes, no memory or descriptor is unshared.
            unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) }.unwrap();
            let thread = rustix::thread::gettid().as_raw_nonzero();
            tell.send(PathBuf::from(format!("/proc/{}/task/{thread}/ns/net", std::process::id()))).unwrap();
            ended.recv().unwrap_err();
        });
        let netns = Self { path: told.recv().unwrap(), _end: end };
        netns.ip("link set lo up").await;
        netns
    }

    /// The two taps of a slot.
    pub async fn taps(&self, uid: u32) {
        for tap in [TAP, MANAGEMENT_TAP] {
            self.ip(&format!("tuntap add dev {tap} mode tap user {uid} vnet_hdr")).await;
            self.ip(&format!("link set {tap} up")).await;
        }
        self.ip(&format!("address add {MANAGEMENT_HOST_ADDRESS}/{LINK_PREFIX} dev {MANAGEMENT_TAP}")).await;
    }

    async fn ip(&self, command: &str) {
        let netns = clawpot_host::netns::open(&self.path).unwrap();
        let ip = Tool::new(find_program("ip", None).unwrap()).args(command.split(' '));
        ip.with(|spawn| spawn.netns(netns)).run().await.unwrap();
    }
}

/// An emulated guest boots within 5 s, beside much else on the machine within a minute or two.
pub const LONG: Duration = Duration::from_secs(200);

/// Waits until `done`, at most [`LONG`].
pub async fn until(what: &str, mut done: impl AsyncFnMut() -> bool) {
    let started = Instant::now();
    while !done().await {
        assert!(started.elapsed() < LONG, "waited {LONG:?} for {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
