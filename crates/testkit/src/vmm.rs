//! `Vmm` and `Console` over the fake host.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use bytes::Bytes;
use clawpot_core::ports::{BoxStream, Capabilities, Console, GuestEndpoint, Machine, Seat, Vmm};
use clawpot_core::{Fact, LastWords, MachineId, VmmEnd, VmmFact, VmmKind};
use clawpot_types::{Error, Kind, Result, VmId};
use futures_util::StreamExt as _;
use tokio::time::Instant;

use crate::faults::{Line, Method};
use crate::host::{Boot, FakeHost, FakeMachine, FakeProcess, Inventory};
use crate::volumes;

/// One per "daemon": what is attached is lost with it.
#[derive(Debug)]
pub struct FakeVmm {
    host: Arc<FakeHost>,
    line: Line,
    attached: Mutex<BTreeSet<MachineId>>,
    /// Those of which the last look said that they are not provably their own.
    doubted: Mutex<BTreeSet<MachineId>>,
}

impl FakeVmm {
    /// Of the daemon that lives now.
    #[must_use]
    pub fn new(host: &Arc<FakeHost>) -> Self {
        Self { host: Arc::clone(host), line: host.faults.line(), attached: Mutex::default(), doubted: Mutex::default() }
    }

    fn doubted(&self) -> std::sync::MutexGuard<'_, BTreeSet<MachineId>> {
        self.doubted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn attached(&self) -> std::sync::MutexGuard<'_, BTreeSet<MachineId>> {
        self.attached.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Where the fake guest of a machine is reached.
pub(crate) fn endpoint(id: &MachineId) -> GuestEndpoint {
    GuestEndpoint::Vsock(format!("/fake/machines/{id}/v.sock").into())
}

#[async_trait]
impl Vmm for FakeVmm {
    fn capabilities(&self) -> Capabilities {
        let footprint = self.host.lock().footprint;
        Capabilities { kind: VmmKind::Qemu, version: "fake".to_owned(), snapshots: false, footprint }
    }

    async fn prepare(&self, machine: &Machine) -> Result<()> {
        let work = || self.host.change(|inventory| prepare(inventory, machine));
        self.line.call(Method::VmmPrepare, work).await
    }

    async fn start(&self, machine: &Machine) -> Result<()> {
        let work = || self.host.change(|inventory| start(inventory, &machine.id));
        self.line.call(Method::VmmStart, work).await
    }

    async fn attach(&self, id: &MachineId, _seat: &Seat) -> Result<GuestEndpoint> {
        let work = || {
            let lives =
                matches!(self.host.lock().machines.get(id).map(|m| &m.process), Some(FakeProcess::Lives { .. }));
            if !lives {
                return Err(Error::new(Kind::NotFound, format!("machine {id}: no process to attach to")));
            }
            self.attached().insert(id.clone());
            Ok(endpoint(id))
        };
        self.line.call(Method::VmmAttach, work).await
    }

    async fn inspect(&self, id: &MachineId) -> Fact<VmmFact> {
        let work = || {
            self.doubted().remove(id);
            Ok(self.host.lock().machines.get(id).map(|machine| match &machine.process {
                _ if machine.unproven().is_some() => {
                    self.doubted().insert(id.clone());
                    VmmFact::Unproven { why: machine.unproven().unwrap_or_default().to_owned() }
                }
                FakeProcess::NotStarted => VmmFact::Prepared,
                FakeProcess::Lives { .. } => VmmFact::Running { attached: self.attached().contains(id) },
                FakeProcess::Exited(how) => VmmFact::Exited { how: how.clone() },
            }))
        };
        Fact::from_look(self.line.call(Method::VmmInspect, work).await)
    }

    async fn exited(&self, id: &MachineId) {
        // What was moved out of its group is not there any more, though it lives.
        let there = |machine: &FakeMachine| {
            machine.stranger || !machine.moved && matches!(machine.process, FakeProcess::Lives { .. })
        };
        let populated = |inventory: &Inventory| inventory.machines.get(id).is_some_and(there);
        self.host.wait_for(|inventory| (!populated(inventory)).then_some(())).await;
    }

