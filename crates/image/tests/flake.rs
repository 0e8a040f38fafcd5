//! A build's files on the host: the flake's directory becomes a disk, and what a guest left on the other becomes an image, or a
//! clear error. The helper is the real one; these tests run as root, as the server does.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]
#![allow(clippy::disallowed_methods, reason = "files of a test need not survive a crash")]

mod common;

use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use clawpot_core::VmmKind;
use clawpot_core::ports::{BuildName, ImageDetail, ImageLibrary as _, LaidOut, Revision, Source, Workbench as _};
use clawpot_host::process::{Tool, find_program};
use clawpot_image::{Bench, Room};
use clawpot_types::{Digest, Kind, MiB, Result, Timestamp, VmId};
use common::{Entry, FILE, Host, Tar, digest, named};
use tar::EntryType;

fn bench(host: &Host) -> Bench {
    let helper = Path::new(env!("CARGO_BIN_EXE_clawpot-unpack"));
    let library = host.library_with(Room { reserve: 0, ..Room::default() });
    Bench::open(library, helper, &host.dir.path().join("state"), VmmKind::Qemu).unwrap()
}

fn id(n: u8) -> VmId {
    VmId::from_random([n; VmId::LEN])
}

async fn receive(bench: &Bench, build: &VmId, archive: Vec<u8>) -> Result<Source> {
    let chunks: Vec<_> = archive.chunks(10_000).map(|chunk| Ok(Bytes::copy_from_slice(chunk))).collect();
    bench.receive(build, Box::pin(futures_util::stream::iter(chunks))).await
}

fn flake() -> Tar {
    Tar::default().file("flake.nix", b"{ outputs = _: { }; }").file("flake.lock", b"{}").dir("src").file("src/a", b"a")
}

fn called(name: &str, replace: bool) -> BuildName {
    BuildName { name: named(name), replace }
}

fn revision(key: Option<Digest>) -> Revision {
    Revision {
        flake: ".".to_owned(),
        attr: "image".to_owned(),
        lock: Some(digest(b"{}")),
        source: Some(digest(b"source")),
        builder: digest(b"builder"),
        network: "none".to_owned(),
        kernel_release: None,
        out_path: "/nix/store/x".to_owned(),
        started_at: Timestamp(1),
        finished_at: Timestamp(2),
        build: Some(id(9)),
        key,
    }
}

/// One that has what it needs built in.
fn kernel() -> Vec<u8> {
    let mut bytes = kernel_without_drivers();
    for name in ["devtmpfs", "virtio-mmio", "virtio-pci", "virtio_blk", "virtio_net", "vmw_vsock_virtio_transport"] {
        bytes.extend(format!("{name}\0").bytes());
    }
    bytes.extend(b"EXT4-fs error\0overlayfs: upper\0");
    bytes
}

fn kernel_without_drivers() -> Vec<u8> {
    let mut bytes = vec![0; 128];
    bytes[..6].copy_from_slice(b"\x7fELF\x02\x01");
    (bytes[16], bytes[18]) = (2, 62);
    (bytes[32], bytes[54], bytes[56], bytes[64]) = (64, 56, 1, 1);
    bytes.extend(b"Linux version 6.1.0-41-test (someone)\0");
    bytes
}

/// An ext4 of 4 MiB with one file in it.
async fn rootfs(host: &Host) -> Vec<u8> {
    let (tree, file) = (host.dir.path().join("tree"), host.dir.path().join("rootfs.tmp"));
    std::fs::create_dir_all(&tree).unwrap();
    std::fs::write(tree.join("hello"), "hello").unwrap();
    let tool = Tool::new(find_program("mke2fs", None).unwrap()).args(["-q", "-F", "-t", "ext4", "-d"]);
    tool.args([tree.as_os_str(), file.as_os_str(), "4M".as_ref()]).run().await.unwrap();
    std::fs::read(file).unwrap()
}

