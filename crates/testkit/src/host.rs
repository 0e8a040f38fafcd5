//! One shared inventory of what exists on a host that is not there. The fakes of the ports change it; the test asks it
//! what is left behind.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use clawpot_core::admission::{Footprint, Room};
use clawpot_core::{MachineId, VmmEnd};
use clawpot_types::{Digest, ExecId, MiB, Slot, VmId, VolumeId};
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::faults::Faults;
use crate::volumes::FakeFile;

/// What a VMM does after it was started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Boot {
    /// The guest answers after this long.
    ReadyAfter(Duration),
    /// The VMM lives and the guest never answers.
    Silent,
    /// The VMM ends by itself after this long, saying how.
    Exits(Duration, VmmEnd),
}

/// What a guest does when it is asked to shut down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shutdown {
    After(Duration),
    /// It says yes and stays.
    Ignored,
}

#[derive(Debug)]
pub struct FakeHost {
    pub faults: Arc<Faults>,
    inventory: Mutex<Inventory>,
    /// At every change that somebody may wait for. No `watch`: that wakes its waiters in an order of its own choice.
    changed: Notify,
}

#[derive(Debug)]
pub(crate) struct Inventory {
    pub(crate) boot_id: String,
    pub(crate) room: Room,
    /// Of each VMM.
    pub(crate) footprint: Footprint,
    pub(crate) boot: Boot,
    pub(crate) shutdown: Shutdown,
    pub(crate) slot_count: u32,
    /// By name; whether its files were verified since the host's start.
    pub(crate) images: BTreeMap<String, (Digest, bool)>,
    pub(crate) disks: BTreeMap<VmId, Disk>,
    pub(crate) volumes: BTreeMap<VolumeId, FakeFile>,
    /// Slots with a netns, tap and rules.
    pub(crate) slots: BTreeSet<Slot>,
    pub(crate) machines: BTreeMap<MachineId, FakeMachine>,
    pub(crate) consoles: BTreeMap<VmId, Vec<String>>,
    /// Their owner said that they go, whoever they are.
    pub(crate) given_up: BTreeSet<VmId>,
    pub(crate) violations: Vec<String>,
    pub(crate) disks_made: u64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Disk {
    pub(crate) size: MiB,
    /// Tells one disk from another at the same place.
    pub(crate) serial: u64,
}

/// Jail and cgroup, and the process in them.
#[derive(Debug)]
pub(crate) struct FakeMachine {
    pub(crate) slot: Slot,
    /// Its extra disks' files, and whether each is only read.
    pub(crate) disks: Vec<(PathBuf, bool)>,
    pub(crate) process: FakeProcess,
    pub(crate) execs: BTreeMap<ExecId, FakeExec>,
    /// Somebody else's process is in its group.
    pub(crate) stranger: bool,
    /// Its process was moved out of its group.
    pub(crate) moved: bool,
}

impl FakeMachine {
    /// Why its process cannot be proven to be its own.
    pub(crate) fn unproven(&self) -> Option<&'static str> {
        match self.process {
            FakeProcess::Lives { .. } => self.moved.then_some("its process is in another group"),
            _ => self.stranger.then_some("its process has ended, and another is in its group"),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum FakeProcess {
    NotStarted,
    Lives {
        ready_at: Option<Instant>,
        /// When it will end by itself, and how.
        ends: Option<(Instant, VmmEnd)>,
    },
    Exited(VmmEnd),
}

#[derive(Clone, Debug)]
pub(crate) struct FakeExec {
    pub(crate) output: Vec<u8>,
    pub(crate) ends_at: Option<Instant>,
    pub(crate) end: clawpot_core::exec::ExecEnd,
    pub(crate) killed: bool,
}

impl FakeHost {
    /// With the image "debian" and `slot_count` slots; guests answer after 100 ms and shut down within 50 ms.
    #[must_use]
    pub fn new(faults: Arc<Faults>, slot_count: u32) -> Arc<Self> {
        let inventory = Inventory {
            boot_id: "boot-1".to_owned(),
            // More than any test takes that does not say what there is.
            footprint: Footprint::NONE,
            room: Room {
                cpus: 1 << 20,
                memory: MiB(1 << 30),
                memory_available: MiB(1 << 30),
                disk: MiB(1 << 30),
                disk_free: MiB(1 << 30),
            },
            boot: Boot::ReadyAfter(Duration::from_millis(100)),
            shutdown: Shutdown::After(Duration::from_millis(50)),
            slot_count,
            images: BTreeMap::from([("debian".to_owned(), (Digest::from_sha256(&[0xde; 32]), false))]),
            disks: BTreeMap::new(),
            volumes: BTreeMap::new(),
            slots: BTreeSet::new(),
            machines: BTreeMap::new(),
            consoles: BTreeMap::new(),
            given_up: BTreeSet::new(),
            violations: Vec::new(),
            disks_made: 0,
        };
        Arc::new(Self { faults, inventory: Mutex::new(inventory), changed: Notify::new() })
    }

    /// How guests started from now on behave.
    pub fn set_boot(&self, boot: Boot) {
        self.lock().boot = boot;
    }

    pub fn set_shutdown(&self, shutdown: Shutdown) {
        self.lock().shutdown = shutdown;
    }

    /// What the host has from now on.
    pub fn set_room(&self, room: Room) {
        self.lock().room = room;
    }

    /// What VMMs take beside their guests' memory from now on. Nothing, unless a test is about it.
    pub fn set_footprint(&self, footprint: Footprint) {
        self.lock().footprint = footprint;
    }

    #[must_use]
    pub fn boot_id(&self) -> String {
        self.lock().boot_id.clone()
    }

    /// Processes, cgroups and network are gone; files stay.
    pub fn reboot(&self) {
        self.change(|inventory| {
            let count: u64 = inventory.boot_id.trim_start_matches("boot-").parse().unwrap_or(0);
            inventory.boot_id = format!("boot-{}", count + 1);
            inventory.slots.clear();
            inventory.images.values_mut().for_each(|(_, verified)| *verified = false);
            for machine in inventory.machines.values_mut() {
                (machine.stranger, machine.moved) = (false, false);
                if machine.process != FakeProcess::NotStarted {
                    machine.process = FakeProcess::Exited(VmmEnd::Unseen("the host was restarted".to_owned()));
                }
            }
        });
    }

    /// Every VMM of `vm` dies; whether there was one.
    pub fn kill_vmm(&self, vm: &VmId) -> bool {
        self.end_vmm(vm, &VmmEnd::Signal(9), None)
    }

    /// The guest goes down by itself, in order; whether there was one.
    pub fn power_off(&self, vm: &VmId) -> bool {
        self.end_vmm(vm, &VmmEnd::Code(0), Some("[    1.000000] reboot: Restarting system"))
    }

    /// The guest's kernel gives up; whether there was one.
    pub fn panic_guest(&self, vm: &VmId) -> bool {
        self.end_vmm(vm, &VmmEnd::Code(0), Some("[    1.000000] Kernel panic - not syncing: it was told to"))
    }

    /// Somebody puts a process of their own into the group of the VM's machine; with `moving` they move the VMM out of it instead.
    pub fn intrude(&self, vm: &VmId, moving: bool) {
        self.change(|inventory| {
            for (id, machine) in &mut inventory.machines {
                if id.vm == *vm && matches!(machine.process, FakeProcess::Lives { .. }) {
                    machine.stranger |= !moving;
                    machine.moved |= moving;
                }
            }
        });
    }

    /// All who intruded leave, and what they moved is where it was.
    pub fn intruders_leave(&self) {
        self.change(|inventory| {
            for machine in inventory.machines.values_mut() {
                (machine.stranger, machine.moved) = (false, false);
            }
        });
    }

    /// From now on strangers among the VM's processes may be ended too.
    pub fn give_up(&self, vm: &VmId) {
        self.change(|inventory| inventory.given_up.insert(vm.clone()));
    }

    /// Nobody can tell any more how a process ended: it was the last daemon's child.
    pub fn forget_ends(&self) {
        self.change(|inventory| {
            for machine in inventory.machines.values_mut() {
                if let FakeProcess::Exited(how) = &mut machine.process {
                    *how = VmmEnd::Unseen("it ended while no server watched".to_owned());
                }
            }
        });
    }

    fn end_vmm(&self, vm: &VmId, how: &VmmEnd, last_words: Option<&str>) -> bool {
        self.change(|inventory| {
            let mut killed = false;
            if last_words.is_some_and(|words| words.contains("Restarting system")) {
                inventory.unmounted(vm);
            }
            for (id, machine) in &mut inventory.machines {
                if id.vm == *vm && matches!(machine.process, FakeProcess::Lives { .. }) {
                    machine.process = FakeProcess::Exited(how.clone());
                    killed = true;
                }
            }
            if let Some(words) = last_words.filter(|_| killed) {
                inventory.consoles.entry(vm.clone()).or_default().push(words.to_owned());
            }
            killed
        })
    }

    /// The guest of a living VM no longer answers.
    pub fn silence_guest(&self, vm: &VmId) {
        self.change(|inventory| {
            for (id, machine) in &mut inventory.machines {
                if let FakeProcess::Lives { ready_at, .. } = &mut machine.process
                    && id.vm == *vm
                {
                    *ready_at = None;
                }
            }
        });
    }

    /// Removes the VM's disk behind everyone's back.
    pub fn lose_disk(&self, vm: &VmId) {
        self.change(|inventory| inventory.disks.remove(vm));
    }

    /// Tells the VM's disk from any other that was ever made; `None`: it has none.
    #[must_use]
    pub fn disk_serial(&self, vm: &VmId) -> Option<u64> {
        self.lock().disks.get(vm).map(|disk| disk.serial)
    }

    /// Machines whose VMM lives.
    #[must_use]
    pub fn living(&self) -> Vec<MachineId> {
        let inventory = self.lock();
        let lives = |machine: &FakeMachine| matches!(machine.process, FakeProcess::Lives { .. });
        inventory.machines.iter().filter(|(_, machine)| lives(machine)).map(|(id, _)| id.clone()).collect()
    }

    /// Machines that exist, living or not.
    #[must_use]
    pub fn machines(&self) -> Vec<MachineId> {
        self.lock().machines.keys().cloned().collect()
    }

    /// Living machines whose guest answers, or will.
    #[must_use]
    pub fn answering(&self) -> Vec<MachineId> {
        let inventory = self.lock();
        let answers = |machine: &FakeMachine| matches!(machine.process, FakeProcess::Lives { ready_at: Some(_), .. });
        inventory.machines.iter().filter(|(_, machine)| answers(machine)).map(|(id, _)| id.clone()).collect()
    }

    /// Slots of which something exists.
    #[must_use]
    pub fn slots(&self) -> BTreeSet<Slot> {
        self.lock().slots.clone()
    }

    /// The files of volumes. No VM's: they are not left behind.
    #[must_use]
    pub fn volume_files(&self) -> BTreeMap<VolumeId, FakeFile> {
        self.lock().volumes.clone()
    }

    /// A file that no record knows, or that a guest has left so.
    pub fn put_volume(&self, id: VolumeId, file: FakeFile) {
        self.change(|inventory| inventory.volumes.insert(id, file));
    }

    /// Everything that exists for some VM, one line each. Empty after the last VM was deleted, or something leaks.
    #[must_use]
    pub fn left_behind(&self) -> Vec<String> {
        let inventory = self.lock();
        let mut left = Vec::new();
        for (id, machine) in &inventory.machines {
            if matches!(machine.process, FakeProcess::Lives { .. }) {
                left.push(format!("process of {id}"));
            }
            left.push(format!("jail and cgroup of {id}"));
        }
        left.extend(inventory.slots.iter().map(|slot| format!("netns, tap and rules of slot {slot}")));
        left.extend(inventory.disks.keys().map(|vm| format!("disk of {vm}")));
        left.extend(inventory.consoles.keys().map(|vm| format!("console log of {vm}")));
        left
    }

    /// Calls that broke a port's contract: out of order, or on something still in use. Empty, or the caller is wrong.
    #[must_use]
    pub fn violations(&self) -> Vec<String> {
        self.lock().violations.clone()
    }

    /// The inventory as it is now: what was to end by itself has ended.
    pub(crate) fn lock(&self) -> MutexGuard<'_, Inventory> {
        let mut inventory = self.inventory.lock().unwrap_or_else(PoisonError::into_inner);
        inventory.settle(Instant::now());
        inventory
    }

    pub(crate) fn change<T>(&self, work: impl FnOnce(&mut Inventory) -> T) -> T {
        let result = work(&mut self.lock());
        self.changed.notify_waiters();
        result
    }

    /// Returns when `look` finds something, which it is asked after every change and when a process ends by itself.
    pub(crate) async fn wait_for<T>(&self, mut look: impl FnMut(&Inventory) -> Option<T> + Send) -> T {
        loop {
            let mut changed = std::pin::pin!(self.changed.notified());
            // From now on, so that nothing between the look and the wait is missed.
            changed.as_mut().enable();
            let next_end = {
                let inventory = self.lock();
                if let Some(found) = look(&inventory) {
                    return found;
                }
                inventory.next_end()
            };
            match next_end {
                Some(at) => {
                    // A timeout is as good a reason to look again as a change.
                    let _woken = tokio::time::timeout_at(at, changed).await.is_ok();
                }
                None => changed.await,
            }
        }
    }
}

impl Inventory {
    pub(crate) fn violation(&mut self, what: String) {
        self.violations.push(what);
    }

