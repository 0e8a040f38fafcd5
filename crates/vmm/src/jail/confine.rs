//! What a machine may use of its host, and how that comes to hold.
//!
//! The limits bound a VMM that its guest has taken over; they must never end a healthy one. So they are what the guest was
//! given and a generous allowance for the VMM itself, far above what was measured.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use clawpot_core::MachineId;
use clawpot_core::ports::Machine;
use clawpot_host::cgroup::{Cgroup, Limits};
use clawpot_types::{MiB, Vcpus};

/// What a VMM needs beside its guest's memory and CPUs.
#[derive(Clone, Copy, Debug)]
pub struct Overhead {
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
        let own = self.memory.0 + self.memory_per_vcpu.0 * u64::from(vcpus.get()) + guest / MEMORY_SHARE;
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

/// Moves processes into the version-1 groups that limit them, one machine after the other on one thread: more of them would
/// only wait for one another.
#[derive(Clone, Debug, Default)]
pub(super) struct Confiner {
    todo: Arc<Mutex<Todo>>,
}

#[derive(Debug, Default)]
struct Todo {
    machines: BTreeMap<MachineId, Cgroup>,
    at_work: bool,
}

impl Confiner {
    /// Soon. To be called inside a runtime.
    pub(super) fn confine(&self, id: &MachineId, group: Cgroup) {
        let mut todo = self.todo();
        todo.machines.insert(id.clone(), group);
        if !std::mem::replace(&mut todo.at_work, true) {
            let this = self.clone();
            drop(tokio::spawn(async move {
                tokio::time::sleep(LATER).await;
                drop(tokio::task::spawn_blocking(move || this.work()));
            }));
        }
    }

    fn work(&self) {
        while let Some((id, group)) = self.next() {
            if let Err(error) = group.confine() {
                tracing::warn!(machine = %id, error = error.chain(), "a machine is not limited");
            }
        }
    }

    fn next(&self) -> Option<(MachineId, Cgroup)> {
        let mut todo = self.todo();
        let next = todo.machines.pop_first();
        todo.at_work = next.is_some();
        next
    }

    fn todo(&self) -> MutexGuard<'_, Todo> {
        // Nothing that holds it can panic half-way.
        self.todo.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_the_guests_and_an_allowance() {
        let overhead = Overhead { memory: MiB(512), memory_per_vcpu: MiB(64), threads: 128 };
        let limits = |memory, vcpus: u8| overhead.limits(MiB(memory), Vcpus::try_from(u32::from(vcpus)).unwrap());
        let small = Limits { memory: Some((256 + 512 + 64 + 16) << 20), pids: Some(129), cpu: Some(2000) };
        assert_eq!(limits(256, 1), small);
        // More than 32 bits of bytes.
        let large = Limits { memory: Some((65536 + 512 + 32 * 64 + 4096) << 20), pids: Some(160), cpu: Some(33_000) };
        assert_eq!(limits(65536, 32), large);
    }
}