fn base(kernel: &[u8], rootfs: &[u8]) -> Vec<u8> {
    let file =
        |name: &str, bytes: &[u8]| serde_json::json!({ "file": name, "digest": digest(bytes), "size": bytes.len() });
    let base = serde_json::json!({
        "vcpu_count": 2, "mem_size_mib": 320, "boot_args": "quiet",
        "kernel": file("vmlinux", kernel), "rootfs": file("rootfs.ext4", rootfs),
    });
    serde_json::to_vec(&base).unwrap()
}

/// What a guest leaves: done without a guest, by a tool that writes into the disk.
async fn leave(disk: &Path, commands: &[String]) {
    let list = disk.with_extension("commands");
    std::fs::write(&list, commands.join("\n")).unwrap();
    let tool = Tool::new(find_program("debugfs", None).unwrap());
    tool.args(["-w".as_ref(), "-f".as_ref(), list.as_os_str(), disk.as_os_str()]).run().await.unwrap();
    std::fs::remove_file(list).unwrap();
}

async fn leave_files(host: &Host, disk: &Path, files: &[(&str, &[u8])]) {
    let mut commands = Vec::new();
    for (name, bytes) in files {
        let from = host.dir.path().join(format!("left-{name}"));
        std::fs::write(&from, bytes).unwrap();
        commands.push(format!("write {} {name}", from.display()));
    }
    leave(disk, &commands).await;
}

async fn laid_out(bench: &Bench, build: &VmId) -> PathBuf {
    bench.lay_out(build, MiB(64)).await.unwrap().disks.remove(0)
}

fn nothing_half_made(host: &Host) {
    let left: Vec<_> =
        host.files().into_iter().filter(|name| name.contains("unpack-") || name.ends_with(".tmp")).collect();
    assert!(left.is_empty(), "{left:?}");
}

#[tokio::test]
async fn a_flakes_directory_becomes_a_read_only_disk_and_its_lock_is_known() {
    let host = Host::new();
    let bench = bench(&host);
    // No layer of an image: a name is only a name.
    let marks = flake().file("src/.wh.a", b"b").file(".wh..wh..opq", b"c");
    let archive = marks.symlink("out", "/etc/passwd").symlink("up", "../../../../etc").end();
    let source = receive(&bench, &id(1), archive.clone()).await.unwrap();
    assert_eq!(source, Source { digest: digest(&archive), lock: Some(digest(b"{}")) });
    let LaidOut { disks, sources } = bench.lay_out(&id(1), MiB(64)).await.unwrap();
    assert!((MiB(1)..MiB(64)).contains(&sources), "{sources}");
    let [output, source] = &disks[..] else { panic!("{disks:?}") };
    let meta = std::fs::metadata(output).unwrap();
    assert_eq!(meta.len(), 64 << 20);
    assert!(meta.blocks() * 512 < 8 << 20, "sparse: {} blocks", meta.blocks());
    let tool = Tool::new(find_program("debugfs", None).unwrap()).args(["-R", "ls -l /"]).args([source]);
    let listing = String::from_utf8_lossy(&tool.run().await.unwrap()).into_owned();
    for name in ["flake.nix", "flake.lock", "src", "out", "up", ".wh..wh..opq"] {
        assert!(listing.contains(name), "{listing}");
    }
    let tool = Tool::new(find_program("debugfs", None).unwrap()).args(["-R", "ls -p /src"]).args([source]);
    let listing = String::from_utf8_lossy(&tool.run().await.unwrap()).into_owned();
    assert!(listing.contains("/a/") && listing.contains("/.wh.a/"), "{listing}");
    // The links are links there, to nothing of this host.
    let tool = Tool::new(find_program("debugfs", None).unwrap()).args(["-R", "stat /out"]).args([source]);
    assert!(String::from_utf8_lossy(&tool.run().await.unwrap()).contains("Fast link dest: \"/etc/passwd\""));
    assert_eq!(bench.left().await.unwrap(), [id(1)]);
    bench.clear(&id(1)).await.unwrap();
    bench.clear(&id(1)).await.unwrap();
    assert_eq!(bench.left().await.unwrap(), []);
    assert_eq!(std::fs::read_dir(host.dir.path().join("state/builds")).unwrap().count(), 0);
}