    async fn stop(&self, id: &MachineId) -> Result<()> {
        let work = || {
            self.host.change(|inventory| {
                if self.doubted().contains(id) && !inventory.given_up.contains(&id.vm) {
                    inventory.violation(format!("machine {id} was killed, and nobody knew whose it was"));
                }
                if let Some(machine) = inventory.machines.get_mut(id) {
                    machine.stranger = false;
                    if matches!(machine.process, FakeProcess::Lives { .. }) {
                        machine.process = FakeProcess::Exited(VmmEnd::Signal(9));
                    }
                }
            });
            Ok(())
        };
        self.line.call(Method::VmmStop, work).await
    }

    async fn destroy(&self, id: &MachineId) -> Result<()> {
        let work = || {
            self.host.change(|inventory| {
                let process = inventory.machines.get(id).map(|machine| machine.process.clone());
                if matches!(process, Some(FakeProcess::Lives { .. })) {
                    inventory.violation(format!("machine {id} was destroyed while its VMM lived"));
                    return Err(Error::new(Kind::FailedPrecondition, format!("machine {id}: its VMM lives")));
                }
                if inventory.machines.get(id).is_some_and(|machine| machine.stranger) {
                    return Err(Error::new(
                        Kind::FailedPrecondition,
                        format!("machine {id}: a process is in its group"),
                    ));
                }
                inventory.machines.remove(id);
                Ok(())
            })?;
            self.attached().remove(id);
            Ok(())
        };
        self.line.call(Method::VmmDestroy, work).await
    }

    async fn list(&self) -> Result<Vec<MachineId>> {
        let work = || Ok(self.host.lock().machines.keys().cloned().collect());
        self.line.call(Method::VmmList, work).await
    }
}

fn prepare(inventory: &mut Inventory, machine: &Machine) -> Result<()> {
    let id = &machine.id;
    let slot = machine.seat.slot;
    let mut missing = Vec::new();
    if !inventory.disks.contains_key(&id.vm) {
        missing.push("disk");
    }
    if !inventory.slots.contains(&slot) {
        missing.push("network");
    }
    if !inventory.images.values().any(|(_, verified)| *verified) {
        missing.push("verified image");
    }
    if !missing.is_empty() {
        let what = format!("machine {id} was prepared without {}", missing.join(" and "));
        inventory.violation(what.clone());
        return Err(Error::new(Kind::FailedPrecondition, what));
    }
    let neighbour = inventory.machines.iter().find(|(other, held)| held.slot == slot && *other != id);
    if let Some((other, _)) = neighbour {
        let what = format!("machines {other} and {id} share slot {slot}");
        inventory.violation(what);
    }
    share_no_disk(inventory, machine);
    let new = || FakeMachine {
        slot,
        disks: machine.extra_disks.iter().map(|disk| (disk.file.clone(), disk.read_only)).collect(),
        process: FakeProcess::NotStarted,
        execs: BTreeMap::new(),
        stranger: false,
        moved: false,
    };
    inventory.machines.entry(id.clone()).or_insert_with(new);
    Ok(())
}

/// Extra disks are there, and no other machine has one of which either may write.
fn share_no_disk(inventory: &mut Inventory, machine: &Machine) {
    for disk in &machine.extra_disks {
        let id = &machine.id;
        // Others are the caller's: a build's.
        let volume = disk.file.starts_with(volumes::DIR);
        if volume && !inventory.volumes.keys().any(|volume| volumes::path(volume) == disk.file) {
            inventory.violation(format!("machine {id} was prepared without {}", disk.file.display()));
        }
        let other = inventory.machines.iter().find(|(other, held)| {
            let clashes = |(file, read_only): &(_, bool)| *file == disk.file && !(*read_only && disk.read_only);
            *other != id && held.disks.iter().any(clashes)
        });
        if let Some((other, _)) = other {
            let what = format!("machines {other} and {id} share the volume {}", disk.file.display());
            inventory.violation(what);
        }
    }
}

/// What its guest gets was unmounted in order or checked; what it may write to is in use from here on.
fn mount(inventory: &mut Inventory, id: &MachineId) {
    let disks = inventory.machines.get(id).map(|machine| machine.disks.clone()).unwrap_or_default();
    let mut unclean = Vec::new();
    for (volume, file) in &mut inventory.volumes {
        let path = volumes::path(volume);
        if let Some((_, read_only)) = disks.iter().find(|(file, _)| *file == path) {
            if !file.clean {
                unclean.push(volume.clone());
            }
            file.clean &= *read_only;
        }
    }
    for volume in unclean {
        inventory.violation(format!("machine {id} was started on volume {volume}, which was not unmounted in order"));
    }
}

fn start(inventory: &mut Inventory, id: &MachineId) -> Result<()> {
    let boot = inventory.boot.clone();
    let now = Instant::now();
    let refused = |what: String| Err(Error::new(Kind::FailedPrecondition, what));
    let process = inventory.machines.get(id).map(|machine| machine.process.clone());
    match process {
        None => {
            let what = format!("machine {id} was started without being prepared");
            inventory.violation(what.clone());
            return refused(what);
        }
        Some(FakeProcess::Exited(_)) => return refused(format!("machine {id}: it has run already")),
        Some(FakeProcess::Lives { .. }) => return Ok(()),
        Some(FakeProcess::NotStarted) => {}
    }
    let siblings = inventory.machines.iter().filter(|(other, _)| other.vm == id.vm && *other != id);
    if siblings.into_iter().any(|(_, machine)| matches!(machine.process, FakeProcess::Lives { .. })) {
        inventory.violation(format!("machine {id} was started beside another incarnation on the same disk"));
    }
    let (ready_at, ends) = match boot {
        Boot::ReadyAfter(time) => (Some(now + time), None),
        Boot::Silent => (None, None),
        Boot::Exits(time, how) => (None, Some((now + time, how))),
    };
    inventory
        .consoles
        .entry(id.vm.clone())
        .or_default()
        .extend([format!("{}{} ---", LastWords::BOOT, id.incarnation), format!("[fake] machine {id} boots")]);
    mount(inventory, id);
    if let Some(machine) = inventory.machines.get_mut(id) {
        machine.process = FakeProcess::Lives { ready_at, ends };
    }
    Ok(())
}

#[derive(Debug)]
pub struct FakeConsole {
    host: Arc<FakeHost>,
    line: Line,
}

impl FakeConsole {
    /// Of the daemon that lives now.
    #[must_use]
    pub fn new(host: &Arc<FakeHost>) -> Self {
        Self { host: Arc::clone(host), line: host.faults.line() }
    }

