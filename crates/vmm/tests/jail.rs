//! A machine's directory, group and process, with `sleep` in the VMM's place. Needs root; says so when skipped.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

mod common;

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

use clawpot_core::ports::Console;
use clawpot_core::{Fact, VmmEnd, VmmFact, VmmKind};
use clawpot_host::cgroup::{Cgroups, Limits};
use clawpot_host::process::{Spawn, User};
use clawpot_types::Kind;
use clawpot_vmm::console::Consoles;
use clawpot_vmm::jail::{DISK, Jail, Jails, KERNEL};
use common::{Place, needs_root};

fn jails(place: &Place) -> (Jails, Consoles) {
    let consoles = Consoles::new(place.state());
    (Jails::new(place.state(), &place.instance, VmmKind::Qemu, consoles.clone()).unwrap(), consoles)
}

fn shell(script: &str) -> Spawn {
    Spawn::new("/bin/sh").args(["-c", script]).env("PATH", "/usr/bin:/bin")
}

/// By itself: a shell becomes another program after its start, under the eyes of a test.
fn sleeper() -> Spawn {
    Spawn::new("/bin/sleep").args(["60"])
}

fn exited(how: &str) -> Fact<VmmFact> {
    let how = match how {
        "exit status 1" => VmmEnd::Code(1),
        "killed by signal 9" => VmmEnd::Signal(9),
        told => VmmEnd::Unseen(told.to_owned()),
    };
    Fact::Present(VmmFact::Exited { how })
}

/// None: what a limit does is tested where one is wanted.
const LIMITS: Limits = Limits { memory: None, pids: None, cpu: None };

const RUNNING: Fact<VmmFact> = Fact::Present(VmmFact::Running { attached: true });
const ADOPTABLE: Fact<VmmFact> = Fact::Present(VmmFact::Running { attached: false });
const PREPARED: Fact<VmmFact> = Fact::Present(VmmFact::Prepared);

#[tokio::test]
async fn a_life_and_a_death() {
    if !needs_root() {
        return;
    }
    let place = Place::new();
    let machine = place.machine();
    let (jails, consoles) = jails(&place);
    let jail = jails.jail(&machine.id).unwrap();
    assert_eq!(jails.inspect(&machine.id).await, Fact::Absent);
    assert_eq!(jails.start(&machine.id, LIMITS, |_| Ok(shell("true"))).await.unwrap_err().kind(), Kind::NotFound);

    jails.prepare(&machine).await.unwrap();
    jails.prepare(&machine).await.unwrap();
    assert_eq!(jails.inspect(&machine.id).await, PREPARED);
    assert_eq!(jails.list().unwrap(), vec![machine.id.clone()]);
    let root = std::fs::metadata(jail.root()).unwrap();
    assert_eq!((root.uid(), root.mode() & 0o777), (0, 0o755));
    assert_eq!(std::fs::metadata(jail.dir()).unwrap().mode() & 0o777, 0o700);
    let (linked, original) = (jail.file(KERNEL), &machine.files.kernel);
    assert_eq!(std::fs::metadata(linked).unwrap().ino(), std::fs::metadata(original).unwrap().ino());
    assert_eq!(std::fs::metadata(jail.file(DISK)).unwrap().uid(), machine.seat.uid);

    let script = "echo hello; echo trouble >&2; exec sleep 60";
    jails.start(&machine.id, LIMITS, move |_| Ok(shell(script))).await.unwrap();
    assert_eq!(jails.inspect(&machine.id).await, RUNNING);
    // Again: nothing happens, nothing is spawned.
    jails.start(&machine.id, LIMITS, |_| panic!("spawned twice")).await.unwrap();
    assert_eq!(jails.prepare(&machine).await.unwrap_err().kind(), Kind::FailedPrecondition);
    assert_eq!(jails.destroy(&machine.id).await.unwrap_err().kind(), Kind::FailedPrecondition);
    common::until("the console", async || consoles.tail(&machine.id.vm, 9).await.unwrap().len() == 3).await;
    assert_eq!(consoles.tail(&machine.id.vm, 9).await.unwrap(), ["--- boot 1 ---", "hello", "trouble"]);

    let pending = jails.clone();
    let id = machine.id.clone();
    let waiting = tokio::spawn(async move { pending.exited(&id).await });
    jails.stop(&machine.id).unwrap();
    tokio::time::timeout(Duration::from_secs(60), waiting).await.unwrap().unwrap();
    assert_eq!(jails.inspect(&machine.id).await, exited("killed by signal 9"));
    assert_eq!(
        jails.start(&machine.id, LIMITS, |_| Ok(shell("true"))).await.unwrap_err().kind(),
        Kind::FailedPrecondition
    );
    jails.destroy(&machine.id).await.unwrap();
    jails.destroy(&machine.id).await.unwrap();
    assert_eq!(jails.inspect(&machine.id).await, Fact::Absent);
    jails.exited(&machine.id).await;
    jails.stop(&machine.id).unwrap();

    // What was printed stays until it is erased; the disk is the VM's, not the machine's.
    assert_eq!(consoles.look(&machine.id.vm).await.unwrap(), Some(()));
    consoles.erase(&machine.id.vm).await.unwrap();
    assert_eq!(consoles.look(&machine.id.vm).await.unwrap(), None);
    assert!(machine.disk.exists());
    place.nothing_left(&jails.list().unwrap());
}

