//! A VMM that its guest has taken over: it eats memory, forks, spins, under the limits of its machine's group. On hosts with
//! version-2 cgroups and on those whose controllers are still in version 1. Needs root; says so when skipped.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

mod common;

use std::fs::File;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use clawpot_core::ports::Machine;
use clawpot_core::{Fact, VmmEnd, VmmFact, VmmKind};
use clawpot_host::cgroup::{Cgroups, Limits};
use clawpot_host::process::{Spawn, User};
use clawpot_vmm::console::Consoles;
use clawpot_vmm::jail::{Jail, Jails};
use common::{Place, needs_root};

struct Wild {
    place: Place,
    machine: Machine,
    jails: Jails,
    jail: Jail,
}

impl Wild {
    /// Does `script` as a slot's user once it is under `limits`. `None`, having said why, where the host has no `controller`.
    async fn start(controller: &str, limits: Limits, script: &str) -> Option<Self> {
        if !needs_root() {
            return None;
        }
        let hosts = Cgroups::find().unwrap();
        if let Some(missing) = hosts.missing().unwrap().iter().find(|missing| missing.controller == controller) {
            eprintln!("SKIPPED: no limit of {controller}: {}", missing.why);
            return None;
        }
        let place = Place::new();
        let machine = place.machine();
        let consoles = Consoles::new(place.state());
        let jails = Jails::new(place.state(), &place.instance, VmmKind::Qemu, consoles).unwrap();
        let jail = jails.jail(&machine.id).unwrap();
        jails.prepare(&machine).await.unwrap();
        let script = format!("while [ ! -e go ]; do sleep 0.02; done; {script}");
        let user = User { uid: machine.seat.uid, gid: machine.seat.gid };
        let spawn = move |jail: &Jail| {
            let shell = Spawn::new("/bin/sh").args(["-c", script.as_str()]).env("PATH", "/usr/bin:/bin");
            Ok(shell.user(user).cwd(jail.root()))
        };
        jails.start(&machine.id, limits, spawn).await.unwrap();
        let wild = Self { place, machine, jails, jail };
        common::until("its limits", async || wild.is_limited_by(controller)).await;
        File::create(wild.jail.root().join("go")).unwrap();
        Some(wild)
    }

    /// From birth in version 2, from some 60 ms later on in version 1.
    fn is_limited_by(&self, controller: &str) -> bool {
        let Some(pid) = self.jail.cgroup().members().unwrap().first().map(|member| member.pid) else { return false };
        let text = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
        let v1 = text.lines().find(|line| line.split(':').nth(1).unwrap().split(',').any(|name| name == controller));
        v1.is_none_or(|line| line.ends_with(self.jail.cgroup().name()))
    }

    /// What the group's file of either version says.
    fn says(&self, v2: &str, v1: &str, controller: &str) -> String {
        let mounts = std::fs::read_dir("/sys/fs/cgroup").unwrap().map(|entry| entry.unwrap());
        let of_controller = |name: &str| name.split(',').any(|part| part == controller);
        let v1_mount =
            mounts.filter(|entry| of_controller(entry.file_name().to_str().unwrap())).map(|entry| entry.path());
        let places = v1_mount.map(|mount| mount.join(self.jail.cgroup().name()).join(v1));
        // Version 2 has some files of a controller that it does not have.
        let places: Vec<PathBuf> = places.chain([self.jail.cgroup().path().join(v2)]).collect();
        let found = places.iter().find_map(|place| std::fs::read_to_string(place).ok());
        found.unwrap_or_else(|| panic!("none of {places:?}"))
    }

    async fn end(self) {
        let id = &self.machine.id;
        self.jails.stop(id).unwrap();
        tokio::time::timeout(Duration::from_secs(20), self.jails.exited(id)).await.unwrap();
        self.jails.destroy(id).await.unwrap();
        self.place.nothing_left(&self.jails.list().unwrap());
    }
}

fn number(text: &str) -> u64 {
    text.trim().parse().unwrap_or_else(|_| panic!("{text:?} is no number"))
}

/// The number behind `key` in a file of "key number" lines.
fn entry(text: &str, key: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' '));
    number(line.unwrap_or_else(|| panic!("no {key} in {text:?}")))
}

const MEMORY: u64 = 64 << 20;

#[tokio::test]
async fn one_that_eats_memory_is_killed_at_its_limit() {
    let limits = Limits { memory: Some(MEMORY), pids: None, cpu: None };
    let Some(wild) = Wild::start("memory", limits, "exec tail /dev/zero").await else { return };
    tokio::time::timeout(Duration::from_secs(60), wild.jails.exited(&wild.machine.id)).await.unwrap();
    let how = Fact::Present(VmmFact::Exited { how: VmmEnd::Signal(9) });
    assert_eq!(wild.jails.inspect(&wild.machine.id).await, how);
    let killed = wild.says("memory.events", "memory.oom_control", "memory");
    assert!(entry(&killed, "oom_kill") > 0, "nobody was killed for memory: {killed}");
    let peak = number(&wild.says("memory.peak", "memory.max_usage_in_bytes", "memory"));
    assert!(peak <= MEMORY && peak > MEMORY / 2, "{peak} bytes at most");
    wild.end().await;
}

#[tokio::test]
async fn one_that_forks_runs_out_of_processes() {
    const PIDS: u32 = 24;
    let limits = Limits { memory: None, pids: Some(PIDS), cpu: None };
    let bomb = "bomb() { while :; do sleep 30 & done; }; bomb & bomb & bomb & sleep 30";
    let Some(wild) = Wild::start("pids", limits, bomb).await else { return };
    let refused = || entry(&wild.says("pids.events", "pids.events", "pids"), "max");
    common::until("a fork that is refused", async || refused() > 0).await;
    let now = wild.jail.cgroup().members().unwrap().len();
    assert!(now <= usize::try_from(PIDS).unwrap(), "{now} processes");
    // Killing the group ends all of them at once.
    wild.end().await;
}

#[tokio::test]
async fn one_that_spins_gets_its_share_and_no_more() {
    let limits = Limits { memory: None, pids: None, cpu: Some(100) };
    let Some(wild) = Wild::start("cpu", limits, "while :; do :; done & while :; do :; done").await else { return };
    let used = || {
        let members = wild.jail.cgroup().members().unwrap();
        let stats =
            members.iter().filter_map(|member| std::fs::read_to_string(format!("/proc/{}/stat", member.pid)).ok());
        stats.map(|stat| number(stat.rsplit(") ").next().unwrap().split(' ').nth(11).unwrap())).sum::<u64>()
    };
    // A busy host may give it less for a while than its limit would.
    let throttled = || entry(&wild.says("cpu.stat", "cpu.stat", "cpu"), "nr_throttled");
    common::until("a limit that is felt", async || throttled() > 0).await;
    let (started, before) = (Instant::now(), used());
    // 20 hundredths of a second are its due in 2 s; without a limit it takes what the host can spare, up to 400.
    // In the long run: a host that stands still for a moment may count that as used, and it is paid back.
    loop {
        tokio::time::sleep(Duration::from_secs(2)).await;
        let ticks = used() - before;
        let passed = u64::try_from(started.elapsed().as_millis()).unwrap() / 10;
        if ticks <= passed / 10 + 20 {
            break;
        }
        assert!(started.elapsed() < Duration::from_secs(60), "{ticks} hundredths of a second in {passed}");
    }
    wild.end().await;
}
