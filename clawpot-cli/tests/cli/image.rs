//! `image`, and what `run` makes of what an image says.

use std::os::unix::fs::PermissionsExt as _;

use crate::fake::Fake;
use crate::listing::steady;
use crate::run_with;

#[test]
fn an_image_is_shown_whole() {
    let fake = Fake::start();
    let shown = |args: &[&str]| {
        let ran = fake.run(args);
        assert_eq!((ran.code, ran.err.as_str()), (Some(0), ""), "{args:?}");
        ran.out
    };
    insta::assert_snapshot!("image-inspect", shown(&["image", "inspect", "app"]));
    insta::assert_snapshot!("image-inspect-json", steady(&shown(&["image", "inspect", "app", "-o", "json"])));
    insta::assert_snapshot!("image-gc", shown(&["image", "gc"]));
    insta::assert_snapshot!("image-gc-json", shown(&["image", "gc", "-n", "-o", "json"]));
}

#[test]
fn a_run_obeys_the_image() {
    let fake = Fake::start();
    let out = |args: &[&str]| {
        let ran = fake.run(args);
        assert_eq!(ran.code, Some(0), "{args:?}: {}", ran.err);
        ran.out
    };
    // Its entrypoint with its command, with the typed one, and with another entrypoint, which has no command of the image's.
    assert_eq!(out(&["run", "app"]), "one\n");
    assert_eq!(out(&["run", "app", "--", "three"]), "three\n");
    assert_eq!(out(&["run", "--entrypoint", "", "app", "--", "echo", "four"]), "four\n");
    assert_eq!(out(&["run", "--entrypoint", "echo", "app"]), "\n");
    // What the VM was made of counts, where the name came to mean another meanwhile.
    assert_eq!(out(&["run", "moved"]), "one\n");
    // One that cannot be described says nothing; without a command there is nothing to run.
    assert_eq!(out(&["run", "arm", "--", "echo", "x"]), "x\n");
    let ran = fake.run(&["run", "arm"]);
    assert_eq!(ran.code, Some(2));
    assert!(ran.err.contains("no command given"), "{}", ran.err);
}

#[test]
fn passwords_come_from_a_file_or_stdin() {
    let fake = Fake::start();
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("credentials");
    std::fs::write(&file, "me:secret\n").unwrap();
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).unwrap();
    let reference = "localhost:5000/demo/app:1.0";
    let ran = fake.run(&["image", "pull", reference, "--credentials", file.to_str().unwrap()]);
    assert_eq!((ran.code, ran.out.as_str(), ran.err.as_str()), (Some(0), "app\n", ""));
    let ran = run_with(fake.clawpot(&["image", "pull", reference, "--credentials", "-"]), b"me:secret");
    assert_eq!(ran.code, Some(0), "{}", ran.err);
    let ran = run_with(fake.clawpot(&["image", "pull", reference, "--credentials", "-"]), b"me:wrong\n");
    assert_eq!(ran.code, Some(1));
    assert!(ran.err.contains("it refuses demo/app:1.0"), "{}", ran.err);
    let ran = run_with(fake.clawpot(&["image", "pull", reference, "--credentials", "-"]), b"nonsense\n");
    assert_eq!(ran.code, Some(2));
    // Others can read it: told, not refused.
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o644)).unwrap();
    let ran = fake.run(&["image", "pull", reference, "--credentials", file.to_str().unwrap()]);
    assert!(ran.code == Some(0) && ran.err.contains("others can read it"), "{}", ran.err);
}

#[test]
fn archives_come_from_files_directories_and_stdin() {
    let fake = Fake::start();
    let dir = tempfile::tempdir().unwrap();
    let size = |ran: crate::Ran| {
        assert_eq!(ran.code, Some(0), "{}", ran.err);
        serde_json::from_str::<serde_json::Value>(&ran.out).unwrap()["size_bytes"].as_u64().unwrap()
    };
    let tar = dir.path().join("a.tar");
    std::fs::write(&tar, vec![7; 1 << 20]).unwrap();
    assert_eq!(size(fake.run(&["-o", "json", "image", "import", tar.to_str().unwrap(), "--name", "x"])), 1 << 20);
    let ran = run_with(fake.clawpot(&["-o", "json", "image", "import", "-", "--name", "x"]), b"hello");
    assert_eq!(size(ran), 5);
    // A layout: two files, one blob, a header each, whole blocks, two blocks of zeros.
    let layout = dir.path().join("layout");
    std::fs::create_dir_all(layout.join("blobs/sha256")).unwrap();
    for name in ["oci-layout", "index.json", "blobs/sha256/ab"] {
        std::fs::write(layout.join(name), "{}").unwrap();
    }
    assert_eq!(
        size(fake.run(&["-o", "json", "image", "import", layout.to_str().unwrap(), "--name", "x"])),
        3 * 1024 + 1024
    );
    for (bad, word) in [(dir.path().to_owned(), "no OCI layout"), (dir.path().join("none"), "No such file")] {
        let ran = fake.run(&["image", "import", bad.to_str().unwrap(), "--name", "x"]);
        assert!(ran.err.contains(word), "{}", ran.err);
    }
}

#[test]
fn exports_are_whole_or_not_there() {
    let fake = Fake::start();
    let dir = tempfile::tempdir().unwrap();
    let to = dir.path().join("app.tar");
    assert_eq!(fake.run(&["image", "export", "app", to.to_str().unwrap()]).code, Some(0));
    assert_eq!(std::fs::read(&to).unwrap(), b"one two");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    assert_eq!(fake.run(&["image", "export", "app", "-"]).out, "one two");
}

#[test]
fn names_are_given_and_taken() {
    let fake = Fake::start();
    assert_eq!(fake.run(&["image", "tag", "app", "free"]).out, "free\n");
    let ran = fake.run(&["image", "tag", "app", "taken"]);
    assert!(ran.code == Some(1) && ran.err.contains("it means another already"), "{}", ran.err);
    assert_eq!(fake.run(&["image", "tag", "app", "taken", "--replace"]).code, Some(0));
    assert_eq!(fake.run(&["image", "rm", "a", "b/c:1"]).out, "a\nb/c:1\n");
}
