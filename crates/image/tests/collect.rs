//! Names, references and collections: nothing that anything uses goes, whichever process uses it.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::collections::BTreeSet;
use std::time::Duration;

use clawpot_core::ports::{Collect, ImageLibrary as _, Images as _};
use clawpot_host::process::{Output, Spawn};
use clawpot_types::{Digest, ImageRef, Kind};
use common::{Host, Layout, Tar, digest, import, named};

fn layer(text: &str) -> Vec<u8> {
    Tar::default().file("text", text.as_bytes()).end()
}

/// A kernel and an initramfs, without which no image is resolved.
fn boot(host: &Host) {
    let blob = |bytes: &[u8]| {
        let digest = digest(bytes);
        clawpot_host::fs::replace(&host.images().join("blobs/sha256").join(digest.hex()), bytes, 0o444).unwrap();
        format!(r#""digest":"{digest}","size":{}"#, bytes.len())
    };
    let text = format!(r#"{{"version":1,"kernel":{{{}}},"initramfs":{{{}}}}}"#, blob(b"kernel"), blob(b"initramfs"));
    clawpot_host::fs::replace(&host.images().join("boot.json"), text.as_bytes(), 0o444).unwrap();
}

async fn names(library: &clawpot_image::Library) -> Vec<String> {
    library.list().await.unwrap().0.into_iter().map(|image| image.name).collect()
}

#[tokio::test]
async fn what_has_no_name_and_no_vm_goes_and_nothing_else() {
    let host = Host::new();
    let local = host.local("state");
    let library = host.library();
    let a = import(&library, Layout::new([layer("shared"), layer("a")]).tar(), "a").await.unwrap();
    boot(&host);
    let b = import(&library, Layout::new([layer("shared"), layer("b")]).tar(), "b").await.unwrap();
    library.tag(&named("a"), &named("also/a:1"), false).await.unwrap();
    // A clash is an error, unless it is wanted; the same again is none.
    let error = library.tag(&named("b"), &named("a"), false).await.unwrap_err();
    assert_eq!(error.kind(), Kind::AlreadyExists, "{}", error.chain());
    library.tag(&named("a"), &named("also/a:1"), false).await.unwrap();
    let error = import(&library, Layout::new([layer("c")]).tar(), "a").await.unwrap_err();
    assert_eq!(error.kind(), Kind::AlreadyExists, "{}", error.chain());

    assert_eq!(library.gc(Collect::default()).await.unwrap().removed, []);
    library.untag(&named("a")).await.unwrap();
    assert_eq!(library.gc(Collect::default()).await.unwrap().removed, [], "it has another name");
    assert_eq!(library.untag(&named("a")).await.unwrap_err().kind(), Kind::NotFound);
    library.untag(&named("also/a:1")).await.unwrap();
    // A VM of it: pinned by digest, also without a name.
    let by_digest = ImageRef::Digest(a.info.digest.clone());
    local.resolve(&by_digest).await.unwrap();
    let pin = clawpot_core::ImagePin { digest: a.info.digest.clone() };
    assert_eq!(host.library().gc(Collect::default()).await.unwrap().removed, [], "a VM uses it");
    local.ensure(&pin).await.unwrap();
    // The VM is gone, which only its server can say.
    library.hold(None).await.unwrap();
    let told = library.gc(Collect { dry_run: true, ..Collect::default() }).await.unwrap();
    let before = host.files();
    assert!(!told.removed.is_empty());
    let collected = library.gc(Collect::default()).await.unwrap();
    assert_eq!(collected.removed, told.removed, "what was told is what goes");
    assert_eq!(before.len() - host.files().len(), collected.removed.len());
    assert_eq!(library.describe(&by_digest).await.unwrap_err().kind(), Kind::NotFound);
    // The other is whole, with the layer that both had.
    let pin = clawpot_core::ImagePin { digest: b.info.digest.clone() };
    local.ensure(&pin).await.unwrap();
    assert_eq!(names(&library).await, ["b"]);
    let layers = library.gc(Collect { all: true, ..Collect::default() }).await.unwrap().removed;
    assert_eq!(layers.iter().filter(|one| one.kind == "layer").count(), 3, "two layers and a configuration");
    local.ensure(&pin).await.unwrap();
}

#[tokio::test]
async fn what_cannot_be_read_stops_a_collection() {
    let host = Host::new();
    let library = host.library();
    import(&library, Layout::new([layer("a")]).tar(), "a").await.unwrap();
    let before = host.files();
    for (file, word) in [
        ("manifests/broken.json", "broken cannot be read"),
        ("refs/0123456789abcdef.json", "refs/0123456789abcdef.json"),
    ] {
        let path = host.images().join(file);
        clawpot_host::fs::replace(&path, b"{", 0o644).unwrap();
        library.untag(&named("a")).await.unwrap_or_else(|_| digest(b""));
        let error = library.gc(Collect::default()).await.unwrap_err();
        assert!(error.chain().contains(word), "{}", error.chain());
        std::fs::remove_file(path).unwrap();
    }
    assert_eq!(host.files().len(), before.len() - 1, "only the name is gone");
}

#[tokio::test]
async fn an_export_comes_back_under_the_same_digest() {
    use futures_util::StreamExt as _;
    let (here, there) = (Host::new(), Host::new());
    let library = here.library();
    let mut layout = Layout::new([layer("a")]);
    layout.config = serde_json::json!({ "Cmd": ["one"] });
    let image = import(&library, layout.tar(), "team/a:1").await.unwrap();
    let mut archive = Vec::new();
    let mut chunks = library.export(&named("team/a:1")).await.unwrap();
    while let Some(chunk) = chunks.next().await {
        archive.extend(chunk.unwrap());
    }
    let again = there.library();
    let import = clawpot_core::ports::Import { name: None, replace: false, select: String::new() };
    let back = common::import_as(&again, archive, import).await.unwrap();
    assert_eq!((back.info.digest.clone(), back.names.as_slice()), (image.info.digest, &["team/a:1".to_owned()][..]));
    assert_eq!(back.config, image.config);
    boot(&there);
    there.local("state").ensure(&clawpot_core::ImagePin { digest: back.info.digest }).await.unwrap();
}

/// The other server: a process of its own, which this test starts as itself.
const OTHER: &str = "CLAWPOT_TEST_OTHER";
/// Collections meanwhile, and the file that tells it of them.
const ROUNDS: u32 = 20;
const ENOUGH: &str = "enough";

fn other(host: &Host, what: &str) -> clawpot_host::process::Child {
    let log = std::fs::File::create(host.dir.path().join(format!("{what}.log"))).unwrap();
    Spawn::new(std::env::current_exe().unwrap())
        .args(["--exact", "the_other_process", "--nocapture", "--ignored"])
        .env(OTHER, format!("{what}:{}", host.dir.path().display()))
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .stdout(Output::To(log.try_clone().unwrap().into()))
        .stderr(Output::To(log.into()))
        .spawn()
        .unwrap()
}

fn log(host: &Host, what: &str) -> String {
    std::fs::read_to_string(host.dir.path().join(format!("{what}.log"))).unwrap()
}

#[tokio::test]
async fn two_processes_share_a_store() {
    let host = Host::new();
    std::fs::create_dir(host.dir.path().join("other")).unwrap();
    let library = host.library();
    let kept = import(&library, Layout::new([layer("kept")]).tar(), "kept").await.unwrap();
    boot(&host);
    // The other makes a VM of it and goes; here the name goes. It stays until the other's state directory is gone.
    let exit = other(&host, "hold").wait().await.unwrap();
    assert!(exit.is_success(), "{}", log(&host, "hold"));
    library.untag(&named("kept")).await.unwrap();
    assert_eq!(library.gc(Collect::default()).await.unwrap().removed, []);
    assert!(library.describe(&ImageRef::Digest(kept.info.digest.clone())).await.is_ok());

    // The other imports, resolves and forgets images over and over; here everything is collected as fast as it goes.
    let child = other(&host, "churn");
    let mut rounds = 0;
    let all = Collect { all: true, ..Collect::default() };
    let exit = loop {
        library.gc(all.clone()).await.unwrap();
        rounds += 1;
        if rounds == ROUNDS {
            drop(std::fs::File::create(host.dir.path().join(ENOUGH)).unwrap());
        }
        if let Ok(exit) = tokio::time::timeout(Duration::from_millis(5), child.wait()).await {
            break exit.unwrap();
        }
    };
    assert!(exit.is_success(), "after {rounds} collections: {}", log(&host, "churn"));

    std::fs::remove_dir_all(host.dir.path().join("other")).unwrap();
    let removed = library.gc(all).await.unwrap().removed;
    assert!(removed.iter().any(|one| one.name == kept.info.digest.hex()), "{removed:?}");
    assert!(
        !host.files().iter().any(|name| name.starts_with("refs/") || name.starts_with("cache/")),
        "{:?}",
        host.files()
    );
}

#[tokio::test]
#[ignore = "the second process of two_processes_share_a_store"]
async fn the_other_process() {
    let said = std::env::var(OTHER).unwrap();
    let (what, dir) = said.split_once(':').unwrap();
    let dir = std::path::Path::new(dir);
    let local = clawpot_image::LocalImages::open(&dir.join("images"), &dir.join("other")).unwrap();
    if what == "hold" {
        let pin = local.resolve(&named("kept")).await.unwrap();
        local.ensure(&pin).await.unwrap();
        return;
    }
    let room = clawpot_image::Room { reserve: 0, ..clawpot_image::Room::default() };
    let library = local.library(std::path::Path::new(env!("CARGO_BIN_EXE_clawpot-unpack")), room);
    let mut live: BTreeSet<Digest> = BTreeSet::new();
    // Until enough was collected meanwhile, however the two share the machine; not for ever without the other.
    for round in (0..500).take_while(|round| *round < 12 || !dir.join(ENOUGH).exists()) {
        let name = format!("churn-{round}");
        import(&library, Layout::new([layer("shared"), layer(&name)]).tar(), &name).await.unwrap();
        let pin = local.resolve(&named(&name)).await.unwrap();
        library.untag(&named(&name)).await.unwrap();
        // From here on only the VM uses it.
        tokio::time::sleep(Duration::from_millis(20)).await;
        local.ensure(&pin).await.unwrap();
        live.insert(pin.digest);
    }
    for digest in &live {
        local.ensure(&clawpot_core::ImagePin { digest: digest.clone() }).await.unwrap();
    }
}