/// One more for the next entry, of 60,000 bytes.
fn attribute(tar: Tar, number: usize) -> Tar {
    tar.pax(EntryType::XHeader, [(format!("SCHILY.xattr.user.{number}"), [b'x'; 60_000].as_slice())])
}

#[tokio::test]
async fn what_is_no_flake_is_told_before_anything_is_made() {
    let host = Host::new();
    let bench = bench(&host);
    let cases = [
        (Tar::default().file("README", b"").end(), Kind::InvalidArgument, "no flake.nix"),
        (Tar::default().dir("flake.nix").end(), Kind::InvalidArgument, "no flake.nix"),
        (Vec::new(), Kind::InvalidArgument, "no flake.nix"),
        (flake().file("../up", b"").end(), Kind::InvalidArgument, ".."),
        (flake().file("/etc/x", b"").end(), Kind::InvalidArgument, "absolute"),
        (b"what is this?".repeat(100), Kind::InvalidArgument, "reading the archive"),
        // The server reads this itself, before any entry comes of it.
        (
            (0..20).fold(Tar::default(), attribute).file("flake.nix", b"").end(),
            Kind::InvalidArgument,
            "extended attributes have over",
        ),
    ];
    for (n, (archive, kind, why)) in (1..).zip(cases) {
        let error = receive(&bench, &id(n), archive).await.unwrap_err();
        assert_eq!(error.kind(), kind, "{}", error.chain());
        assert!(error.chain().contains(why), "{why}: {}", error.chain());
        bench.clear(&id(n)).await.unwrap();
    }
    // Links out of it are found out by the helper, which follows none.
    let archive = flake()
        .symlink("etc", "/etc")
        .add(&Entry { kind: EntryType::Regular, path: "etc/evil", data: b"x", ..FILE })
        .end();
    receive(&bench, &id(9), archive).await.unwrap();
    let _told_or_inside = bench.lay_out(&id(9), MiB(64)).await;
    assert!(!Path::new("/etc/evil").exists());
}

async fn built(host: &Host, bench: &Bench, name: &BuildName, key: Option<Digest>) -> Result<ImageDetail> {
    let disk = laid_out(bench, &id(1)).await;
    let (kernel, rootfs) = (kernel(), rootfs(host).await);
    leave_files(
        host,
        &disk,
        &[
            ("vmlinux", &kernel),
            ("rootfs.ext4", &rootfs),
            ("fc-base.json", &base(&kernel, &rootfs)),
            ("build.log", b"log"),
        ],
    )
    .await;
    let image = bench.take(&id(1), revision(key), name).await;
    bench.clear(&id(1)).await.unwrap();
    image
}

