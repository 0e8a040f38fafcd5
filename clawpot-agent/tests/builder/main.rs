//! The builder in this process, over a Unix socket, with a script in nix's place: what nix itself does is tested in a VM.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use clawpot_agent::builder::config::{Device, Place};
use clawpot_agent::builder::{Builder, Config, serve};
use clawpot_agent::exec::{Cgroups, Shared, Surroundings};
use clawpot_agent::reaper::{Reaper, Scope};
use clawpot_common::builder::{Base, MAX_LINE, MAX_LOG_LINE, Request, Response, encode};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{UnixListener, UnixStream};
use tokio_stream::wrappers::UnixListenerStream;

/// Far more than anything here takes.
const LONG: Duration = Duration::from_secs(60);

struct Room {
    dir: tempfile::TempDir,
    execs: Arc<Shared>,
    cgroups: PathBuf,
    tasks: Vec<tokio::task::JoinHandle<()>>,
}

struct Talk {
    read: tokio::io::Lines<BufReader<OwnedReadHalf>>,
    write: OwnedWriteHalf,
}

/// A builder whose nix is `script`, with `$store` and the arguments; `None` without the right to make cgroups.
async fn room(script: &str) -> Option<Room> {
    room_with(script, None).await
}

/// With a disk for the output.
async fn room_with(script: &str, output: Option<Device>) -> Option<Room> {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let mounts = std::fs::read_to_string("/proc/mounts").unwrap();
    let cgroup2 = mounts.lines().find(|line| line.split(' ').nth(2) == Some("cgroup2"))?.split(' ').nth(1)?;
    let name = format!("clawpot-builder-test-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
    let cgroups = Path::new(cgroup2).join(name);
    let Ok(made) = Cgroups::new(&cgroups) else {
        eprintln!("SKIPPED: cannot make {} (needs root)", cgroups.display());
        return None;
    };
    let reaper = Reaper::new(Scope::Started);
    let reaping = reaper.watch().unwrap();
    let execs = Shared::new(Surroundings {
        reaper,
        cgroups: made,
        root: "/".into(),
        files: None,
        memory: 8 << 20,
        patience: Duration::from_secs(30),
    })
    .unwrap();
    let dir = tempfile::tempdir().unwrap();
    for name in ["store", "out", "in"] {
        std::fs::create_dir(dir.path().join(name)).unwrap();
    }
    let nix = dir.path().join("nix");
    write_script(&nix, &format!("#!/bin/bash\nset -eu\nstore={}\n{script}\n", dir.path().join("store").display()));
    let place = |name: &str| Place { path: dir.path().join(name), device: None };
    let config = Config {
        output: Place { device: output, ..place("out") },
        input: place("in"),
        nix: nix.to_str().unwrap().into(),
        store: dir.path().join("store"),
    };
    let listener = UnixListener::bind(dir.path().join("socket")).unwrap();
    let builder = Builder::new(config, execs.clone());
    let serving = async { serve(builder, UnixListenerStream::new(listener)).await.unwrap() };
    let tasks = vec![tokio::spawn(reaping), tokio::spawn(serving)];
    Some(Room { dir, execs, cgroups, tasks })
}

/// Closed before it is executed, and never written to by a child forked meanwhile.
fn write_script(path: &Path, text: &str) {
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;
    let mut file = std::fs::File::options().write(true).create_new(true).mode(0o755).open(path).unwrap();
    file.write_all(text.as_bytes()).unwrap();
}

/// Says that it built `machine`, with a kernel and a root file system.
const MACHINE: &str = r#"mkdir -p "$store/machine"; echo k >"$store/machine/kernel"; echo r >"$store/machine/rootfs"
echo "[{\"outputs\":{\"out\":\"$store/machine\"}}]""#;

impl Room {
    async fn talk(&self) -> Talk {
        let (read, write) = UnixStream::connect(self.dir.path().join("socket")).await.unwrap().into_split();
        Talk { read: BufReader::new(read).lines(), write }
    }

    fn out(&self, name: &str) -> PathBuf {
        self.dir.path().join("out").join(name)
    }

    async fn wait_for_no_process(&self) {
        let begun = Instant::now();
        while !self.execs.cgroups.is_empty().unwrap() {
            assert!(begun.elapsed() < LONG, "processes are left");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        self.execs.cgroups.kill_all().unwrap();
        for task in &self.tasks {
            task.abort();
        }
        for _ in 0..200 {
            for child in std::fs::read_dir(&self.cgroups).into_iter().flatten().flatten() {
                std::fs::remove_dir(child.path()).ok();
            }
            if std::fs::remove_dir(&self.cgroups).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        eprintln!("left behind: {}", self.cgroups.display());
    }
}

impl Talk {
    async fn say(&mut self, request: &Request) {
        self.raw(&encode(request).unwrap()).await;
    }

    async fn raw(&mut self, bytes: &[u8]) {
        self.write.write_all(bytes).await.unwrap();
    }

    async fn hear(&mut self) -> Response {
        let line = tokio::time::timeout(LONG, self.read.next_line()).await.expect("nothing was said").unwrap();
        serde_json::from_str(&line.expect("hung up")).unwrap()
    }

    /// Up to the answer; the lines before it.
    async fn hear_all(&mut self) -> (Vec<String>, Response) {
        let mut lines = Vec::new();
        loop {
            match self.hear().await {
                Response::Log { line } => lines.push(line),
                other => return (lines, other),
            }
        }
    }

    async fn build(&mut self, timeout_secs: Option<u64>) -> (Vec<String>, Response) {
        self.say(&build("/build-in", "a", timeout_secs)).await;
        self.hear_all().await
    }
}

fn build(flake_ref: &str, attr: &str, timeout_secs: Option<u64>) -> Request {
    Request::Build { flake_ref: flake_ref.into(), attr: attr.into(), timeout_secs, substitute: false }
}

fn message(response: Response) -> String {
    match response {
        Response::Err { message } => message,
        other => panic!("expected an error, got {other:?}"),
    }
}

#[tokio::test]
async fn a_build_leaves_its_result_and_its_log() {
    let Some(room) = room(&format!("echo \"args: $*\" >&2\n{MACHINE}")).await else { return };
    let mut talk = room.talk().await;
    let (lines, response) = talk.build(None).await;
    assert_eq!(response, Response::Ok { out_path: room.dir.path().join("store/machine").to_str().unwrap().into() });
    assert!(lines[0].ends_with("-- path:/build-in#a"), "{lines:?}");
    let base: Base = serde_json::from_slice(&std::fs::read(room.out("fc-base.json")).unwrap()).unwrap();
    assert_eq!((base.kernel.file.as_str(), base.rootfs.size), ("vmlinux", 2));
    assert_eq!(std::fs::read_to_string(room.out("build.log")).unwrap(), format!("{}\n", lines[0]));
    // The same connection serves on.
    talk.say(&Request::Ping).await;
    assert_eq!(talk.hear().await, Response::Pong);
    room.wait_for_no_process().await;
}

#[tokio::test]
async fn what_is_no_request_is_an_error_and_no_end() {
    let Some(room) = room("exit 1").await else { return };
    let mut talk = room.talk().await;
    talk.raw(b"nonsense\n\n\"Pong\"\n{\"Build\":{}}\n\xff\n").await;
    for _ in 0..4 {
        assert!(message(talk.hear().await).starts_with("not a request: "));
    }
    talk.raw(&vec![b'x'; 3 * MAX_LINE]).await;
    talk.raw(b"\n").await;
    assert!(message(talk.hear().await).starts_with("a line longer than"));
    talk.say(&build("--help", "a", None)).await;
    assert!(message(talk.hear().await).starts_with("flake_ref: begins with -"));
    talk.say(&Request::Ping).await;
    assert_eq!(talk.hear().await, Response::Pong);
}

#[tokio::test]
async fn a_failing_build_says_why_and_leaves_only_its_log() {
    let script = "echo building >&2; echo 'error: no such attribute' >&2; exit 1";
    let Some(room) = room(script).await else { return };
    std::fs::File::create(room.out("vmlinux")).unwrap();
    let (lines, response) = room.talk().await.build(None).await;
    assert_eq!(lines, ["building", "error: no such attribute"]);
    assert_eq!(message(response), "nix build failed (exit code 1): error: no such attribute");
    assert!(!room.out("vmlinux").exists() && room.out("build.log").exists());
}

#[tokio::test]
async fn others_are_answered_while_a_build_runs_and_only_one_runs() {
    let script = format!("echo begun >&2; while [ ! -e \"$store/go\" ]; do sleep 0.05; done\n{MACHINE}");
    let Some(room) = room(&script).await else { return };
    let (mut one, mut other) = (room.talk().await, room.talk().await);
    one.say(&build("/build-in", "a", None)).await;
    // Streamed, not told at the end.
    assert_eq!(one.hear().await, Response::Log { line: "begun".into() });
    for talk in [&mut one, &mut other] {
        talk.say(&Request::Ping).await;
        assert_eq!(talk.hear().await, Response::Pong);
        talk.say(&build("/build-in", "b", None)).await;
        assert!(message(talk.hear().await).starts_with("a build is already running"));
    }
    std::fs::File::create(room.dir.path().join("store/go")).unwrap();
    assert!(matches!(one.hear_all().await.1, Response::Ok { .. }));
    assert!(matches!(other.build(None).await.1, Response::Ok { .. }));
}

#[tokio::test]
async fn the_timeout_kills_the_whole_tree() {
    let Some(room) = room("setsid sleep 1000 & echo begun >&2; sleep 1000").await else { return };
    let begun = Instant::now();
    let (_, response) = room.talk().await.build(Some(1)).await;
    assert_eq!(message(response), "the build took longer than 1 s and was killed");
    assert!(begun.elapsed() >= Duration::from_secs(1));
    room.wait_for_no_process().await;
}

#[tokio::test]
async fn a_host_that_hangs_up_ends_its_build() {
    let Some(room) = room("setsid sleep 1000 & echo begun >&2; sleep 1000").await else { return };
    let mut talk = room.talk().await;
    talk.say(&build("/build-in", "a", None)).await;
    talk.hear().await;
    drop(talk);
    room.wait_for_no_process().await;
    // And makes room for the next, which ends in the same way without having been listened to.
    let begun = Instant::now();
    loop {
        let mut talk = room.talk().await;
        talk.say(&build("/build-in", "a", None)).await;
        match talk.hear().await {
            Response::Log { .. } => break,
            other => assert!(begun.elapsed() < LONG, "{other:?}"),
        }
    }
    room.wait_for_no_process().await;
}

#[tokio::test]
async fn a_flood_is_bounded_and_fails_nothing() {
    let script = format!("head -c 100M /dev/zero | tr '\\0' x >&2; echo >&2; echo last >&2\n{MACHINE}");
    let Some(room) = room(&script).await else { return };
    let (lines, response) = room.talk().await.build(None).await;
    assert!(matches!(response, Response::Ok { .. }), "{response:?}");
    assert!(lines.iter().all(|line| line.len() <= MAX_LOG_LINE));
    let heard: usize = lines.iter().map(String::len).sum();
    assert!((16 << 20..17 << 20).contains(&heard), "{heard}");
    assert_eq!(lines.last().unwrap(), "last");
    assert!(lines.iter().any(|line| line.ends_with("bytes of output left out here]")));
    assert!(std::fs::metadata(room.out("build.log")).unwrap().len() < 17 << 20);
}

#[tokio::test]
async fn a_host_that_does_not_listen_holds_nobody_beyond_the_timeout() {
    let Some(room) = room("cat /dev/zero | tr '\\0' x | fold -w 1000 >&2").await else { return };
    let mut deaf = room.talk().await;
    deaf.say(&build("/build-in", "a", Some(1))).await;
    let mut other = room.talk().await;
    let begun = Instant::now();
    loop {
        other.say(&Request::Ping).await;
        assert_eq!(other.hear().await, Response::Pong);
        other.say(&build("/build-in", "a", Some(1))).await;
        match other.hear_all().await {
            (_, Response::Err { message }) if message.starts_with("a build is already") => {}
            (_, response) => break assert!(message(response).contains("took longer")),
        }
        assert!(begun.elapsed() < LONG);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    room.wait_for_no_process().await;
}

#[tokio::test]
async fn a_full_output_disk_is_called_that() {
    let script = r#"mkdir -p "$store/machine"; head -c 3M /dev/urandom >"$store/machine/kernel"; echo r >"$store/machine/rootfs"
        echo "[{\"outputs\":{\"out\":\"$store/machine\"}}]""#;
    let Some(room) = room(script).await else { return };
    let out = room.dir.path().join("out");
    let flags = rustix::mount::MountFlags::empty();
    if rustix::mount::mount("tmpfs", &out, "tmpfs", flags, c"size=1m").is_err() {
        return eprintln!("SKIPPED: may not mount");
    }
    let (_, response) = room.talk().await.build(None).await;
    let names: Vec<_> = std::fs::read_dir(&out).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    rustix::mount::unmount(&out, rustix::mount::UnmountFlags::empty()).unwrap();
    let message = message(response);
    assert!(message.starts_with("the output disk is full: it has 1 MiB in all, too little for vmlinux"), "{message}");
    assert_eq!(names, ["build.log"]);
}

#[tokio::test]
async fn the_output_disk_is_mounted_for_a_build_and_no_longer() {
    let dir = tempfile::tempdir().unwrap();
    let Some(disk) = LoopDevice::new(&dir.path().join("disk")) else { return };
    let script =
        format!("grep -c \" {}/out ext4 rw,nosuid,nodev\" /proc/mounts >&2\n{MACHINE}", "$(dirname \"$store\")");
    let device = Device { path: disk.0.clone().into(), not: 0 };
    let Some(room) = room_with(&script, Some(device)).await else { return };
    let (lines, response) = room.talk().await.build(None).await;
    assert!(matches!(response, Response::Ok { .. }), "{lines:?} {response:?}");
    assert_eq!(lines, ["1"]);
    let mounts = std::fs::read_to_string("/proc/mounts").unwrap();
    assert!(!mounts.contains(room.out("").to_str().unwrap().trim_end_matches('/')), "{mounts}");
    assert_eq!(std::fs::read_dir(room.out("")).unwrap().count(), 0);
    // As the host reads it: without mounting.
    assert_eq!(tool("debugfs", &["-R", "cat /vmlinux", &disk.0]).as_deref(), Some("k\n"));
    assert!(tool("debugfs", &["-R", "cat /fc-base.json", &disk.0]).unwrap().contains("sha256:"));
    assert!(tool("e2fsck", &["-fn", &disk.0]).is_some(), "the file system is not clean");
}

struct LoopDevice(String);

impl LoopDevice {
    /// An empty ext4 of 16 MiB; `None`, and a line that says so, where that cannot be.
    fn new(file: &Path) -> Option<Self> {
        std::fs::File::create(file).unwrap().set_len(16 << 20).unwrap();
        let path = file.to_str().unwrap();
        let made = tool("mke2fs", &["-q", "-t", "ext4", path]).and_then(|_| tool("losetup", &["-f", "--show", path]));
        if made.is_none() {
            eprintln!("SKIPPED: no mke2fs, or no loop device to be had");
        }
        made.map(|name| Self(name.trim().to_owned()))
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        tool("losetup", &["-d", &self.0]);
    }
}

/// Its output, if it succeeded.
#[allow(clippy::disallowed_methods, reason = "a test's tools; its reaper collects only children of its own")]
fn tool(name: &str, args: &[&str]) -> Option<String> {
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    let done = std::process::Command::new(name).args(args).env("PATH", path).output().ok()?;
    done.status.success().then(|| String::from_utf8_lossy(&done.stdout).into_owned())
}