    /// A guest of `vm` goes down in order.
    fn unmounted(&mut self, vm: &VmId) {
        for (_, machine) in self.machines.iter().filter(|(id, _)| id.vm == *vm) {
            if matches!(machine.process, FakeProcess::Lives { .. }) {
                let written = machine.disks.iter().filter(|(_, read_only)| !read_only);
                let written: Vec<_> = written.map(|(file, _)| file).collect();
                for (id, file) in &mut self.volumes {
                    file.clean |= written.contains(&&crate::volumes::path(id));
                }
            }
        }
    }

    fn settle(&mut self, now: Instant) {
        let over = |machine: &FakeMachine| match &machine.process {
            FakeProcess::Lives { ends: Some((at, VmmEnd::Code(0))), .. } => *at <= now,
            _ => false,
        };
        let over: Vec<VmId> =
            self.machines.iter().filter(|(_, machine)| over(machine)).map(|(id, _)| id.vm.clone()).collect();
        over.iter().for_each(|vm| self.unmounted(vm));
        for (id, machine) in &mut self.machines {
            if let FakeProcess::Lives { ends: Some((at, how)), .. } = &machine.process
                && *at <= now
            {
                self.consoles.entry(id.vm.clone()).or_default().push(format!("[fake] the VMM ended: {how}"));
                machine.process = FakeProcess::Exited(how.clone());
            }
        }
    }

    /// The next moment at which something happens by itself.
    fn next_end(&self) -> Option<Instant> {
        let processes = self.machines.values().filter_map(|machine| match &machine.process {
            FakeProcess::Lives { ends: Some((at, _)), .. } => Some(*at),
            _ => None,
        });
        let now = Instant::now();
        let execs = self.machines.values().flat_map(|machine| machine.execs.values());
        processes.chain(execs.filter_map(|exec| exec.ends_at).filter(|at| *at > now)).min()
    }

    /// Whether a process lives in the slot.
    pub(crate) fn slot_is_busy(&self, slot: Slot) -> bool {
        self.machines
            .values()
            .any(|machine| machine.slot == slot && matches!(machine.process, FakeProcess::Lives { .. }))
    }
}