#[tokio::test]
async fn a_result_becomes_an_image_with_its_own_kernel_and_its_revision() {
    let host = Host::new();
    let bench = bench(&host);
    let key = digest(b"key");
    assert_eq!(bench.known(Some(&key), &called("app", false)).await.unwrap(), None);
    let image = built(&host, &bench, &called("app", false), Some(key.clone())).await.unwrap();
    assert_eq!(image.kernel, Some(digest(&kernel())));
    assert_eq!((image.machine.vcpus.map(u32::from), image.machine.memory), (Some(2), Some(MiB(320))));
    let told = image.revision.clone().unwrap();
    assert_eq!(told, Revision { kernel_release: Some("6.1.0-41-test".to_owned()), ..revision(Some(key.clone())) });
    assert!(common::debugfs(&host, &image, "cat /hello").await.contains("hello"));
    nothing_half_made(&host);
    let blob = host.images().join("blobs/sha256").join(digest(&kernel()).hex());
    let meta = std::fs::metadata(blob).unwrap();
    assert_eq!((meta.uid(), meta.mode() & 0o7777), (0, 0o444));

    // The same again is known by its key, under any name that is free.
    let again = bench.known(Some(&key), &called("other", false)).await.unwrap().unwrap();
    assert_eq!(again.info.digest, image.info.digest);
    bench.may_call(&called("app", false)).await.unwrap();
    assert_eq!(bench.known(Some(&key), &called("app", false)).await.unwrap().unwrap().info.digest, image.info.digest);
    let clash = bench.known(Some(&digest(b"another")), &called("app", false)).await.unwrap_err();
    assert_eq!(clash.kind(), Kind::AlreadyExists);
    assert!(clash.next_step().unwrap().contains("--replace"));
    assert_eq!(bench.known(None, &called("app", true)).await.unwrap(), None);

    // A collection keeps it while a name means it, its kernel too, and forgets it with its key after that.
    let library = host.library();
    library.gc(Default::default()).await.unwrap();
    assert!(bench.known(Some(&key), &called("app", false)).await.unwrap().is_some());
    for name in ["app", "other"] {
        library.untag(&named(name)).await.unwrap();
    }
    library.gc(Default::default()).await.unwrap();
    assert_eq!(bench.known(Some(&key), &called("app", false)).await.unwrap(), None);
    assert!(!host.files().iter().any(|name| name.contains(digest(&kernel()).hex())), "{:?}", host.files());
}

#[tokio::test]
async fn a_name_that_means_something_else_is_not_taken() {
    let host = Host::new();
    let bench = bench(&host);
    let imported = common::Layout::new([Tar::default().file("a", b"a").end()]);
    common::import(&host.library(), imported.tar(), "taken").await.unwrap();
    assert_eq!(bench.may_call(&called("taken", false)).await.unwrap_err().kind(), Kind::AlreadyExists);
    bench.may_call(&called("taken", true)).await.unwrap();
    let before = host.files();
    let error = built(&host, &bench, &called("taken", false), None).await.unwrap_err();
    assert_eq!(error.kind(), Kind::AlreadyExists, "also where it came to mean something meanwhile");
    assert_eq!(host.files(), before);
    built(&host, &bench, &called("taken", true), None).await.unwrap();
}