#[tokio::test]
async fn a_guest_that_has_halted_ends_its_vmm() {
    if !needs_root() {
        return;
    }
    let place = Place::new();
    let machine = place.machine();
    let (jails, _consoles) = jails(&place);
    let jail = jails.jail(&machine.id).unwrap();
    jails.prepare(&machine).await.unwrap();
    // Its agent answers: whoever printed the line, the guest lives.
    let agent = clawpot_host::unix::listen(&jail.socket()).unwrap();
    let agent = tokio::spawn(async move {
        let (mut stream, _) = agent.accept().await.unwrap();
        clawpot_host::connect::accept(&mut stream).await.unwrap();
        clawpot_host::connect::confirm(&mut stream, 1).await.unwrap();
    });
    let go = place.state().join("go");
    let script = format!(
        "echo '[   12.1] reboot: System halted'; until [ -e {} ]; do sleep 0.1; done; echo a word of the VMM; exec sleep 60",
        go.display()
    );
    jails.start(&machine.id, LIMITS, move |_| Ok(shell(&script))).await.unwrap();
    let pending = jails.clone();
    let id = machine.id.clone();
    let waiting = tokio::spawn(async move { pending.exited(&id).await });
    tokio::time::timeout(Duration::from_secs(60), agent).await.unwrap().unwrap();
    assert_eq!(jails.inspect(&machine.id).await, RUNNING);

    // Nobody answers any more.
    File::create(go).unwrap();
    tokio::time::timeout(Duration::from_secs(60), waiting).await.unwrap().unwrap();
    assert_eq!(jails.inspect(&machine.id).await, exited("its guest had halted, and the server ended its VMM"));
    jails.destroy(&machine.id).await.unwrap();
    place.nothing_left(&jails.list().unwrap());
}

#[tokio::test]
async fn another_daemon_adopts() {
    if !needs_root() {
        return;
    }
    let place = Place::new();
    let machine = place.machine();
    let (first, first_consoles) = jails(&place);
    first.prepare(&machine).await.unwrap();
    let script = "echo one; while [ ! -e go ]; do sleep 0.01; done; echo two; exit 3";
    let program = move |jail: &Jail| Ok(shell(script).cwd(jail.root()));
    first.start(&machine.id, LIMITS, program).await.unwrap();
    common::until("one", async || first_consoles.tail(&machine.id.vm, 1).await.unwrap() == ["one"]).await;
    // Nothing of the first daemon is left but its zombies.
    drop((first, first_consoles));

    let (second, consoles) = jails(&place);
    assert_eq!(second.inspect(&machine.id).await, ADOPTABLE);
    second.attach(&machine.id).unwrap();
    assert_eq!(second.inspect(&machine.id).await, RUNNING);
    let mut output = consoles.read(&machine.id.vm, 1, true).await.unwrap();
    File::create(second.jail(&machine.id).unwrap().root().join("go")).unwrap();
    let mut text = String::new();
    while !text.contains("two\n") {
        let piece = futures_util::StreamExt::next(&mut output);
        let piece = tokio::time::timeout(Duration::from_secs(60), piece).await.unwrap().unwrap().unwrap();
        text.push_str(std::str::from_utf8(&piece).unwrap());
    }
    assert_eq!(text, "one\ntwo\n");
    second.exited(&machine.id).await;
    assert_eq!(second.inspect(&machine.id).await, exited("it ended while no server watched"));
    second.destroy(&machine.id).await.unwrap();
    consoles.erase(&machine.id.vm).await.unwrap();
    assert!(futures_util::StreamExt::next(&mut output).await.is_none(), "a follower outlives the log");
    place.nothing_left(&second.list().unwrap());
}

