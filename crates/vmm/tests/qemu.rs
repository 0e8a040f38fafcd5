//! Real QEMUs. Needs root, `/dev/net/tun`, QEMU and `ip`; those that boot a guest need `assets/` (made by
//! `scripts/install-vm-assets.sh`). Says so when skipped.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

mod common;

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clawpot_core::ports::{BootFiles, Console, DiskFile, GuestEndpoint, Machine, Vmm};
use clawpot_core::{Fact, VmmEnd, VmmFact};
use clawpot_host::process::{Tool, find_program};
use clawpot_types::{Digest, MiB};
use clawpot_vmm::console::Consoles;
use clawpot_vmm::qemu::qmp::Qmp;
use clawpot_vmm::qemu::{Config, Qemu};
use common::{Netns, Place, needs_root};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

struct World {
    place: Place,
    _netns: Netns,
    machine: Machine,
    consoles: Consoles,
    qemu: Qemu,
}

impl World {
    /// `None`, having said why, where no QEMU can run.
    async fn new() -> Option<Self> {
        if !needs_root() {
            return None;
        }
        for thing in ["/dev/net/tun"] {
            if !Path::new(thing).exists() {
                eprintln!("SKIPPED: no {thing}");
                return None;
            }
        }
        if let Err(error) = find_program("qemu-system-x86_64", None).and_then(|_| find_program("ip", None)) {
            eprintln!("SKIPPED: {}", error.chain());
            return None;
        }
        let place = Place::new();
        let mut machine = place.machine();
        let netns = Netns::new().await;
        netns.taps(machine.seat.uid).await;
        machine.seat.netns = netns.path.clone();
        let (consoles, qemu) = daemon(&place).await;
        Some(Self { place, _netns: netns, machine, consoles, qemu })
    }

    async fn tail(&self) -> String {
        self.consoles.tail(&self.machine.id.vm, 50).await.unwrap().join("\n")
    }

    async fn end(self) {
        let id = &self.machine.id;
        self.qemu.stop(id).await.unwrap();
        tokio::time::timeout(common::LONG, self.qemu.exited(id)).await.unwrap();
        self.qemu.destroy(id).await.unwrap();
        self.consoles.erase(&id.vm).await.unwrap();
        self.place.nothing_left(&self.qemu.list().await.unwrap());
    }
}

async fn daemon(place: &Place) -> (Consoles, Qemu) {
    let consoles = Consoles::new(place.state());
    let qemu = Qemu::new(place.state(), &place.instance, consoles.clone(), &Config::default()).await.unwrap();
    (consoles, qemu)
}

/// Kernel, initramfs and image of this checkout, when they were made.
fn boot_files(place: &Place) -> Option<BootFiles> {
    let assets = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets").canonicalize().ok()?;
    let read = |name: &str| -> Option<serde_json::Value> {
        serde_json::from_slice(&std::fs::read(assets.join(name)).ok()?).ok()
    };
    let found = read("boot.json").zip(read("manifests/debian.json"));
    let Some((boot, image)) = found else {
        eprintln!("SKIPPED: no assets; make them: scripts/install-vm-assets.sh, scripts/setup-rootfs.sh");
        return None;
    };
    let blob = |value: &serde_json::Value| -> (PathBuf, Digest) {
        let digest: Digest = value["digest"].as_str().unwrap().parse().unwrap();
        (assets.join("blobs/sha256").join(digest.hex()), digest)
    };
    let (kernel, kernel_digest) = blob(&boot["kernel"]);
    if !clawpot_host::fs::same_filesystem(&kernel, place.state()).unwrap() {
        eprintln!("SKIPPED: assets and build output are on two file systems");
        return None;
    }
    Some(BootFiles { kernel, kernel_digest, initramfs: blob(&boot["initramfs"]).0, rootfs: blob(&image["rootfs"]).0 })
}

/// The upper disk, formatted as `crates/image` does it.
async fn format(disk: &Path) {
    File::create(disk).unwrap().set_len(1 << 30).unwrap();
    let mke2fs = Tool::new(find_program("mke2fs", None).unwrap());
    mke2fs.args(["-q", "-t", "ext4", "-E", "root_owner=0:0"]).args([disk]).run().await.unwrap();
}