/// A disk as no honest guest leaves it. Each is told, nothing of it is kept, and nothing but the helper reads it.
#[tokio::test]
async fn hostile_disks_are_told_and_leave_nothing() {
    let host = Host::new();
    let bench = bench(&host);
    let (kernel, good) = (kernel(), rootfs(&host).await);
    let mut larger = good.clone();
    larger[1024 + 4..1024 + 8].copy_from_slice(&u32::MAX.to_le_bytes());
    let mut erofs = vec![0; 8192];
    erofs[1024..1028].copy_from_slice(&[0xe2, 0xe1, 0xf5, 0xe0]);
    let torn = base(b"another kernel", &good);
    type Left<'a> = &'a [(&'a str, &'a [u8])];
    let cases: [(Left<'_>, &str); 11] = [
        (&[], "left no vmlinux"),
        (&[("rootfs.ext4", &good)], "left no vmlinux"),
        (&[("vmlinux", &kernel)], "left no rootfs.ext4"),
        (&[("vmlinux", b""), ("rootfs.ext4", &good)], "kernel cannot be started"),
        (&[("vmlinux", b"#!/bin/sh\n"), ("rootfs.ext4", &good)], "kernel cannot be started"),
        (
            &[("vmlinux", &kernel_without_drivers()), ("rootfs.ext4", &good)],
            "cannot be booted: its kernel (6.1.0-41-test)",
        ),
        (&[("vmlinux", &kernel), ("rootfs.ext4", b"no file system")], "rootfs cannot be mounted: it is no ext4"),
        (&[("vmlinux", &kernel), ("rootfs.ext4", &larger)], "rootfs cannot be mounted: it says that it has"),
        (&[("vmlinux", &kernel), ("rootfs.ext4", &erofs)], "rootfs cannot be mounted: it is erofs"),
        (&[("vmlinux", &kernel), ("rootfs.ext4", &good), ("fc-base.json", &torn)], "the result is torn"),
        (&[("vmlinux", &kernel), ("rootfs.ext4", &good), ("fc-base.json", b"{")], "makes no sense"),
    ];
    for (n, (files, why)) in (1..).zip(cases) {
        let disk = laid_out(&bench, &id(n)).await;
        leave_files(&host, &disk, files).await;
        refused(&host, &bench, &id(n), why).await;
    }
    let [link, directory, huge, garbage, empty] = [21, 22, 23, 24, 25].map(id);
    // Names of this host where files should be.
    let disk = laid_out(&bench, &link).await;
    leave(&disk, &["symlink vmlinux /etc/passwd".to_owned(), "symlink rootfs.ext4 /etc/shadow".to_owned()]).await;
    refused(&host, &bench, &link, "").await;
    let disk = laid_out(&bench, &directory).await;
    leave(&disk, &["mkdir vmlinux".to_owned(), "mkdir rootfs.ext4".to_owned()]).await;
    refused(&host, &bench, &directory, "").await;
    // A file of a terabyte that takes nothing.
    let disk = laid_out(&bench, &huge).await;
    leave_files(&host, &disk, &[("rootfs.ext4", &good), ("vmlinux", &kernel)]).await;
    leave(&disk, &["sif rootfs.ext4 size 1099511627776".to_owned()]).await;
    refused(&host, &bench, &huge, "a file of the result is larger than 64 MiB").await;
    // No file system at all, and one whose middle was written over.
    let disk = laid_out(&bench, &empty).await;
    std::fs::File::options().write(true).open(&disk).unwrap().write_all_at(&[0; 8192], 0).unwrap();
    refused(&host, &bench, &empty, "debugfs cannot read it: ").await;
    let disk = laid_out(&bench, &garbage).await;
    leave_files(&host, &disk, &[("vmlinux", &kernel), ("rootfs.ext4", &good)]).await;
    let file = std::fs::File::options().write(true).open(&disk).unwrap();
    let noise: Vec<u8> = (0_u32..1 << 18).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    file.write_all_at(&noise, 4096).unwrap();
    refused(&host, &bench, &garbage, "").await;
}

/// Each file may be as large as there is room, and all of them together no more.
#[tokio::test]
async fn what_a_result_takes_of_the_store_has_an_end() {
    let host = Host::new();
    let helper = Path::new(env!("CARGO_BIN_EXE_clawpot-unpack"));
    let room = Room { reserve: 0, quota: Some(64 << 20), ..Room::default() };
    let bench = Bench::open(host.library_with(room), helper, &host.dir.path().join("state"), VmmKind::Qemu).unwrap();
    let disk = laid_out(&bench, &id(1)).await;
    leave_files(&host, &disk, &[("vmlinux", &kernel()), ("rootfs.ext4", &[1]), ("fc-base.json", b"{}")]).await;
    // Of nothing but a hole.
    leave(&disk, &["vmlinux", "rootfs.ext4", "fc-base.json"].map(|name| format!("sif {name} size 50000000"))).await;
    refused(&host, &bench, &id(1), "a file of the result is larger than").await;
}

async fn refused(host: &Host, bench: &Bench, build: &VmId, why: &str) {
    let error = bench.take(build, revision(Some(digest(b"k"))), &called("evil", false)).await.unwrap_err();
    assert!(error.chain().contains(why), "{why:?}: {}", error.chain());
    nothing_half_made(host);
    assert_eq!(host.files(), [""; 0], "{}", error.chain());
    bench.clear(build).await.unwrap();
}