/// The daemon that started it died before it wrote down whom: the next one does when it takes it over.
#[tokio::test]
async fn a_vmm_whose_identity_was_not_written_down_is_identified() {
    if !needs_root() {
        return;
    }
    let place = Place::new();
    let machine = place.machine();
    let (first, first_consoles) = jails(&place);
    first.prepare(&machine).await.unwrap();
    let user = User { uid: machine.seat.uid, gid: machine.seat.gid };
    first.start(&machine.id, LIMITS, move |_| Ok(sleeper().user(user))).await.unwrap();
    let written = first.jail(&machine.id).unwrap().dir().join("process.json");
    let identity = std::fs::read(&written).unwrap();
    drop((first, first_consoles));
    std::fs::remove_file(&written).unwrap();
    let (second, consoles) = jails(&place);
    assert!(matches!(second.inspect(&machine.id).await, Fact::Present(VmmFact::Running { .. })));
    second.attach(&machine.id).unwrap();
    assert_eq!(std::fs::read(&written).unwrap(), identity);
    second.stop(&machine.id).unwrap();
    second.exited(&machine.id).await;
    second.destroy(&machine.id).await.unwrap();
    consoles.erase(&machine.id.vm).await.unwrap();
    place.nothing_left(&second.list().unwrap());
}

/// An administrator's doing, or a service manager's: its group is empty, and it lives.
#[tokio::test]
async fn a_vmm_moved_out_of_its_group_has_not_ended() {
    if !needs_root() {
        return;
    }
    let place = Place::new();
    let machine = place.machine();
    let (first, first_consoles) = jails(&place);
    first.prepare(&machine).await.unwrap();
    let user = User { uid: machine.seat.uid, gid: machine.seat.gid };
    first.start(&machine.id, LIMITS, move |_| Ok(sleeper().user(user))).await.unwrap();
    let jail = first.jail(&machine.id).unwrap();
    let pid = jail.cgroup().members().unwrap()[0].pid;
    // A group in between that passes controllers on may hold no process.
    let elsewhere = Cgroups::find().unwrap().root().to_owned();
    let put = |group: &Path| {
        let mut procs = File::options().write(true).open(group.join("cgroup.procs")).unwrap();
        std::io::Write::write_all(&mut procs, pid.to_string().as_bytes()).unwrap();
    };
    let unproven = |fact: Fact<VmmFact>| match fact {
        Fact::Present(VmmFact::Unproven { why }) => why.contains(&pid.to_string()),
        other => panic!("{other:?}"),
    };
    let limit = Duration::from_secs(60);
    let waiting = tokio::spawn({
        let (jails, id) = (first.clone(), machine.id.clone());
        async move { jails.exited(&id).await }
    });
    put(&elsewhere);
    // Whoever waits for its end learns that something is up.
    tokio::time::timeout(limit, waiting).await.unwrap().unwrap();
    assert!(unproven(tokio::time::timeout(limit, first.inspect(&machine.id)).await.unwrap()));
    for refused in [first.prepare(&machine).await, first.destroy(&machine.id).await] {
        assert_eq!(refused.unwrap_err().kind(), Kind::FailedPrecondition);
    }
    put(jail.cgroup().path());
    assert_eq!(first.inspect(&machine.id).await, RUNNING);
    put(&elsewhere);
    // Nor does another daemon take it for dead; nor where somebody removed the empty group.
    drop((first, first_consoles));
    let (second, consoles) = jails(&place);
    assert!(unproven(second.inspect(&machine.id).await));
    jail.cgroup().remove().await.unwrap();
    assert!(unproven(second.inspect(&machine.id).await));
    // Another user's process is not the machine's, whatever number and start it has.
    let manifest = jail.dir().join("machine.json");
    let text = std::fs::read_to_string(&manifest).unwrap();
    let others = text.replace(&machine.seat.uid.to_string(), "1");
    assert_ne!(text, others);
    clawpot_host::fs::replace(&manifest, others.as_bytes(), 0o600).unwrap();
    assert_eq!(second.inspect(&machine.id).await, exited("it ended while no server watched"));
    clawpot_host::fs::replace(&manifest, text.as_bytes(), 0o600).unwrap();
    // Only on a word: it is killed where it is.
    second.stop(&machine.id).unwrap();
    second.exited(&machine.id).await;
    // Outside of its group it is given a second to go; whoever destroys it tries again.
    common::until("its removal", async || second.destroy(&machine.id).await.is_ok()).await;
    assert_eq!(second.inspect(&machine.id).await, Fact::Absent);
    assert!(!Path::new(&format!("/proc/{pid}/exe")).exists());
    consoles.erase(&machine.id.vm).await.unwrap();
    place.nothing_left(&second.list().unwrap());
}

