//! What a machine may use of its host, and how that comes to hold.
//!
//! The limits bound a VMM that its guest has taken over; they must never end a healthy one. So they are what the guest was
//! given and a generous allowance for the VMM itself, far above what was measured.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use clawpot_core::MachineId;
use clawpot_core::admission::Footprint;
use clawpot_core::ports::Machine;
use clawpot_host::cgroup::{Cgroup, Limits};
use clawpot_types::{MiB, Result, Vcpus};
use tokio::time::Instant;

/// What a VMM needs beside its guest's memory and CPUs.
#[derive(Clone, Copy, Debug)]
pub struct Overhead {
    /// What it takes as a rule.
    pub footprint: Footprint,
    /// As much again and more, until it is taken for captured.
    pub memory: MiB,
    pub memory_per_vcpu: MiB,
    /// Beside one for each virtual CPU.
    pub threads: u32,
}

/// Of the guest's memory: page tables take a 512th of it; an emulator's own caches of translations grow with it too.
const MEMORY_SHARE: u64 = 16;
/// For the VMM's own threads, thousandths of a CPU.
const CPU: u32 = 1000;

impl Overhead {
    #[must_use]
    pub fn limits(&self, memory: MiB, vcpus: Vcpus) -> Limits {
        let MiB(guest) = memory;
        let spare = self.memory.0 + self.memory_per_vcpu.0 * u64::from(vcpus.get()) + guest / MEMORY_SHARE;
        let own = self.footprint.of(vcpus).0 + spare;
        Limits {
            memory: Some((guest + own) << 20),
            pids: Some(self.threads + u32::from(vcpus.get())),
            cpu: Some(CPU + 1000 * u32::from(vcpus.get())),
        }
    }

    #[must_use]
    pub fn of(&self, machine: &Machine) -> Limits {
        self.limits(machine.memory, machine.vcpus)
    }
}

/// From the start of a machine to the move into its version-1 groups. The kernel waits 8–17 ms in such a move and holds its
/// lock on all groups meanwhile: before the start it would add that to each create, and right behind it it still added up
/// to 13 ms to a Firecracker's 21 ms until its guest runs. This much later the start is over, and the guest's kernel is in
/// its first tenth of a second. On a host that has version 2 alone limits hold from birth.
const LATER: Duration = Duration::from_millis(50);
/// A move that failed is tried again, after [`LATER`] and then after twice as long each time: 6 s in all. Beyond that the
/// machine is ended: a guest that nothing limits could take the whole host's memory.
const TRIES: u32 = 7;

/// What is limited: a machine's group.
pub(super) trait Confined: Clone + Send + 'static {
    fn confine(&self) -> Result<()>;
    fn kill(&self) -> Result<()>;
}

impl Confined for Cgroup {
    fn confine(&self) -> Result<()> {
        Cgroup::confine(self)
    }

    fn kill(&self) -> Result<()> {
        Cgroup::kill(self)
    }
}

/// Moves processes into the version-1 groups that limit them, one machine after the other: more at a time would only wait
/// for one another.
#[derive(Clone, Debug)]
pub(super) struct Confiner<G> {
    todo: Arc<Mutex<Todo<G>>>,
}

#[derive(Debug)]
struct Todo<G> {
    machines: BTreeMap<MachineId, Task<G>>,
    at_work: bool,
    /// Machines that could not be limited and were ended for it, and why.
    given_up: BTreeMap<MachineId, String>,
}

#[derive(Clone, Debug)]
struct Task<G> {
    group: G,
    due: Instant,
    tries: u32,
}

impl<G> Default for Confiner<G> {
    fn default() -> Self {
        let todo = Todo { machines: BTreeMap::new(), at_work: false, given_up: BTreeMap::new() };
        Self { todo: Arc::new(Mutex::new(todo)) }
    }
}