    fn lines(&self, vm: &VmId) -> Vec<String> {
        self.host.lock().consoles.get(vm).cloned().unwrap_or_default()
    }
}

#[async_trait]
impl Console for FakeConsole {
    async fn tail(&self, vm: &VmId, lines: usize) -> Result<Vec<String>> {
        let work = || {
            let all = self.lines(vm);
            Ok(all[all.len().saturating_sub(lines)..].to_vec())
        };
        self.line.call(Method::ConsoleTail, work).await
    }

    async fn read(&self, vm: &VmId, lines: usize, follow: bool) -> Result<BoxStream<Result<Bytes>>> {
        let work = || {
            let all = self.lines(vm);
            Ok(if lines == 0 { 0 } else { all.len().saturating_sub(lines) })
        };
        let first = self.line.call(Method::ConsoleRead, work).await?;
        let (host, vm) = (Arc::clone(&self.host), vm.clone());
        let stream = futures_util::stream::unfold(first, move |next| {
            let (host, vm) = (Arc::clone(&host), vm.clone());
            async move {
                let line = |inventory: &Inventory| inventory.consoles.get(&vm).and_then(|all| all.get(next)).cloned();
                let found = line(&host.lock());
                let found = if found.is_none() && follow { Some(host.wait_for(line).await) } else { found };
                found.map(|line| (Ok(Bytes::from(line + "\n")), next + 1))
            }
        });
        Ok(stream.boxed())
    }

    async fn look(&self, vm: &VmId) -> Result<Option<()>> {
        let work = || Ok(self.host.lock().consoles.contains_key(vm).then_some(()));
        self.line.call(Method::ConsoleLook, work).await
    }

    async fn erase(&self, vm: &VmId) -> Result<()> {
        let work = || {
            self.host.change(|inventory| inventory.consoles.remove(vm));
            Ok(())
        };
        self.line.call(Method::ConsoleErase, work).await
    }
}