#[tokio::test]
async fn what_a_crash_leaves_is_found_and_removed() {
    if !needs_root() {
        return;
    }
    let place = Place::new();
    let machine = place.machine();
    let (jails, _) = jails(&place);
    let jail = jails.jail(&machine.id).unwrap();

    // In the middle of preparing.
    std::fs::create_dir_all(jail.dir()).unwrap();
    assert_eq!(jails.inspect(&machine.id).await, exited("its preparation was interrupted"));
    assert_eq!(jails.list().unwrap(), vec![machine.id.clone()]);
    jails.prepare(&machine).await.unwrap();
    assert_eq!(jails.inspect(&machine.id).await, PREPARED);

    // After the group was made, before the fork.
    jail.cgroup().create(&LIMITS).unwrap();
    assert_eq!(jails.inspect(&machine.id).await, PREPARED);

    // After the fork, before anything was written down.
    let child = sleeper().cgroup(jail.cgroup()).unwrap().spawn().unwrap();
    assert_eq!(jails.inspect(&machine.id).await, ADOPTABLE);
    jails.stop(&machine.id).unwrap();
    jails.exited(&machine.id).await;
    child.wait().await.unwrap();

    // In the middle of removing: the directory is gone, the group is not.
    std::fs::remove_dir_all(jail.dir()).unwrap();
    assert_eq!(jails.inspect(&machine.id).await, exited("its directory is gone"));
    assert_eq!(jails.list().unwrap(), vec![machine.id.clone()]);
    jails.destroy(&machine.id).await.unwrap();

    // Before a reboot of the host.
    jails.prepare(&machine).await.unwrap();
    let manifest = jail.dir().join("machine.json");
    let text = std::fs::read_to_string(&manifest).unwrap().replace(&clawpot_host::boot_id().unwrap(), "another");
    clawpot_host::fs::replace(&manifest, text.as_bytes(), 0o600).unwrap();
    assert_eq!(jails.inspect(&machine.id).await, exited("the host was rebooted"));
    jails.destroy(&machine.id).await.unwrap();
    place.nothing_left(&jails.list().unwrap());
}