impl<G: Confined> Confiner<G> {
    /// Soon. To be called inside a runtime.
    pub(super) fn confine(&self, id: &MachineId, group: G) {
        let mut todo = self.todo();
        todo.machines.insert(id.clone(), Task { group, due: Instant::now() + LATER, tries: 0 });
        if !std::mem::replace(&mut todo.at_work, true) {
            drop(tokio::spawn(self.clone().work()));
        }
    }

    /// Why the machine was ended, if it was because it could not be limited.
    pub(super) fn gave_up(&self, id: &MachineId) -> Option<String> {
        self.todo().given_up.get(id).cloned()
    }

    /// The machine is gone.
    pub(super) fn forget(&self, id: &MachineId) {
        let mut todo = self.todo();
        todo.machines.remove(id);
        todo.given_up.remove(id);
    }

    async fn work(self) {
        while let Some((id, task)) = self.next() {
            // One that comes meanwhile may be due before this one.
            let soon = Instant::now() + LATER;
            tokio::time::sleep_until(task.due.min(soon)).await;
            if task.due > soon {
                continue;
            }
            let (this, of) = (self.clone(), id.clone());
            let done = tokio::task::spawn_blocking(move || this.attempt(&of, &task)).await;
            if let Err(error) = done {
                tracing::error!(machine = %id, %error, "limiting a machine");
                self.again(&id, TRIES);
            }
        }
    }

    /// Whose turn is first. It stays in the list until it is done, so that who forgets it meanwhile is heard.
    fn next(&self) -> Option<(MachineId, Task<G>)> {
        let mut todo = self.todo();
        let next = todo.machines.iter().min_by_key(|(_, task)| task.due);
        let next = next.map(|(id, task)| (id.clone(), task.clone()));
        todo.at_work = next.is_some();
        next
    }

    fn attempt(&self, id: &MachineId, task: &Task<G>) {
        if !self.todo().machines.contains_key(id) {
            return;
        }
        let tries = task.tries + 1;
        let Err(error) = task.group.confine() else {
            self.done(id);
            return;
        };
        let error = error.chain();
        if tries < TRIES {
            tracing::warn!(machine = %id, error, tries, "a machine is not limited yet");
            self.again(id, tries);
            return;
        }
        tracing::error!(machine = %id, error, "a machine cannot be limited and is ended");
        // Before the kill: who sees its end asks for the reason.
        self.todo().given_up.insert(id.clone(), format!("ended, since its limits could not be set: {error}"));
        match task.group.kill() {
            Ok(()) => self.done(id),
            Err(error) => {
                tracing::error!(machine = %id, error = error.chain(), "ending a machine that is not limited");
                self.again(id, TRIES);
            }
        }
    }

    fn again(&self, id: &MachineId, tries: u32) {
        if let Some(task) = self.todo().machines.get_mut(id) {
            task.tries = tries.min(TRIES - 1);
            task.due = Instant::now() + LATER * 2u32.saturating_pow(tries);
        }
    }

    fn done(&self, id: &MachineId) {
        self.todo().machines.remove(id);
    }

    fn todo(&self) -> MutexGuard<'_, Todo<G>> {
        // Nothing that holds it can panic half-way.
        self.todo.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use clawpot_types::{Error, Incarnation, Kind};

    use super::*;

    #[test]
    fn limits_are_the_guests_and_an_allowance() {
        let footprint = Footprint { memory: MiB(200), memory_per_vcpu: MiB(16) };
        let overhead = Overhead { footprint, memory: MiB(312), memory_per_vcpu: MiB(48), threads: 128 };
        let limits = |memory, vcpus: u8| overhead.limits(MiB(memory), Vcpus::try_from(u32::from(vcpus)).unwrap());
        let small = Limits { memory: Some((256 + 512 + 64 + 16) << 20), pids: Some(129), cpu: Some(2000) };
        assert_eq!(limits(256, 1), small);
        // More than 32 bits of bytes.
        let large = Limits { memory: Some((65536 + 512 + 32 * 64 + 4096) << 20), pids: Some(160), cpu: Some(33_000) };
        assert_eq!(limits(65536, 32), large);
    }