const RUNNING: Fact<VmmFact> = Fact::Present(VmmFact::Running { attached: true });

/// A kernel and nothing else in the initramfs: the guest panics, tells so, and that ends its VMM.
#[tokio::test]
async fn a_boot_that_fails_tells_why_and_ends() {
    let Some(mut world) = World::new().await else { return };
    let Some(files) = boot_files(&world.place) else { return };
    world.machine.files.kernel = files.kernel;
    let id = world.machine.id.clone();
    world.qemu.prepare(&world.machine).await.unwrap();
    world.qemu.start(&world.machine).await.unwrap();
    tokio::time::timeout(common::LONG, world.qemu.exited(&id)).await.unwrap();
    let Fact::Present(VmmFact::Exited { how }) = world.qemu.inspect(&id).await else { panic!("not exited") };
    assert_eq!(how, VmmEnd::Code(0));
    assert!(world.tail().await.contains("Kernel panic - not syncing"), "{}", world.tail().await);
    world.end().await;
}

#[tokio::test]
async fn a_file_that_is_no_kernel_is_told_by_qemu() {
    let Some(world) = World::new().await else { return };
    std::fs::remove_file(&world.machine.files.kernel).unwrap();
    clawpot_host::fs::replace(&world.machine.files.kernel, &[0x7f; 4096], 0o444).unwrap();
    world.qemu.prepare(&world.machine).await.unwrap();
    world.qemu.start(&world.machine).await.unwrap();
    let id = world.machine.id.clone();
    tokio::time::timeout(common::LONG, world.qemu.exited(&id)).await.unwrap();
    assert_eq!(world.qemu.inspect(&id).await, Fact::Present(VmmFact::Exited { how: VmmEnd::Code(1) }));
    assert!(world.tail().await.contains("qemu"), "{}", world.tail().await);
    world.end().await;
}

#[tokio::test]
async fn without_its_network_it_does_not_start() {
    let Some(mut world) = World::new().await else { return };
    world.machine.seat.netns = "/nonexistent/netns".into();
    world.qemu.prepare(&world.machine).await.unwrap();
    let error = world.qemu.start(&world.machine).await.unwrap_err();
    assert!(error.chain().contains("/nonexistent/netns"), "{}", error.chain());
    assert_eq!(world.qemu.inspect(&world.machine.id).await, Fact::Present(VmmFact::Prepared));
    world.end().await;
}

/// Start to agent, as its own user in its own group and namespace; a second daemon adopts it; its end is noticed.
#[tokio::test]
async fn a_guest_boots_is_adopted_and_dies() {
    let Some(mut world) = World::new().await else { return };
    let Some(files) = boot_files(&world.place) else { return };
    world.machine.files = files;
    world.machine.memory = MiB(256);
    format(&world.machine.disk).await;
    let machine = world.machine.clone();

    let started = Instant::now();
    world.qemu.prepare(&machine).await.unwrap();
    let prepared = started.elapsed();
    world.qemu.start(&machine).await.unwrap();
    eprintln!("prepare {prepared:?}, start {:?}", started.elapsed() - prepared);
    world.qemu.start(&machine).await.unwrap();
    assert_eq!(world.qemu.inspect(&machine.id).await, RUNNING);

    let GuestEndpoint::Tcp { netns, address } = world.qemu.attach(&machine.id, &machine.seat).await.unwrap() else {
        panic!("not TCP")
    };
    let second = Duration::from_secs(1);
    common::until("the agent", async || {
        assert_eq!(world.qemu.inspect(&machine.id).await, RUNNING, "{}", world.tail().await);
        clawpot_host::netns::connect_tcp_in(&netns, address, second).await.is_ok()
    })
    .await;
    eprintln!("agent listens after {:?}", started.elapsed());

    confined(&world);
    limited(&world);
    greeted_through_its_socket(&world).await;

    let socket = world.place.file(&format!("jail/qemu/{}/root/api.sock", machine.id));
    let mut qmp = Qmp::connect(&socket).await.unwrap();
    assert!(qmp.status().await.unwrap().running);
    qmp.stop().await.unwrap();
    assert_eq!(qmp.status().await.unwrap().status, "paused");
    qmp.cont().await.unwrap();
    drop(qmp);

    let (consoles, qemu) = daemon(&world.place).await;
    assert_eq!(qemu.inspect(&machine.id).await, Fact::Present(VmmFact::Running { attached: false }));
    assert_eq!(qemu.list().await.unwrap(), vec![machine.id.clone()]);
    qemu.attach(&machine.id, &machine.seat).await.unwrap();
    assert_eq!(qemu.inspect(&machine.id).await, RUNNING);
    clawpot_host::netns::connect_tcp_in(&netns, address, common::LONG).await.unwrap();
    greeted_through_its_socket(&world).await;
    world.qemu.stop(&machine.id).await.unwrap();
    qemu.exited(&machine.id).await;
    assert!(matches!(qemu.inspect(&machine.id).await, Fact::Present(VmmFact::Exited { .. })));
    (world.consoles, world.qemu) = (consoles, qemu);
    world.end().await;
}