#[tokio::test]
async fn a_vmm_that_cannot_start_leaves_a_prepared_machine_and_says_why() {
    if !needs_root() {
        return;
    }
    let place = Place::new();
    let machine = place.machine();
    let (jails, consoles) = jails(&place);
    jails.prepare(&machine).await.unwrap();
    let error = jails.start(&machine.id, LIMITS, |_| Ok(Spawn::new("/nonexistent/vmm"))).await.unwrap_err();
    assert!(error.chain().contains("starting /nonexistent/vmm: executing it: No such file"), "{}", error.chain());
    assert_eq!(jails.inspect(&machine.id).await, PREPARED);

    // One that ends at once: what it said is kept.
    jails.start(&machine.id, LIMITS, |_| Ok(shell("echo bad kernel >&2; exit 1"))).await.unwrap();
    jails.exited(&machine.id).await;
    assert_eq!(jails.inspect(&machine.id).await, exited("exit status 1"));
    assert_eq!(consoles.tail(&machine.id.vm, 1).await.unwrap(), ["bad kernel"]);
    jails.destroy(&machine.id).await.unwrap();
    place.nothing_left(&jails.list().unwrap());
}

/// Linux 6.18 kills whatever is born into a group that was killed once.
#[tokio::test]
async fn a_machine_killed_before_its_start_can_be_started() {
    if !needs_root() {
        return;
    }
    let place = Place::new();
    let machine = place.machine();
    let (jails, _) = jails(&place);
    jails.prepare(&machine).await.unwrap();
    // A start that made the group and failed, or a daemon that died between fork and writing it down; then a stop.
    for spawned in [false, true] {
        if spawned {
            let group = jails.jail(&machine.id).unwrap().cgroup().clone();
            sleeper().cgroup(&group).unwrap().spawn().unwrap();
        } else {
            jails.start(&machine.id, LIMITS, |_| Ok(Spawn::new("/nonexistent/vmm"))).await.unwrap_err();
        }
        jails.stop(&machine.id).unwrap();
        jails.exited(&machine.id).await;
        assert_eq!(jails.inspect(&machine.id).await, PREPARED);
    }
    jails.start(&machine.id, LIMITS, |_| Ok(sleeper())).await.unwrap();
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(jails.inspect(&machine.id).await, RUNNING);
    jails.stop(&machine.id).unwrap();
    jails.exited(&machine.id).await;
    jails.destroy(&machine.id).await.unwrap();
    place.nothing_left(&jails.list().unwrap());
}

/// By the kernel's word, in whichever hierarchy it keeps the controller.
fn limited(jail: &Jail, controller: &str, v1: &str, v2: &str) -> String {
    let groups = Cgroups::find().unwrap();
    let mounted = Path::new("/sys/fs/cgroup").join(controller).join(jail.cgroup().name());
    let file = if mounted.exists() { mounted.join(v1) } else { groups.root().join(jail.cgroup().name()).join(v2) };
    std::fs::read_to_string(file).unwrap().trim().to_owned()
}

