//! A corner of this host for one machine: a state directory, a network namespace with a tap, and the machine's files.

use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread::JoinHandle;

use clawpot_core::MachineId;
use clawpot_core::ports::{BootFiles, Machine, Seat};
use clawpot_host::process::{Tool, find_program};
use clawpot_types::{Incarnation, InstanceId, MiB, Slot, Vcpus};
use clawpot_vmm::console::Consoles;
use clawpot_vmm::firecracker::{Config, Firecracker};

/// Where Firecracker and its jailer are, or why the tests that need them are skipped.
pub fn programs() -> Result<Config, String> {
    if !rustix::process::geteuid().is_root() {
        return Err("needs root".to_owned());
    }
    for device in ["/dev/kvm", "/dev/net/tun"] {
        if !Path::new(device).exists() {
            return Err(format!("there is no {device}"));
        }
    }
    let path = std::env::var_os("PATH");
    find_program("ip", path.as_deref()).map_err(|_| "there is no ip".to_owned())?;
    let named = |variable: &str| std::env::var_os(variable).map(PathBuf::from);
    let config = Config { program: named("FIRECRACKER_BIN"), jailer: named("JAILER_BIN"), path, ..Config::default() };
    if config.program.is_none() {
        find_program("firecracker", config.path.as_deref())
            .map_err(|_| "there is no firecracker in PATH, and no FIRECRACKER_BIN".to_owned())?;
    }
    Ok(config)
}

/// Returns from the test with a word about it where it cannot run.
#[macro_export]
macro_rules! programs_or_skip {
    () => {
        match $crate::host::programs() {
            Ok(programs) => programs,
            Err(why) => {
                eprintln!("SKIPPED: {why}");
                return;
            }
        }
    };
}

pub struct Corner {
    pub state: tempfile::TempDir,
    pub instance: InstanceId,
    pub consoles: Consoles,
    pub machine: Machine,
    netns: Netns,
}

impl Corner {
    /// `kernel`: what the machine boots.
    pub async fn new(kernel: &[u8]) -> Self {
        // Below the target directory: /tmp may be a file system without device nodes, which a jail needs.
        let state = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a state directory");
        let mut random = [0; 20];
        rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty()).expect("random bytes");
        let vm = clawpot_types::VmId::from_random(random[..16].try_into().expect("16 bytes"));
        let instance = InstanceId::from_random(random[16..].try_into().expect("4 bytes"));
        // Below the range of real slots.
        let uid = 1_899_000_000 + std::process::id() % 900_000;
        let netns = Netns::new(uid).await;
        let file = |name: &str, bytes: &[u8], mode: u32| {
            let path = state.path().join(name);
            clawpot_host::fs::replace(&path, bytes, mode).expect("a file");
            path
        };
        let machine = Machine {
            id: MachineId { vm, incarnation: Incarnation(1) },
            name: "test".parse().expect("a name"),
            vcpus: Vcpus::try_from(1).expect("a count"),
            memory: MiB(128),
            files: BootFiles {
                kernel: file("vmlinux", kernel, 0o444),
                kernel_digest: format!("sha256:{}", "0".repeat(64)).parse().expect("a digest"),
                initramfs: file("initramfs", &[0; 4096], 0o444),
                rootfs: file("image", &[0; 1 << 20], 0o444),
            },
            disk: file("disk", &[0; 1 << 20], 0o600),
            extra_disks: Vec::new(),
            seat: Seat { slot: Slot(0), uid, gid: uid, netns: netns.path.clone(), address: [127, 0, 0, 1].into() },
        };
        let consoles = Consoles::new(state.path());
        Self { state, instance, consoles, machine, netns }
    }

    /// As a daemon makes it when it starts.
    pub async fn driver(&self, config: &Config) -> Firecracker {
        let (state, consoles) = (self.state.path(), self.consoles.clone());
        Firecracker::new(state, &self.instance, consoles, config).await.expect("a driver")
    }

    pub fn netns(&self) -> &Path {
        &self.netns.path
    }

    pub fn root(&self) -> PathBuf {
        self.state.path().join("jail/firecracker").join(self.machine.id.to_string()).join("root")
    }
}

/// A namespace that lives as long as a thread in it.
struct Netns {
    path: PathBuf,
    done: Option<mpsc::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Netns {
    async fn new(uid: u32) -> Self {
        let (sender, receiver) = mpsc::channel();
        let (done, wait) = mpsc::channel::<()>();
        let thread = std::thread::spawn(move || {
            // SAFETY: only the network namespace changes, and this thread does nothing else in its life.
            unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) }.expect("a namespace");
            let thread = rustix::thread::gettid().as_raw_nonzero();
            sender.send(format!("/proc/{}/task/{thread}/ns/net", std::process::id())).expect("a listener");
            // Until the other end is dropped.
            wait.recv().expect_err("nothing is ever sent");
        });
        let path = PathBuf::from(receiver.recv().expect("a namespace"));
        let inside = clawpot_host::netns::open(&path).expect("the namespace");
        let ip = find_program("ip", std::env::var_os("PATH").as_deref()).expect("ip");
        let args = ["tuntap", "add", "tap0", "mode", "tap", "user", &uid.to_string()].map(str::to_owned);
        Tool::new(ip).args(args).with(|spawn| spawn.netns(inside)).run().await.expect("a tap");
        Self { path, done: Some(done), thread: Some(thread) }
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        drop(self.done.take());
        if let Some(thread) = self.thread.take() {
            thread.join().expect("the namespace's thread");
        }
    }
}