    /// A group that cannot be limited so and so many times.
    #[derive(Clone, Debug, Default)]
    struct Fake(Arc<Mutex<Seen>>);

    #[derive(Debug, Default)]
    struct Seen {
        failures: usize,
        unkillable: usize,
        tried: Vec<Instant>,
        killed: Vec<Instant>,
    }

    impl Fake {
        fn failing(failures: usize) -> Self {
            Self(Arc::new(Mutex::new(Seen { failures, ..Seen::default() })))
        }

        fn seen(&self) -> MutexGuard<'_, Seen> {
            self.0.lock().unwrap()
        }
    }

    impl Confined for Fake {
        fn confine(&self) -> Result<()> {
            let mut seen = self.seen();
            seen.tried.push(Instant::now());
            let fails = seen.tried.len() <= seen.failures;
            if fails { Err(Error::new(Kind::Unavailable, "cgroup.procs: no")) } else { Ok(()) }
        }

        fn kill(&self) -> Result<()> {
            let mut seen = self.seen();
            seen.killed.push(Instant::now());
            let fails = seen.killed.len() <= seen.unkillable;
            if fails { Err(Error::new(Kind::Unavailable, "cgroup.kill: no")) } else { Ok(()) }
        }
    }

    fn machine(n: u8) -> MachineId {
        MachineId { vm: clawpot_types::VmId::from_random([n; clawpot_types::VmId::LEN]), incarnation: Incarnation(1) }
    }

    async fn settled(confiner: &Confiner<Fake>) {
        while confiner.todo().at_work {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_fails_is_tried_again_later_and_later() {
        let (confiner, group) = (Confiner::default(), Fake::failing(3));
        let start = Instant::now();
        confiner.confine(&machine(1), group.clone());
        settled(&confiner).await;
        let seen = group.seen();
        let after: Vec<u128> = seen.tried.iter().map(|at| at.duration_since(start).as_millis()).collect();
        // The clock counts in whole milliseconds and goes on while a thread works.
        let wanted = [50, 150, 350, 750];
        assert!(
            after.len() == 4 && after.iter().zip(wanted).all(|(at, wanted)| (wanted..wanted + 50).contains(at)),
            "{after:?}"
        );
        assert!(seen.killed.is_empty() && confiner.gave_up(&machine(1)).is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn what_cannot_be_limited_is_ended_with_the_reason() {
        let (confiner, group) = (Confiner::default(), Fake::failing(usize::MAX));
        group.seen().unkillable = 1;
        confiner.confine(&machine(1), group.clone());
        settled(&confiner).await;
        assert_eq!(group.seen().killed.len(), 2, "until it is dead");
        let why = confiner.gave_up(&machine(1)).unwrap();
        assert_eq!(why, "ended, since its limits could not be set: cgroup.procs: no");
        confiner.forget(&machine(1));
        assert!(confiner.gave_up(&machine(1)).is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn each_has_its_own_delay_and_one_that_fails_keeps_no_other_waiting() {
        let (confiner, bad, good) = (Confiner::default(), Fake::failing(usize::MAX), Fake::default());
        confiner.confine(&machine(1), bad.clone());
        tokio::time::sleep(Duration::from_millis(500)).await;
        let start = Instant::now();
        confiner.confine(&machine(2), good.clone());
        settled(&confiner).await;
        let waited = good.seen().tried[0].duration_since(start);
        assert!((LATER..LATER * 2).contains(&waited), "{waited:?}");
        assert_eq!((bad.seen().killed.len(), good.seen().killed.len()), (1, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_gone_is_not_ended() {
        let (confiner, group) = (Confiner::default(), Fake::failing(usize::MAX));
        confiner.confine(&machine(1), group.clone());
        tokio::time::sleep(Duration::from_secs(1)).await;
        confiner.forget(&machine(1));
        settled(&confiner).await;
        assert!(group.seen().killed.is_empty() && confiner.gave_up(&machine(1)).is_none());
    }
}