#[tokio::test]
async fn limits_hold_from_soon_after_the_start_and_for_an_adopted_machine() {
    if !needs_root() {
        return;
    }
    let groups = Cgroups::find().unwrap();
    if let Some(missing) = groups.missing().unwrap().first() {
        eprintln!("SKIPPED: {}: {}", missing.controller, missing.why);
        return;
    }
    let place = Place::new();
    let machine = place.machine();
    let (first, _) = jails(&place);
    first.prepare(&machine).await.unwrap();
    let limits = Limits { memory: Some(256 << 20), pids: Some(3), cpu: Some(1500) };
    // One more process for each line that it is told.
    let script = "echo up; while read line; do sleep 60 & done <feed; exec sleep 60";
    rustix::fs::mknodat(
        rustix::fs::CWD,
        first.jail(&machine.id).unwrap().file("feed"),
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::from_raw_mode(0o600),
        0,
    )
    .unwrap();
    let started = Instant::now();
    let program = move |jail: &Jail| Ok(shell(script).cwd(jail.root()));
    first.start(&machine.id, limits, program).await.unwrap();
    eprintln!("started within {:?}", started.elapsed());
    let jail = first.jail(&machine.id).unwrap();
    assert_eq!(limited(&jail, "memory", "memory.limit_in_bytes", "memory.max"), (256 << 20).to_string());
    assert_eq!(limited(&jail, "pids", "pids.max", "pids.max"), "3");
    assert!(limited(&jail, "cpu", "cpu.cfs_quota_us", "cpu.max").starts_with("150000"));
    common::until("the limits", async || limited(&jail, "pids", "pids.current", "pids.current") == "1").await;
    eprintln!("confined within {:?}", started.elapsed());

    // Another daemon finds one that was not moved in time: a process of the group that is in no other.
    let stray = sleeper().cgroup(jail.cgroup()).unwrap().spawn().unwrap();
    drop(first);
    let (second, _) = jails(&place);
    second.attach(&machine.id).unwrap();
    common::until("the limits", async || limited(&jail, "pids", "pids.current", "pids.current") == "2").await;
    // Two are there, one more comes, and no fourth.
    let mut feed = File::options().write(true).open(jail.file("feed")).unwrap();
    std::io::Write::write_all(&mut feed, b"1\n2\n3\n4\n").unwrap();
    drop(feed);
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(jail.cgroup().members().unwrap().len() <= 3);

    second.stop(&machine.id).unwrap();
    second.exited(&machine.id).await;
    stray.wait().await.unwrap();
    // What is left in one hierarchy is found, and goes.
    std::fs::remove_dir(jail.cgroup().path()).unwrap();
    std::fs::remove_dir_all(jail.dir()).unwrap();
    if groups.is_hybrid() {
        assert_eq!(second.list().unwrap(), vec![machine.id.clone()]);
        assert_eq!(second.inspect(&machine.id).await, exited("its directory is gone"));
    }
    second.destroy(&machine.id).await.unwrap();
    assert_eq!(second.inspect(&machine.id).await, Fact::Absent);
    place.nothing_left(&second.list().unwrap());
}

#[tokio::test]
async fn two_instances_see_only_their_own() {
    if !needs_root() {
        return;
    }
    let (one, two) = (Place::new(), Place::new());
    let machine = one.machine();
    let (ours, _) = jails(&one);
    let (theirs, _) = jails(&two);
    ours.prepare(&machine).await.unwrap();
    ours.start(&machine.id, LIMITS, |_| Ok(sleeper())).await.unwrap();
    assert_eq!(theirs.inspect(&machine.id).await, Fact::Absent);
    theirs.stop(&machine.id).unwrap();
    theirs.destroy(&machine.id).await.unwrap();
    assert_eq!(ours.inspect(&machine.id).await, RUNNING);
    ours.stop(&machine.id).unwrap();
    ours.exited(&machine.id).await;
    ours.destroy(&machine.id).await.unwrap();
    one.nothing_left(&ours.list().unwrap());
    two.nothing_left(&theirs.list().unwrap());
}

/// A guest that prints all day fills two files, and a server that is away delays nobody.
#[tokio::test]
async fn output_is_bounded_and_never_blocks_the_vmm() {
    if !needs_root() {
        return;
    }
    let place = Place::new();
    let machine = place.machine();
    let (jails, consoles) = jails(&place);
    jails.prepare(&machine).await.unwrap();
    // 8 MiB, some of it dropped; `head` minds a full pipe no more than a VMM does.
    let script = "yes | head -c 8388608 2>/dev/null; exit 5";
    jails.start(&machine.id, LIMITS, move |_| Ok(shell(script))).await.unwrap();
    let started = Instant::now();
    tokio::time::timeout(Duration::from_secs(30), jails.exited(&machine.id)).await.unwrap();
    eprintln!("8 MiB printed within {:?}", started.elapsed());
    jails.destroy(&machine.id).await.unwrap();
    let logs = place.state().join("logs").join(machine.id.vm.as_str());
    let kept: u64 = std::fs::read_dir(logs).unwrap().map(|entry| entry.unwrap().metadata().unwrap().len()).sum();
    assert!(kept <= 2 << 20, "{kept} bytes");
    assert_eq!(consoles.tail(&machine.id.vm, 2).await.unwrap().len(), 2);
    assert!(!Cgroups::find().unwrap().group(&format!("clawpot/{}", place.instance)).unwrap().exists().unwrap());
}
