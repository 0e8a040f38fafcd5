//! `run`: a VM for one command.

use clawpot_common::v1::Phase;
use rustix::process::Signal;

use crate::fake::Fake;
use crate::{ended, eventually, kill};

#[test]
fn the_vm_stays_and_is_named_on_stderr() {
    let fake = Fake::start();
    let ran = fake.run(&["run", "debian", "--", "echo", "hello"]);
    assert_eq!((ran.code, ran.out.as_str()), (Some(0), "hello\n"));
    assert_eq!(ran.err, "clawpot: VM brave-otter stays; `clawpot rm brave-otter` deletes it\n");
    assert_eq!(fake.state.find("brave-otter").unwrap().phase(), Phase::Running);
}

#[test]
fn with_rm_it_goes_whatever_the_outcome() {
    let fake = Fake::start();
    for (command, code) in [(&["echo", "x"][..], 0), (&["exit", "9"], 9), (&["nosuch"], 127)] {
        let ran = fake.run(&[&["run", "--rm", "debian", "--"][..], command].concat());
        assert_eq!(ran.code, Some(code));
        assert!(!ran.err.contains("stays"));
        assert!(fake.state.vms.lock().unwrap().is_empty());
    }
    assert!(fake.state.creates.lock().unwrap().iter().all(|create| create.remove_when_done));
    assert_eq!(fake.run(&["run", "--rm", "broken", "--", "true"]).code, Some(125));
    assert!(fake.state.vms.lock().unwrap().is_empty());
}

#[test]
fn options_reach_the_vm() {
    let fake = Fake::start();
    let ran = fake.run(&[
        "run",
        "--name",
        "web",
        "-l",
        "team=red",
        "--cpus",
        "4",
        "--memory",
        "2G",
        "--disk=20G",
        "-e",
        "A=1",
        "-w",
        "/srv",
        "-u",
        "bob",
        "debian",
        "show",
    ]);
    assert_eq!(ran.code, Some(0));
    let create = fake.state.creates.lock().unwrap()[0].clone();
    let spec = create.spec.unwrap();
    assert_eq!((create.name.as_str(), create.labels["team"].as_str()), ("web", "red"));
    assert_eq!((spec.vcpus, spec.memory_mib, spec.disk_mib), (4, 2_048, 20_480));
    assert_eq!((spec.cwd.as_str(), spec.user.as_str(), spec.env.len()), ("/srv", "bob", 1));
    assert_eq!(create.request_id.len(), 16);
}

#[test]
fn a_lost_answer_creates_no_second_vm() {
    let fake = Fake::start();
    *fake.state.lose_create.lock().unwrap() = true;
    assert_eq!(fake.run(&["run", "debian", "--", "echo", "x"]).out, "x\n");
    let creates = fake.state.creates.lock().unwrap();
    assert_eq!(creates.len(), 2);
    assert_eq!(creates[0].request_id, creates[1].request_id);
}

#[test]
fn a_failed_boot_is_told_and_the_vm_kept_for_inspection() {
    let fake = Fake::start();
    let ran = fake.run(&["run", "broken", "--", "true"]);
    assert_eq!(ran.code, Some(125));
    assert!(ran.err.contains("No working init found") && ran.err.contains("stays"), "{}", ran.err);
    assert_eq!(fake.state.find("brave-otter").unwrap().phase(), Phase::Failed);
}

/// The VM boots, and the program has learnt of it and waits for it.
fn until_it_waits(fake: &Fake) {
    let booting = || fake.state.find("brave-otter").is_ok_and(|vm| vm.phase() == Phase::Booting);
    eventually("it boots", booting);
    eventually("it is waited for", || fake.state.is_watched());
}

#[test]
fn an_interrupt_during_the_boot_removes_what_was_to_be_removed() {
    for (signal, code) in [(Signal::INT, 130), (Signal::TERM, 143)] {
        let fake = Fake::start();
        let child = fake.clawpot(&["run", "--rm", "slow", "--", "true"]).spawn().unwrap();
        until_it_waits(&fake);
        kill(&child, signal);
        assert_eq!(ended(child).code, Some(code));
        assert!(fake.state.vms.lock().unwrap().is_empty());
    }
}

#[test]
fn an_interrupt_before_the_answer_says_what_is_not_known() {
    let unknown = "clawpot: whether the VM was made is not known; `clawpot ls` tells\n";
    let deleted = "clawpot: if the VM was made, the server deletes it\n";
    for (args, told) in [
        (["run", "never", "true"].as_slice(), unknown),
        (&["run", "--rm", "never", "true"], deleted),
        (&["create", "never"], unknown),
    ] {
        let fake = Fake::start();
        let child = fake.clawpot(args).spawn().unwrap();
        eventually("it asks for a VM", || !fake.state.creates.lock().unwrap().is_empty());
        kill(&child, Signal::INT);
        let ran = ended(child);
        assert_eq!((ran.code, ran.err.as_str()), (Some(130), told), "{args:?}");
    }
}

#[test]
fn an_interrupt_of_create_tells_what_was_made() {
    let fake = Fake::start();
    let child = fake.clawpot(&["create", "--wait", "slow"]).spawn().unwrap();
    until_it_waits(&fake);
    kill(&child, Signal::INT);
    let ran = ended(child);
    assert_eq!((ran.code, ran.out.as_str()), (Some(130), ""));
    assert_eq!(ran.err, "clawpot: VM brave-otter boots on; `clawpot rm brave-otter` deletes it\n");
    assert_eq!(fake.state.find("brave-otter").unwrap().phase(), Phase::Booting);
}

#[test]
fn a_server_restart_during_the_boot_is_survived() {
    let mut fake = Fake::start();
    let child = fake.clawpot(&["run", "slow", "--", "echo", "x"]).spawn().unwrap();
    eventually("it boots", || fake.state.find("brave-otter").is_ok_and(|vm| vm.phase() == Phase::Booting));
    fake.kill();
    fake.revive();
    fake.state.set_phase("brave0otter00000", Phase::Running);
    let ran = ended(child);
    assert_eq!((ran.code, ran.out.as_str()), (Some(0), "x\n"));
}