/// The guest mounts those that have a place, writable only where they are, and its own disk is the last; the jail gives all back.
/// That each is at its own place is seen from inside, by the suite's tests of volumes.
#[tokio::test]
async fn extra_disks_are_mounted_as_they_are_to_be() {
    let Some(mut world) = World::new().await else { return };
    let Some(files) = boot_files(&world.place) else { return };
    world.machine.files = files;
    world.machine.memory = MiB(256);
    format(&world.machine.disk).await;
    for (name, read_only, mount) in [
        ("raw", false, None),
        ("inner", false, Some("/data/inner")),
        ("ro", true, Some("/ro")),
        ("data", false, Some("/data")),
    ] {
        let file = world.place.file(name);
        format(&file).await;
        let mount = mount.map(|path| path.parse().unwrap());
        world.machine.extra_disks.push(DiskFile { file, read_only, mount });
    }
    let machine = world.machine.clone();
    world.qemu.prepare(&machine).await.unwrap();
    let owner = |name: &str| {
        let found = std::fs::metadata(world.place.file(name)).unwrap();
        (found.uid(), found.mode() & 0o777)
    };
    assert_eq!((owner("data"), owner("ro")), ((machine.seat.uid, 0o600), (0, 0o444)));
    world.qemu.start(&machine).await.unwrap();
    let GuestEndpoint::Tcp { netns, address } = world.qemu.attach(&machine.id, &machine.seat).await.unwrap() else {
        panic!("not TCP")
    };
    common::until("the agent", async || {
        assert_eq!(world.qemu.inspect(&machine.id).await, RUNNING, "{}", world.tail().await);
        clawpot_host::netns::connect_tcp_in(&netns, address, Duration::from_secs(1)).await.is_ok()
    })
    .await;
    world.qemu.stop(&machine.id).await.unwrap();
    world.qemu.exited(&machine.id).await;
    for (name, want) in [("raw", 0), ("inner", 1), ("ro", 0), ("data", 1)] {
        assert_eq!(mounted_writable(&world.place.file(name)).await, want, "{name}");
    }
    assert_eq!(mounted_writable(&machine.disk).await, 1);
    world.qemu.destroy(&machine.id).await.unwrap();
    let owners = ["raw", "inner", "ro", "data"].map(|name| std::fs::metadata(world.place.file(name)).unwrap().uid());
    assert_eq!(owners, [0; 4]);
    world.end().await;
}

/// How often: a kernel counts it in the superblock when it mounts, and at no mount that is read-only.
async fn mounted_writable(disk: &Path) -> u32 {
    let said = Tool::new(find_program("dumpe2fs", None).unwrap()).args(["-h"]).args([disk]).run().await.unwrap();
    let said = String::from_utf8(said).unwrap();
    said.lines().find_map(|line| line.strip_prefix("Mount count:")).unwrap().trim().parse().unwrap()
}

