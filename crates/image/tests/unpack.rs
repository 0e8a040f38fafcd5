//! Layers become a file system: what is kept, what is hidden, and what every kind of bad archive is told. The helper is the real
//! one, in its user namespace; these tests run as root, as the server does.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use clawpot_core::ports::ImageLibrary as _;
use clawpot_image::Room;
use clawpot_types::{Digest, Kind};
use common::{Entry, FILE, Host, Layout, Tar, debugfs, digest, gzip, import, named};
use sha2::Digest as _;
use std::io::Write as _;
use tar::EntryType;

const SPARSE: usize = 8 << 20;

fn base() -> Vec<u8> {
    let mut sparse = vec![0; SPARSE];
    sparse[SPARSE - 4096..].fill(7);
    Tar::default()
        .dir("./")
        .dir("etc/")
        .file("etc/passwd", b"root:x:0:0::/root:/bin/sh\n")
        .add(&Entry { path: "etc/shadow", data: b"secret", mode: 0o640, owner: (0, 42), ..FILE })
        .dir("usr/")
        .dir("usr/lib/")
        .symlink("lib", "usr/lib")
        .symlink("abs", "/usr/lib")
        .file("usr/lib/one", b"one")
        .file("usr/lib/gone", b"gone")
        .dir("usr/opaque/")
        .file("usr/opaque/old", b"old")
        .dir("usr/bin/")
        .add(&Entry { path: "usr/bin/su", data: b"#!", mode: 0o4755, ..FILE })
        .add(&Entry {
            path: "usr/bin/ping",
            data: b"#!",
            mode: 0o755,
            // Version 2, effective, CAP_NET_RAW permitted.
            xattrs: &[
                ("security.capability", &[1, 0, 0, 2, 0, 32, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
                ("user.note", b"kept"),
                ("trusted.overlay.opaque", b"y"),
            ],
            ..FILE
        })
        .hard_link("usr/bin/ping6", "usr/bin/ping")
        .add(&Entry { path: "home", kind: EntryType::Directory, mode: 0o750, owner: (1000, 65_535), ..FILE })
        .add(&Entry { path: "usr/fifo", kind: EntryType::Fifo, mode: 0o620, ..FILE })
        .file("usr/sparse", &sparse)
        .add(&Entry { path: "dev/null", kind: EntryType::Char, ..FILE })
        .end()
}

fn upper() -> Vec<u8> {
    Tar::default()
        // Through symbolic links, relative and absolute; both mean usr/lib.
        .file("lib/two", b"two")
        .file("abs/three", b"three")
        .file("usr/lib/.wh.gone", b"")
        // What the same layer brings stays, wherever the mark stands.
        .file("usr/opaque/new", b"new")
        .file("usr/opaque/.wh..wh..opq", b"")
        .file("usr/opaque/newer", b"newer")
        .file("etc/.wh.never-was", b"")
        .file("nowhere/.wh.at-all", b"")
        // A file in the place of a directory, and the other way round.
        .file("home", b"a file now")
        .dir("usr/lib/one")
        .file("usr/lib/one/inside", b"inside")
        .end()
}

#[tokio::test]
async fn layers_become_a_file_system() {
    let host = Host::new();
    let library = host.library();
    let mut layout = Layout::new([base(), upper()]);
    layout.config = serde_json::json!({
        "Env": ["PATH=/usr/bin", "A=b=c"], "Entrypoint": ["/entry"], "Cmd": ["one"], "User": "app:1", "WorkingDir": "/srv",
    });
    let image = import(&library, layout.tar(), "team/app:1").await.unwrap();
    assert_eq!(image.names, ["team/app:1"]);
    assert_eq!((image.config.entrypoint, image.config.cmd), (vec!["/entry".to_owned()], vec!["one".to_owned()]));
    assert_eq!(image.config.env[1], ("A".to_owned(), "b=c".to_owned()));
    assert_eq!((image.config.cwd.as_str(), image.config.user.as_str()), ("/srv", "app:1"));

    let image = library.describe(&named("team/app:1")).await.unwrap();
    let stat = async |path: &str| debugfs(&host, &image, &format!("stat {path}")).await;
    let list = async |path: &str| debugfs(&host, &image, &format!("ls -p {path}")).await;
    let cat = async |path: &str| debugfs(&host, &image, &format!("cat {path}")).await;
    assert_eq!(cat("/usr/lib/two").await + &cat("/usr/lib/three").await, "twothree");
    assert!(!list("/usr/lib").await.contains("gone"));
    let opaque = list("/usr/opaque").await;
    assert!(!opaque.contains("/old/") && opaque.contains("/new/") && opaque.contains("/newer/"), "{opaque}");
    assert!(!list("/").await.contains("nowhere") && !list("/usr/lib").await.contains(".wh."));
    assert_eq!(cat("/home").await, "a file now");
    assert_eq!(cat("/usr/lib/one/inside").await, "inside");
    let shadow = stat("/etc/shadow").await;
    assert!(shadow.contains("Mode:  0640") && shadow.contains("User:     0   Group:    42"), "{shadow}");
    assert!(stat("/usr/bin/su").await.contains("Mode:  04755"));
    let ping = stat("/usr/bin/ping").await;
    assert!(ping.contains("Links: 2") && ping.contains("security.capability") && ping.contains("user.note"), "{ping}");
    assert!(!ping.contains("trusted"), "{ping}");
    assert!(ping.contains("1 00 00 02 00 20") || ping.contains("\\001\\000\\000\\002"), "version 2 again: {ping}");
    assert!(stat("/usr/fifo").await.contains("Type: FIFO"));
    assert!(stat("/lib").await.contains("usr/lib"));
    assert!(!list("/").await.contains("/dev/"));
    // 8 MiB of which a page is data.
    let sparse = stat("/usr/sparse").await;
    assert!(sparse.contains(&format!("Size: {SPARSE}")) && sparse.contains("Blockcount: 8"), "{sparse}");
    // 2023-11-14: the archive's time, of files and of directories that got files later.
    for path in ["/etc/passwd", "/usr/opaque", "/usr/lib"] {
        let stat = stat(path).await;
        assert!(stat.contains("mtime: 0x6553f100"), "{path}: {stat}");
    }
    let check = clawpot_host::process::find_program("e2fsck", None).unwrap();
    let manifest = clawpot_image::store::Store::new(&host.images()).unwrap().by_digest(&image.info.digest).unwrap();
    let rootfs = host.images().join("blobs/sha256").join(manifest.rootfs.blob.digest.hex());
    clawpot_host::process::Tool::new(check).args(["-f", "-n"]).args([&rootfs]).run().await.unwrap();
}

const MUCH: &[u8] = &[b'x'; 60_000];

fn headers(count: usize, add: impl Fn(Tar, usize) -> Tar) -> Tar {
    (0..count).fold(Tar::default(), add)
}

/// In each of the four ways in which an archive can say where a file's data is: made by GNU tar itself.
#[tokio::test]
async fn sparse_files_of_every_format_are_unpacked() {
    use std::os::unix::fs::FileExt as _;
    const STEP: u64 = 16 << 10;
    let host = Host::new();
    // More stretches than fit into a header of any kind, and a hole at both ends.
    let (dir, size) = (host.dir.path().join("made"), 33 * STEP);
    std::fs::create_dir(&dir).unwrap();
    let mut content = vec![0; usize::try_from(size).unwrap()];
    for at in 1..32 {
        let start = usize::try_from(at * STEP).unwrap();
        content[start..start + 4096].fill(b'a' + u8::try_from(at % 26).unwrap());
    }
    let formats = [("gnu", "1.0"), ("pax", "0.0"), ("pax", "0.1"), ("pax", "1.0")];
    let mut layers = Vec::new();
    for (format, version) in formats {
        let name = format!("{format}-{version}");
        let file = std::fs::File::create(dir.join(&name)).unwrap();
        for (at, page) in (0..).step_by(4096).zip(content.chunks(4096)).filter(|(_, page)| page[0] != 0) {
            file.write_all_at(page, at).unwrap();
        }
        file.set_len(size).unwrap();
        drop(file);
        let tar = clawpot_host::process::Tool::new(clawpot_host::process::find_program("tar", None).unwrap());
        let archive = dir.join("archive");
        let (format, version) = (format!("--format={format}"), format!("--sparse-version={version}"));
        let words =
            [&format, "--sparse", &version, "--hole-detection=raw", "--numeric-owner", "--owner=0", "--group=0"];
        tar.args(words)
            .args(["-cf".as_ref(), archive.as_os_str(), "-C".as_ref(), dir.as_os_str()])
            .args([&name])
            .run()
            .await
            .unwrap();
        let layer = std::fs::read(&archive).unwrap();
        assert!(layer.len() < content.len() / 2, "{name}: tar found no holes");
        layers.push(layer);
    }
    let image = import(&host.library(), Layout::new(layers).tar(), "sparse").await.unwrap();
    for (format, version) in formats {
        let name = format!("/{format}-{version}");
        let stat = debugfs(&host, &image, &format!("stat {name}")).await;
        let blocks = stat.split("Blockcount: ").nth(1).and_then(|rest| rest.lines().next()?.trim().parse::<u64>().ok());
        // 31 pages, and one for where they are.
        assert!(stat.contains(&format!("Size: {size}")) && blocks.is_some_and(|blocks| blocks <= 32 * 8), "{stat}");
        assert!(debugfs(&host, &image, &format!("cat {name}")).await.as_bytes() == content, "{name}");
    }
}

/// What no honest tool makes, and what is said of it.
fn attacks() -> Vec<(&'static str, Vec<u8>, Kind, &'static str)> {
    let file = |path: &str| Tar::default().file(path, b"x").end();
    let bad = Kind::InvalidArgument;
    let deep = "d/".repeat(49);
    let deeper =
        Tar::default().dir(&deep).symlink("s", &deep).dir(&format!("s/{deep}")).symlink("t", &format!("s/{deep}"));
    let mut cut = Tar::default().file("a", &[7; 2000]).end();
    cut.truncate(1500);
    vec![
        ("an absolute name", file("/etc/passwd"), bad, "its name is absolute"),
        ("..", file("a/../../b"), bad, "has \"..\" in it"),
        (".. alone", file(".."), bad, "has \"..\" in it"),
        (
            "a link out, then through it",
            Tar::default().symlink("s", "../../../tmp").file("s/x", b"x").end(),
            bad,
            "leads out of the image",
        ),
        (
            "a chain of links out",
            Tar::default().dir("a").symlink("a/s", "..").symlink("t", "a/s/../..").file("t/x", b"x").end(),
            bad,
            "leads out of the image",
        ),
        (
            "a loop of links",
            Tar::default().symlink("a", "b").symlink("b", "a").file("a/x", b"x").end(),
            bad,
            "opening the directory",
        ),
        ("a hard link out", Tar::default().hard_link("a", "../../etc/shadow").end(), bad, "has \"..\" in it"),
        ("an absolute hard link", Tar::default().hard_link("a", "/etc/shadow").end(), bad, "its name is absolute"),
        ("a hard link to nothing", Tar::default().hard_link("a", "etc/shadow").end(), bad, "which is not there"),
        (
            "a hard link through a link out",
            Tar::default().symlink("s", "../../../etc").hard_link("a", "s/shadow").end(),
            bad,
            "leads out of the image",
        ),
        ("a hard link to a directory", Tar::default().dir("d").hard_link("a", "d").end(), bad, "a directory"),
        (
            "a device",
            Tar::default().add(&Entry { path: "sda", kind: EntryType::Block, ..FILE }).end(),
            bad,
            "a device node outside /dev",
        ),
        (
            "an owner out of range",
            Tar::default().add(&Entry { path: "a", owner: (65_536, 0), ..FILE }).end(),
            bad,
            "outside 0 to 65535",
        ),
        (
            "a long name",
            Tar::default().add(&Entry { kind: EntryType::GNULongName, data: &[b'a'; 2 << 20], ..FILE }).end(),
            bad,
            "2097152 bytes, over",
        ),
        (
            "a part of 300 bytes",
            Tar::default()
                .add(&Entry { kind: EntryType::GNULongName, data: &[b'a'; 300], ..FILE })
                .file("x", b"")
                .end(),
            bad,
            "over 255 bytes",
        ),
        (
            "headers without an entry",
            headers(65, |tar, _| tar.pax(EntryType::XHeader, [])).file("a", b"").end(),
            bad,
            "over 64 headers in a row",
        ),
        (
            "attributes without end",
            headers(20, |tar, n| tar.pax(EntryType::XHeader, [(format!("SCHILY.xattr.user.{n}"), MUCH)]))
                .file("a", b"")
                .end(),
            bad,
            "extended attributes have over",
        ),
        (
            "much said of all entries",
            headers(2, |tar, _| {
                tar.pax(EntryType::XGlobalHeader, [("comment".to_owned(), &MUCH[..40_000])]).file("a", b"")
            })
            .end(),
            bad,
            "headers for all entries have over",
        ),
        ("depth through links", deeper.dir(&format!("t/{}", "d/".repeat(40))).end(), bad, "directories deep"),
        ("no tar", vec![b'x'; 4096], bad, "not a tar archive"),
        ("a cut archive", cut, bad, "the archive ends"),
        ("a bomb", Tar::default().file("zeros", &vec![0; 300 << 20]).end(), Kind::Exhausted, "a bomb"),
        (
            "a file of 2^60 bytes that is one hole",
            Tar::default()
                .pax(
                    EntryType::XHeader,
                    [
                        ("GNU.sparse.size".to_owned(), b"1152921504606846976".as_slice()),
                        ("GNU.sparse.map".to_owned(), b"0,0"),
                    ],
                )
                .file("huge", b"")
                .end(),
            Kind::Exhausted,
            "entry \"huge\": a file of 1099511627776 MiB",
        ),
        (
            "a map of holes that goes back",
            Tar::default()
                .pax(
                    EntryType::XHeader,
                    [("GNU.sparse.size".to_owned(), b"8192".as_slice()), ("GNU.sparse.map".to_owned(), b"4096,1,0,1")],
                )
                .file("a", b"xx")
                .end(),
            bad,
            "its map of data and holes makes no sense",
        ),
        (
            "a map of holes that goes on behind the file",
            Tar::default()
                .pax(
                    EntryType::XHeader,
                    [("GNU.sparse.size".to_owned(), b"8192".as_slice()), ("GNU.sparse.map".to_owned(), b"8191,2")],
                )
                .file("a", b"xx")
                .end(),
            bad,
            "its map of data and holes makes no sense",
        ),
        ("a whiteout of ..", file(".wh..."), bad, "hides nothing"),
        (
            "an unknown type",
            Tar::default().add(&Entry { path: "a", kind: EntryType::new(b'Z'), ..FILE }).end(),
            bad,
            "unknown type",
        ),
    ]
}

#[tokio::test]
async fn attacks_get_a_clear_error_and_leave_nothing() {
    let host = Host::new();
    let library = host.library();
    let good = Layout::new([Tar::default().file("a", b"a").end()]).tar();
    import(&library, good, "good").await.unwrap();
    let before = host.files();
    let outside = std::fs::metadata("/etc/shadow").unwrap();
    for (what, layer, kind, word) in attacks() {
        let error = import(&library, Layout::new([layer]).tar(), "bad").await.expect_err(what);
        assert!(error.chain().contains(word), "{what}: {}", error.chain());
        assert_eq!(error.kind(), kind, "{what}: {}", error.chain());
        assert_eq!(host.files(), before, "{what}");
    }
    use std::os::unix::fs::MetadataExt as _;
    assert_eq!(std::fs::metadata("/etc/shadow").unwrap().nlink(), outside.nlink());
    assert!(!std::path::Path::new("/tmp/x").exists());
}

#[tokio::test]
async fn what_is_wrong_with_the_archive_itself_is_said() {
    let host = Host::new();
    let library = host.library();
    let layer = Tar::default().file("a", b"a").end();
    let layout = || Layout::new([layer.clone()]);
    let other = digest(b"other");
    let cases = vec![
        (
            "another machine's",
            Layout { architecture: "arm64", ..layout() }.tar(),
            Kind::Unsupported,
            "there is linux/arm64",
        ),
        (
            "a missing layer",
            Layout { lie: Some(other.clone()), ..layout() }.tar(),
            Kind::InvalidArgument,
            "not in the archive",
        ),
        (
            "a false diff_id",
            Layout { diff_lie: Some(other.clone()), ..layout() }.tar(),
            Kind::Corrupt,
            "unpacked it has the digest",
        ),
        (
            "a false blob",
            Tar::default().file("index.json", b"{}").file(&format!("blobs/sha256/{}", other.hex()), b"not it").end(),
            Kind::Corrupt,
            "its content has the digest",
        ),
        (
            "no image",
            Tar::default().file("readme", b"hello").end(),
            Kind::InvalidArgument,
            "neither index.json nor manifest.json",
        ),
        (
            "damaged gzip",
            Layout {
                layers: vec![(
                    {
                        let mut b = gzip(&layer);
                        let n = b.len();
                        b[n / 2] ^= 0xff;
                        b
                    },
                    layer.clone(),
                )],
                ..layout()
            }
            .tar(),
            Kind::InvalidArgument,
            "layer 1",
        ),
        ("nothing", Vec::new(), Kind::InvalidArgument, "neither index.json"),
        // The server reads these itself: what it keeps of them is bounded.
        (
            "headers without an entry",
            headers(65, |tar, _| tar.pax(EntryType::XHeader, [])).0,
            Kind::InvalidArgument,
            "over 64 headers in a row",
        ),
        (
            "links without end",
            headers(2100, |tar, n| {
                tar.pax(EntryType::XHeader, [("linkpath".to_owned(), &MUCH[..4096])]).symlink(&format!("link{n}"), "x")
            })
            .end(),
            Kind::InvalidArgument,
            "names in the archive have over 8 MiB",
        ),
    ];
    for (what, archive, kind, word) in cases {
        let error = import(&library, archive, "bad").await.expect_err(what);
        assert!(error.chain().contains(word), "{what}: {}", error.chain());
        assert_eq!(error.kind(), kind, "{what}: {}", error.chain());
        assert_eq!(host.files(), Vec::<String>::new(), "{what}");
    }
}

#[tokio::test]
async fn plain_and_zstd_layers_are_read_as_well() {
    let host = Host::new();
    let library = host.library();
    let layer = |name: &str| Tar::default().file(name, b"here").end();
    let mut layout = Layout::new([]);
    layout.layers = vec![
        (layer("plain"), layer("plain")),
        (zstd::encode_all(layer("zstd").as_slice(), 3).unwrap(), layer("zstd")),
        (gzip(&layer("gzip")), layer("gzip")),
    ];
    let image = import(&library, layout.tar(), "three").await.unwrap();
    for name in ["plain", "zstd", "gzip"] {
        assert_eq!(debugfs(&host, &image, &format!("cat /{name}")).await, "here");
    }
    // The same once more is there already, and the same file system byte for byte when it is made anew.
    let again = import(&library, layout.tar(), "again").await.unwrap();
    assert_eq!(again.info.digest, image.info.digest);
    assert_eq!(again.names, ["again", "three"]);
}

#[tokio::test]
async fn a_layer_that_rotted_on_the_disk_is_not_used_again() {
    let host = Host::new();
    let library = host.library();
    let layer = |name: &str| Tar::default().file(name, b"here").end();
    import(&library, Layout::new([layer("one")]).tar(), "first").await.unwrap();
    let kept = host.images().join("oci/sha256").join(digest(&gzip(&layer("one"))).hex());
    let mut bytes = std::fs::read(&kept).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    clawpot_host::fs::replace(&kept, &bytes, 0o444).unwrap();
    let image = import(&library, Layout::new([layer("one"), layer("two")]).tar(), "second").await.unwrap();
    assert_eq!(debugfs(&host, &image, "cat /one").await + &debugfs(&host, &image, "cat /two").await, "herehere");
}

#[tokio::test]
async fn of_two_files_of_one_name_each_is_its_own_digests() {
    let host = Host::new();
    let library = host.library();
    let layers = [Tar::default().file("a", b"first").end(), Tar::default().file("a", b"other").end()];
    let first = Layout { layers: vec![(layers[0].clone(), layers[0].clone())], ..Layout::new([]) };
    // The layer, and behind it under a name that says no digest first the layer again, then as many bytes of something else.
    let mut archive = first.tar();
    archive.truncate(archive.len() - 1024);
    let blob = format!("blobs/sha256/{}", digest(&layers[0]).hex());
    let archive = [archive, Tar::default().file("twice", &layers[0]).file("twice", &layers[1]).end()].concat();
    let image = import(&library, archive, "first").await.unwrap();
    assert_eq!(debugfs(&host, &image, "cat /a").await, "first");
    assert_eq!(std::fs::read(host.images().join("oci").join(blob.trim_start_matches("blobs/"))).unwrap(), layers[0]);
    // What `docker save` calls a layer is a name: the later one has it, and then the digest of the content is wrong.
    let saved = br#"[{"Config":"config.json","RepoTags":null,"Layers":["layer.tar"]}]"#;
    let config = serde_json::json!({
        "architecture": "amd64", "os": "linux", "rootfs": { "type": "layers", "diff_ids": [digest(&layers[0])] },
    });
    let archive = Tar::default()
        .file("manifest.json", saved)
        .file("config.json", &serde_json::to_vec(&config).unwrap())
        .file("layer.tar", &layers[0])
        .file("layer.tar", &layers[1])
        .end();
    let error = import(&library, archive, "second").await.unwrap_err();
    assert!(error.kind() == Kind::Corrupt && error.chain().contains("unpacked it has"), "{}", error.chain());
}

#[tokio::test]
async fn limits_are_the_images_and_the_disks() {
    let host = Host::new();
    let mib =
        |count: usize| Tar::default().file("a", &(0..=250_u8).cycle().take(count << 20).collect::<Vec<_>>()).end();
    let room = Room { quota: Some(4 << 20), reserve: 0, ..Room::default() };
    let error = import(&host.library_with(room), Layout::new([mib(8)]).tar(), "big").await.unwrap_err();
    assert_eq!(error.kind(), Kind::Exhausted, "{}", error.chain());
    let room = Room { reserve: u64::MAX / 2, ..Room::default() };
    let error = import(&host.library_with(room), Layout::new([mib(1)]).tar(), "big").await.unwrap_err();
    assert!(error.kind() == Kind::Exhausted && error.chain().contains("stay free"), "{}", error.chain());
    assert_eq!(host.files(), Vec::<String>::new());
    // What others are unpacking counts too.
    let unpacking = host.images().join("cache/unpack-x/tree");
    std::fs::create_dir_all(&unpacking).unwrap();
    std::io::copy(&mut [1; 24 << 20].as_slice(), &mut std::fs::File::create(unpacking.join("file")).unwrap()).unwrap();
    let room = Room { quota: Some(40 << 20), reserve: 0, ..Room::default() };
    let small = || Layout::new([Tar::default().file("a", b"a").end()]).tar();
    let error = import(&host.library_with(room), small(), "small").await.unwrap_err();
    assert!(error.chain().contains("24 of the quota's 40 MiB are used"), "{}", error.chain());
    std::fs::remove_dir_all(host.images().join("cache/unpack-x")).unwrap();
    import(&host.library_with(room), small(), "small").await.unwrap();
}

/// Each has 1 KiB or less of the archive.
#[tokio::test]
async fn many_small_files_are_counted_as_what_they_take_of_the_disk() {
    let host = Host::new();
    let room = Room { quota: Some(40 << 20), reserve: 0, ..Room::default() };
    let many = |count: usize, add: &dyn Fn(Tar, &str) -> Tar| {
        Layout::new([(0..count).fold(Tar::default(), |tar, n| add(tar, &n.to_string())).end()]).tar()
    };
    let file = |tar: Tar, name: &str| tar.file(name, b"x");
    let error = import(&host.library_with(room), many(6000, &file), "small").await.unwrap_err();
    assert!(error.chain().contains("larger than 19 MiB unpacked"), "{}", error.chain());
    assert_eq!(error.kind(), Kind::Exhausted, "{}", error.chain());
    // These take nothing of the tree, and a block each is kept for them in the image.
    let link = |tar: Tar, name: &str| tar.symlink(name, "x");
    let error = import(&host.library_with(room), many(6000, &link), "small").await.unwrap_err();
    assert!(error.chain().contains("the image's file system would have"), "{}", error.chain());
    assert_eq!(error.kind(), Kind::Exhausted, "{}", error.chain());
    assert_eq!(host.files(), Vec::<String>::new());
    import(&host.library_with(room), many(2000, &file), "small").await.unwrap();
}

/// A layer of `count` entries, some of each kind: packed, and its digest unpacked. It is never whole in memory.
fn many(count: usize) -> (Vec<u8>, Digest) {
    let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    let mut hasher = sha2::Sha256::new();
    let entry = |number: usize| {
        let (dir, file) = (format!("d{}/", number / 1000), format!("d{}/{number}", number / 1000));
        match number % 1000 {
            0 => Tar::default().dir(&dir),
            1 => Tar::default().symlink(&file, "x"),
            2 => Tar::default().hard_link(&file, &format!("d{}/{}", number / 1000, number - 1)),
            _ => Tar::default().file(&file, b""),
        }
    };
    for bytes in (0..count).map(|number| entry(number).0).chain([Tar::default().end()]) {
        packed.write_all(&bytes).unwrap();
        hasher.update(&bytes);
    }
    (packed.finish().unwrap(), Digest::from_sha256(&hasher.finalize().into()))
}

/// A layout of one such layer.
fn layout_of_many(count: usize) -> Vec<u8> {
    let (packed, diff_id) = many(count);
    Layout { layers: vec![(packed, Vec::new())], diff_lie: Some(diff_id), ..Layout::new([]) }.tar()
}

#[tokio::test]
async fn one_entry_too_many_is_refused_and_leaves_nothing() {
    let host = Host::new();
    let library = host.library_with(Room { reserve: 0, entries: 250, ..Room::default() });
    let error = import(&library, layout_of_many(251), "many").await.unwrap_err();
    assert_eq!(error.kind(), Kind::Exhausted, "{}", error.chain());
    assert!(error.chain().contains("more than 250 entries"), "{}", error.chain());
    assert!(error.next_step().is_some_and(|hint| hint.contains("--image-max-entries")));
    assert_eq!(host.files(), Vec::<String>::new());
    let image = import(&library, layout_of_many(250), "many").await.unwrap();
    assert!(debugfs(&host, &image, "stat /d0/249").await.contains("Type: regular"));
    assert!(Room::entries(0).is_err() && Room::entries(5_000_000).is_err() && Room::entries(1_000_000).is_ok());
}

/// `mke2fs` makes an inode for each name that a symbolic link has, and more of them than there are to spare.
#[tokio::test]
async fn a_symbolic_link_may_have_many_names() {
    let host = Host::new();
    let names = (0..200).fold(Tar::default().file("file", b"here").symlink("first", "file"), |tar, number| {
        tar.hard_link(&format!("name{number}"), "first")
    });
    let image = import(&host.library(), Layout::new([names.end()]).tar(), "links").await.unwrap();
    assert!(debugfs(&host, &image, "stat /name199").await.contains("Fast link dest: \"file\""));
}

/// The real limit, by command:
/// `cargo nextest run --release -p clawpot-image --run-ignored only -E 'test(real_limit_just_met)' --no-capture`
///
/// And the other one some minutes later: an ext4 without a journal looks at every inode that was freed in the last five before it takes
/// one, and each of these frees 800,000.
#[tokio::test]
#[ignore = "a minute, and 800,000 inodes of the disk"]
async fn the_real_limit_just_met() {
    let host = Host::new();
    let most = layout_of_many(800_000);
    let begun = std::time::Instant::now();
    let image = import(&host.library(), most, "most").await.unwrap();
    let (took, mib) = (begun.elapsed().as_secs(), image.info.size_bytes >> 20);
    println!(
        "800,000 entries: {took} s, an image of {mib} MiB, most memory of a helper {} MiB",
        children_most_kib() >> 10
    );
    assert!(debugfs(&host, &image, "stat /d799/799999").await.contains("Type: regular"));
}

#[tokio::test]
#[ignore = "a minute, and 800,000 inodes of the disk"]
async fn the_real_limit_by_a_million() {
    let host = Host::new();
    let million = layout_of_many(1_000_000);
    let begun = std::time::Instant::now();
    let error = import(&host.library(), million, "million").await.unwrap_err();
    println!(
        "1,000,000 entries: {} s, most memory of a helper {} MiB",
        begun.elapsed().as_secs(),
        children_most_kib() >> 10
    );
    assert!(error.chain().contains("more than 800000 entries"), "{}", error.chain());
    assert_eq!(host.files(), Vec::<String>::new());
}

/// The largest resident size that a child which has ended has had, KiB.
fn children_most_kib() -> i64 {
    // SAFETY: a plain old structure of numbers, which the call fills.
    let mut usage = unsafe { std::mem::zeroed::<libc::rusage>() };
    // SAFETY: writes to the structure and nothing else.
    assert_eq!(unsafe { libc::getrusage(libc::RUSAGE_CHILDREN, &raw mut usage) }, 0);
    usage.ru_maxrss
}
