//! Children as the drivers want them, made for real. What needs root says so when it is skipped.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, Instant};

use clawpot_host::cgroup::{Cgroup, Cgroups, Limits};
use clawpot_host::process::{Child, Exit, Identity, Output, Proof, Rlimits, Spawn, Tool, User, ended};
use clawpot_types::Kind;

fn is_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        eprintln!("SKIPPED: needs root");
    }
    root
}

fn pipe() -> (File, OwnedFd) {
    let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
    (File::from(read), write)
}

fn shell(script: &str) -> Spawn {
    Spawn::new("/bin/sh").args(["-c", script]).env("PATH", "/usr/bin:/bin")
}

/// A group of this test's own; its name dies with the test.
fn group(test: &str) -> Cgroup {
    let name = format!("clawpot-test-{}/{test}", std::process::id());
    Cgroups::find().unwrap().group(&name).unwrap()
}

#[tokio::test]
async fn a_child_has_what_was_named_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let (mut read, write) = pipe();
    let (_, extra) = pipe();
    let script =
        "pwd; env | sort | grep -v ^_= | grep -v ^PWD=; ls -l /proc/self/fd | wc -l; ulimit -n; ulimit -c; umask; cat";
    let spawn = shell(script).cwd(dir.path()).env("NAME", "value").stdout(Output::To(write)).fd(extra, 9);
    let child = spawn.rlimits(Rlimits { nofile: 300, ..Rlimits::default() }).spawn().unwrap();
    assert_eq!(child.wait().await.unwrap(), Exit::Code(0));
    let mut text = String::new();
    read.read_to_string(&mut text).unwrap();
    // `ls` has 0, 1, 2, 9, the directory it reads, and a "total" line.
    let want = format!("{}\nNAME=value\nPATH=/usr/bin:/bin\n6\n300\n0\n0077\n", dir.path().display());
    assert_eq!(text, want);
}