/// A program in the guest would else write beside it.
#[tokio::test]
async fn an_extra_disk_that_cannot_be_mounted_ends_the_boot() {
    let Some(mut world) = World::new().await else { return };
    let Some(files) = boot_files(&world.place) else { return };
    world.machine.files = files;
    world.machine.memory = MiB(256);
    format(&world.machine.disk).await;
    let file = world.place.file("empty");
    File::create(&file).unwrap().set_len(64 << 20).unwrap();
    world.machine.extra_disks = vec![DiskFile { file, read_only: false, mount: Some("/data".parse().unwrap()) }];
    let id = world.machine.id.clone();
    world.qemu.prepare(&world.machine).await.unwrap();
    world.qemu.start(&world.machine).await.unwrap();
    tokio::time::timeout(common::LONG, world.qemu.exited(&id)).await.unwrap();
    let said = world.tail().await;
    assert!(said.contains("cannot go on: mounting /dev/vdb (ext4) on /data"), "{said}");
    world.end().await;
}

/// Its `CONNECT` socket leads to the agent, which speaks HTTP/2: SETTINGS come first.
async fn greeted_through_its_socket(world: &World) {
    let jail = world.place.file(&format!("jail/qemu/{}", world.machine.id));
    assert_eq!(std::fs::metadata(&jail).unwrap().mode() & 0o777, 0o700, "root's alone");
    let mut stream = clawpot_host::unix::connect(&jail.join("v.sock")).await.unwrap();
    clawpot_host::connect::connect(&mut stream, 10051).await.unwrap();
    // The preface and empty SETTINGS of our own.
    stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.unwrap();
    let mut frame = [0; 9];
    let read = tokio::time::timeout(common::LONG, stream.read_exact(&mut frame)).await;
    read.unwrap().unwrap();
    assert_eq!((frame[3], &frame[5..]), (4, &[0; 4][..]), "not SETTINGS: {frame:?}");
}

/// The process is under the limits of every controller that this host has.
fn limited(world: &World) {
    let groups = clawpot_host::cgroup::Cgroups::find().unwrap();
    let name = format!("clawpot/{}/{}", world.place.instance, world.machine.id);
    let group = groups.group(&name).unwrap();
    let [member] = &group.members().unwrap()[..] else { panic!("not one process") };
    let text = std::fs::read_to_string(format!("/proc/{}/cgroup", member.pid)).unwrap();
    let missing: Vec<_> = groups.missing().unwrap().iter().map(|missing| missing.controller).collect();
    for controller in ["memory", "pids", "cpu"].iter().filter(|controller| !missing.contains(controller)) {
        // "4:memory:/clawpot/…"; without such a line it is version 2's.
        let v1 = text.lines().find(|line| line.split(':').nth(1).unwrap().split(',').any(|name| name == *controller));
        assert!(v1.is_none_or(|line| line.ends_with(&name)), "{controller} in {text}");
    }
}

/// Another user, another namespace, another directory, no capabilities, and nothing of ours open.
fn confined(world: &World) {
    let group = clawpot_host::cgroup::Cgroups::find().unwrap();
    let group = group.group(&format!("clawpot/{}/{}", world.place.instance, world.machine.id)).unwrap();
    let [member] = &group.members().unwrap()[..] else { panic!("not one process") };
    let proc = PathBuf::from(format!("/proc/{}", member.pid));
    let status = std::fs::read_to_string(proc.join("status")).unwrap();
    let uid = world.machine.seat.uid;
    let none = "0000000000000000";
    for line in [
        &format!("Uid:\t{uid}\t{uid}\t{uid}\t{uid}"),
        "Groups:\t ",
        &format!("CapEff:\t{none}"),
        &format!("CapBnd:\t{none}"),
        "NoNewPrivs:\t1",
        "Seccomp:\t2",
    ] {
        assert!(status.contains(line), "{line:?} is not in {status}");
    }
    assert_eq!(std::fs::read_link(proc.join("cwd")).unwrap().file_name().unwrap(), "root");
    let netns = |path: &Path| std::fs::metadata(path).unwrap().ino();
    assert_eq!(netns(&proc.join("ns/net")), netns(&world.machine.seat.netns));
    let open = std::fs::read_dir(proc.join("fd")).unwrap().filter_map(|fd| std::fs::read_link(fd.unwrap().path()).ok());
    let foreign: Vec<_> = open
        .filter(|target| {
            let fine = ["/dev/null", "/dev/net/tun"].iter().any(|fine| target == Path::new(fine));
            !fine && target.is_absolute() && !target.starts_with(world.place.state())
        })
        .collect();
    assert!(foreign.is_empty(), "{foreign:?}");
}