#[tokio::test]
async fn a_program_may_lie_where_its_user_cannot_go() {
    if !is_root() {
        return;
    }
    // As in a home directory of mode 0700, which is what Debian gives to everyone.
    let dir = tempfile::tempdir().unwrap();
    let program = dir.path().join("sleep");
    let mut copy = File::create(&program).unwrap();
    std::io::copy(&mut File::open("/bin/sleep").unwrap(), &mut copy).unwrap();
    copy.set_permissions(std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    drop(copy);
    let user = User { uid: 1_899_999_999, gid: 1_899_999_999 };
    let child = Spawn::new(&program).args(["0"]).cwd("/").user(user).spawn().unwrap();
    assert_eq!(child.wait().await.unwrap(), Exit::Code(0));
}

#[tokio::test]
async fn descriptors_change_places_without_loss() {
    let (mut one, one_write) = pipe();
    let (mut two, two_write) = pipe();
    use std::os::fd::AsRawFd;
    // Each wants the number that the other has now.
    let (a, b) = (one_write.as_raw_fd(), two_write.as_raw_fd());
    let script = format!("echo one >/proc/self/fd/{b}; echo two >/proc/self/fd/{a}");
    let child = shell(&script).fd(one_write, b).fd(two_write, a).spawn().unwrap();
    assert_eq!(child.wait().await.unwrap(), Exit::Code(0));
    let mut text = String::new();
    one.read_to_string(&mut text).unwrap();
    two.read_to_string(&mut text).unwrap();
    assert_eq!(text, "one\ntwo\n");
}

#[tokio::test]
async fn a_daemon_may_have_more_open_than_its_child_may() {
    if clawpot_host::process::raise_open_files().unwrap() < 1000 {
        eprintln!("SKIPPED: the limit of open files is under 1000");
        return;
    }
    let open: Vec<_> = (0..600).map(|_| File::open("/dev/null").unwrap()).collect();
    let limits = Rlimits { nofile: 300, ..Rlimits::default() };
    let child = shell("[ $(ulimit -n) = 300 ]").rlimits(limits).spawn().unwrap();
    assert_eq!(child.wait().await.unwrap(), Exit::Code(0));
    drop(open);
}

#[tokio::test]
async fn what_cannot_be_executed_is_told_exactly() {
    let error = Spawn::new("/nonexistent/vmm").spawn().unwrap_err();
    assert_eq!(error.kind(), Kind::NotFound);
    assert_eq!(error.chain(), "starting /nonexistent/vmm: executing it: No such file or directory (os error 2)");
    assert_eq!(Spawn::new("/etc/passwd").spawn().unwrap_err().kind(), Kind::PermissionDenied);
    let error = Spawn::new("/bin/true").cwd("/nonexistent").spawn().unwrap_err();
    assert!(error.chain().contains("opening its directory /nonexistent"), "{}", error.chain());
    assert_eq!(Spawn::new("/bin/true").args(["a\0b"]).spawn().unwrap_err().kind(), Kind::InvalidArgument);
    assert_eq!(Spawn::new("/bin/true").args(["x".repeat(3 << 20)]).spawn().unwrap_err().kind(), Kind::Internal);
}

#[tokio::test]
async fn ends_are_told_and_dropped_children_leave_no_zombie() {
    assert_eq!(shell("exit 7").spawn().unwrap().wait().await.unwrap(), Exit::Code(7));
    let child = shell("sleep 60").spawn().unwrap();
    child.kill().unwrap();
    assert_eq!(child.wait().await.unwrap().to_string(), "killed by signal 9");
    child.kill().unwrap();

    let child = shell("exit 0").spawn().unwrap();
    let pid = child.pid();
    drop(child);
    let started = Instant::now();
    while std::path::Path::new(&format!("/proc/{pid}")).exists() {
        assert!(started.elapsed() < Duration::from_secs(30), "process {pid} was not reaped");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn a_user_without_privileges_has_none() {
    if !is_root() {
        return;
    }
    let (mut read, write) = pipe();
    let script = "id -u; id -g; id -G; grep -E '^(CapEff|CapPrm|CapBnd|NoNewPrivs)' /proc/self/status";
    let user = User { uid: 1_900_000_007, gid: 1_900_000_007 };
    let child = shell(script).user(user).stdout(Output::To(write)).spawn().unwrap();
    assert_eq!(child.wait().await.unwrap(), Exit::Code(0));
    let mut text = String::new();
    read.read_to_string(&mut text).unwrap();
    let none = "0000000000000000";
    let want = format!(
        "1900000007\n1900000007\n1900000007\nCapPrm:\t{none}\nCapEff:\t{none}\nCapBnd:\t{none}\nNoNewPrivs:\t1\n"
    );
    assert_eq!(text, want);
}

#[tokio::test]
async fn a_cgroup_is_the_set_of_its_processes() {
    if !is_root() {
        return;
    }
    let group = group("set");
    assert_eq!(group.populated().unwrap(), None);
    assert!(group.members().unwrap().is_empty());
    group.empty().await.unwrap();
    group.kill().unwrap();
    group.create(&Limits::default()).unwrap();
    group.create(&Limits::default()).unwrap();
    assert_eq!(group.populated().unwrap(), Some(false));

    // The child leaves its session and its parent; the group keeps both.
    let child = shell("setsid sleep 60 & exec sleep 60").cgroup(&group).unwrap().spawn().unwrap();
    let identity = Identity::of(child.pid()).unwrap();
    assert!(identity.cgroup.ends_with(group.name()), "{identity:?}");
    let started = Instant::now();
    while group.members().unwrap().len() < 2 {
        assert!(started.elapsed() < Duration::from_secs(30));
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(tokio::time::timeout(Duration::from_millis(50), group.empty()).await.is_err());
    assert_eq!(group.remove().await.unwrap_err().kind(), Kind::FailedPrecondition);
    let member = group.members().unwrap().pop().unwrap();

    group.kill().unwrap();
    tokio::time::timeout(Duration::from_secs(30), group.empty()).await.unwrap().unwrap();
    assert!(group.members().unwrap().is_empty());
    // Its group is empty a moment before a process has ended.
    ended(&member.pidfd).await.unwrap();
    ended(&child).await.unwrap();
    // The child is a zombie now: gone, as far as anyone cares.
    assert!(matches!(identity.prove().unwrap(), Proof::Gone));
    group.remove().await.unwrap();
    group.remove().await.unwrap();
    assert!(!group.exists().unwrap());
    assert!(!group.path().parent().unwrap().exists());
    child.wait().await.unwrap();
}

/// Linux 6.18 kills whatever is born into a group that was killed once, even when nobody was in it then.
#[tokio::test]
async fn a_killed_group_is_no_trap() {
    if !is_root() {
        return;
    }
    let group = group("killed");
    group.create(&Limits::default()).unwrap();
    group.kill().unwrap();
    // Not made anew: the child goes there by the slow door.
    let child = shell("exec sleep 60").cgroup(&group).unwrap().spawn().unwrap();
    let pids: Vec<_> = group.members().unwrap().iter().map(|member| member.pid).collect();
    assert_eq!(pids, [child.pid()]);
    // Someone lives in it: it stays the same group.
    group.create(&Limits::default()).unwrap();
    assert_eq!(group.members().unwrap().len(), 1);
    group.kill().unwrap();
    child.wait().await.unwrap();
    group.empty().await.unwrap();

    group.create(&Limits::default()).unwrap();
    let started = Instant::now();
    let child = shell("exec sleep 60").cgroup(&group).unwrap().spawn().unwrap();
    eprintln!("born into a group made anew within {:?}", started.elapsed());
    assert_eq!(group.members().unwrap().len(), 1);
    group.kill().unwrap();
    child.wait().await.unwrap();
    group.remove().await.unwrap();
}

/// A child that does `script` once it is under the group's limits.
fn confined(script: &str, group: &Cgroup) -> Child {
    let (wait, go) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
    let child = shell(&format!("read go; {script}")).stdin(wait).cgroup(group).unwrap().spawn().unwrap();
    let started = Instant::now();
    group.confine().unwrap();
    let first = started.elapsed();
    group.confine().unwrap();
    eprintln!("confined within {first:?}, again within {:?}", started.elapsed() - first);
    File::from(go).write_all(b"\n").unwrap();
    child
}

#[tokio::test]
async fn limits_hold_where_the_host_has_the_controllers() {
    if !is_root() {
        return;
    }
    let hosts = Cgroups::find().unwrap();
    let missing = hosts.missing().unwrap();
    let has = |controller: &str| missing.iter().all(|missing| missing.controller != controller);
    let group = group("limits");
    let limits = Limits { memory: Some(64 << 20), pids: Some(1), cpu: Some(100) };
    for missing in &missing {
        eprintln!("SKIPPED: limit of {}: {}", missing.controller, missing.why);
        assert_eq!(group.create(&limits).unwrap_err().kind(), Kind::Unsupported);
    }
    group.create(&limits.without(&missing)).unwrap();

    // Nothing of it is swapped, in whichever version the kernel says so.
    let written =
        |dir: &Path, file: &str| std::fs::read_to_string(dir.join(file)).ok().map(|text| text.trim().to_owned());
    if let Some(swap) = written(group.path(), "memory.swap.max").filter(|_| has("memory")) {
        assert_eq!(swap, "0");
    }
    let v1 = Path::new("/sys/fs/cgroup/memory").join(group.name());
    for (file, want) in [("memory.memsw.limit_in_bytes", (64 << 20).to_string()), ("memory.swappiness", "0".to_owned())]
    {
        assert!(written(&v1, file).is_none_or(|is| is == want), "{file}");
    }

    // `sh` is the one process; its fork fails.
    let exit = confined("(:); exit 0", &group).wait().await.unwrap();
    assert_eq!(exit != Exit::Code(0), has("pids"), "{exit}");
    // The group has run out of memory, the host has not. (With swap, it would go there.)
    let swap = std::fs::read_to_string("/proc/swaps").unwrap().lines().count() > 1;
    let exit = confined("exec dd if=/dev/zero of=/dev/null bs=128M count=1", &group).wait().await.unwrap();
    assert_eq!(exit == Exit::Signal(9), has("memory") && !swap, "{exit}");
    // A tenth of a CPU, in the long run: a host that stands still for a moment may count that as used, and it is paid back.
    let started = Instant::now();
    let child = confined("while :; do :; done", &group);
    loop {
        tokio::time::sleep(Duration::from_millis(800)).await;
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", child.pid())).unwrap();
        let ticks: u32 = stat.split(' ').nth(13).unwrap().parse().unwrap();
        let passed = started.elapsed().as_millis() / 10;
        if u128::from(ticks) < passed / 10 + 22 || !has("cpu") {
            break;
        }
        assert!(started.elapsed() < Duration::from_secs(60), "{ticks} hundredths of a second of {passed}");
    }
    child.kill().unwrap();
    child.wait().await.unwrap();

    // What is left in one hierarchy only is found.
    group.empty().await.unwrap();
    std::fs::remove_dir(group.path()).unwrap();
    assert_eq!(group.exists().unwrap(), hosts.is_hybrid());
    let (parent, own) = group.name().rsplit_once('/').unwrap();
    assert_eq!(hosts.list(parent).unwrap().contains(&own.to_owned()), hosts.is_hybrid());
    group.remove().await.unwrap();
    assert!(!group.exists().unwrap());
    assert!(hosts.list(parent).unwrap().is_empty());
}

/// A disk that its owner may not make larger: writes end where the limit is, whatever the file's mode allows.
#[tokio::test]
async fn files_grow_no_further_than_they_may() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("disk");
    File::create(&file).unwrap().set_len(1 << 20).unwrap();
    let limits = Rlimits { fsize: Some(1 << 20), ..Rlimits::default() };
    let dd = |seek: u32| {
        let script =
            format!("dd if=/dev/zero of={} bs=64k count=1 seek={seek} conv=notrunc 2>/dev/null", file.display());
        shell(&script).rlimits(limits).spawn().unwrap()
    };
    assert_eq!(dd(15).wait().await.unwrap(), Exit::Code(0));
    assert_ne!(dd(16).wait().await.unwrap(), Exit::Code(0));
    assert_eq!(std::fs::metadata(&file).unwrap().len(), 1 << 20);
    let grow = shell(&format!("truncate -s 2M {}", file.display())).rlimits(limits).spawn().unwrap();
    assert_ne!(grow.wait().await.unwrap(), Exit::Code(0));
    assert_eq!(std::fs::metadata(&file).unwrap().len(), 1 << 20);
}

#[tokio::test]
async fn tools_are_bounded() {
    let run = |script: &str| Tool::new("/bin/sh").args(["-c", script]);
    assert_eq!(run("cat").input(vec![b'x'; 1 << 20]).run().await.unwrap().len(), 1 << 20);
    // It need not read what it is given.
    assert_eq!(run("echo done").input(vec![b'x'; 1 << 20]).run().await.unwrap(), b"done\n");

    let error = run("echo first >&2; echo second >&2; exit 4").run().await.unwrap_err();
    assert_eq!(error.chain(), "running sh: exit status 4: first; second");

    let started = Instant::now();
    let error = run("sleep 60").timeout(Duration::from_millis(100)).run().await.unwrap_err();
    assert_eq!(error.kind(), Kind::Timeout);
    assert!(started.elapsed() < Duration::from_secs(30));

    // As much as it likes, and of it the two ends.
    let ends = |script: &str| run(script).keep_ends(6).run();
    assert_eq!(ends("printf 1234567890").await.unwrap(), b"1234567890");
    assert_eq!(ends("printf 123456789012").await.unwrap(), b"123456789012");
    assert_eq!(ends("printf 1234567890123").await.unwrap(), "123456\n[…]\n890123".as_bytes());
    let long = ends("seq 1 1000000").await.unwrap();
    assert_eq!(long, "1\n2\n3\n\n[…]\n00000\n".as_bytes(), "{}", String::from_utf8_lossy(&long));

    let error = run("cat /dev/zero").output_limit(100_000).run().await.unwrap_err();
    assert_eq!(error.kind(), Kind::Exhausted);
    assert_eq!(Tool::new("/nonexistent").run().await.unwrap_err().kind(), Kind::NotFound);
}
