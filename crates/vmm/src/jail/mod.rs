//! What both drivers share: a machine's directory and cgroup, its process, its end.
//!
//! ```text
//! STATE/jail/<vmm>/<vm>-<incarnation>/     root's, 0700: reachability isolates, not file modes
//!   machine.json    written last: without it the directory is half made
//!   console         FIFO, the VMM's stdout and stderr
//!   process.json    who was started; without it nobody was
//!   v.sock          `CONNECT <port>`: served by us, or a link to the VMM's own
//!   root/           the VMM's working directory, root's, 0755: the VMM can make no file in it
//!     kernel initramfs rootfs     hard links to root's 0444 files
//!     disk                        hard link to the VM's disk, owned by the slot's uid
//!     vdb vdc …                   hard links to extra disks: the slot's uid's, or root's 0444 where they are only read
//!     api.sock                    made by us for QEMU
//!     api.sock v.sock             made by Firecracker, to which the directory belongs until its guest runs
//! ```
//!
//! | `inspect` says | when |
//! |---|---|
//! | Running | the cgroup has a process, and the one that was written down is it |
//! | Prepared | `machine.json` is of this boot, `process.json` is not there |
//! | Exited | anything else that is there, half-made or stale too: `destroy` is what it needs |
//! | Absent | neither directory nor cgroup |
//! | Unproven | the cgroup has processes, and the one that was written down is not among them; or that one lives elsewhere |
//! | Unknown | the look failed |
//!
//! Nothing here is synced: a power failure ends every machine anyway.

mod confine;
mod directory;
mod halt;
mod process;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use clawpot_core::ports::Machine;
use clawpot_core::{Fact, MachineId, VmmEnd, VmmFact, VmmKind};
use clawpot_failpoint::{self as failpoint, Point};
use clawpot_host::cgroup::{Cgroup, Cgroups, Limits, Missing};
use clawpot_host::process::{Child, Exit, Spawn};
use clawpot_types::guest::disk_device;
use clawpot_types::{Error, InstanceId, Kind, Result};

use crate::console::Consoles;
use crate::relay::{Guest, Relays};
use confine::Confiner;
pub use confine::Overhead;

/// Names inside a machine's `root`, the same for every VM: a snapshot names nothing that differs.
pub const KERNEL: &str = "kernel";
pub const INITRAMFS: &str = "initramfs";
pub const ROOTFS: &str = "rootfs";
pub const DISK: &str = "disk";
pub const API_SOCKET: &str = "api.sock";
pub const VSOCK: &str = "v.sock";

/// For what was killed to end, and between two tries of what failed.
const PAUSE: Duration = Duration::from_secs(1);

/// Between two looks whether a machine's process is still in its group: some dozen system calls.
const ASTRAY: Duration = Duration::from_secs(5);

/// Every machine of one VMM in one state directory. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Jails {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    /// `STATE/jail/<vmm>`.
    base: PathBuf,
    /// `clawpot/<instance>`, in which each machine has its group.
    group: String,
    cgroups: Cgroups,
    /// What this host cannot limit a machine by.
    unlimited: Vec<Missing>,
    confiner: Confiner<Cgroup>,
    consoles: Consoles,
    relays: Relays,
    /// Processes that this daemon started; how they end is known.
    children: Mutex<BTreeMap<MachineId, Arc<Child>>>,
    /// Machines that were ended because their guests had halted.
    halted: Mutex<BTreeSet<MachineId>>,
}

/// One machine's places. Makes nothing.
#[derive(Clone, Debug)]
pub struct Jail {
    id: MachineId,
    dir: PathBuf,
    cgroup: Cgroup,
}

impl Jail {
    #[must_use]
    pub fn id(&self) -> &MachineId {
        &self.id
    }

    /// The machine's directory, root's alone.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The VMM's working directory.
    #[must_use]
    pub fn root(&self) -> PathBuf {
        self.dir.join("root")
    }

    /// One of this module's names inside the root.
    #[must_use]
    pub fn file(&self, name: &str) -> PathBuf {
        self.root().join(name)
    }

    /// Of the largest disk that `machine` may write to, bytes: as far as its VMM may write into any file. It owns its disks,
    /// and could else make them larger than they were given; with several, the smaller ones as large as the largest.
    pub fn largest_disk(&self, machine: &Machine) -> Result<u64> {
        let extra = machine.extra_disks.iter().enumerate().filter(|(_, disk)| !disk.read_only);
        let names = std::iter::once(DISK.to_owned()).chain(extra.map(|(index, _)| disk_device(index)));
        names.map(|name| self.file(&name)).try_fold(0, |largest, path| {
            let found = std::fs::metadata(&path);
            let size = found.map_err(|error| Error::io(format!("looking at {}", path.display()), error))?.len();
            Ok(size.max(largest))
        })
    }

    #[must_use]
    pub fn cgroup(&self) -> &Cgroup {
        &self.cgroup
    }

    /// Leads to the guest's ports, see [`crate::relay`]. Beside the root, where no VMM can put something else.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.dir.join(VSOCK)
    }

    /// Until it has ended, or somebody moved it out of its group. That empties the group, and is told at once, unless a thread
    /// of the kernel's own is left there, as KVM puts one beside Firecracker: then it is seen by looking.
    async fn left(&self) {
        loop {
            let error = match tokio::time::timeout(ASTRAY, self.cgroup.empty()).await {
                Ok(Ok(())) => return,
                Ok(Err(error)) => error,
                Err(_elapsed) => match process::outside(self) {
                    Ok(Some(_)) => return,
                    Ok(None) => continue,
                    Err(error) => error,
                },
            };
            tracing::warn!(machine = %self.id, error = error.chain(), "waiting for a machine's end");
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// Until it has ended, wherever it is.
    async fn ended(&self) {
        loop {
            self.left().await;
            let ended = match process::outside(self) {
                Ok(Some(outside)) => clawpot_host::process::ended(&outside.pidfd).await,
                Ok(None) => return,
                Err(error) => Err(error),
            };
            if let Err(error) = ended {
                tracing::warn!(machine = %self.id, error = error.chain(), "waiting for a machine's end");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }

    fn console(&self) -> PathBuf {
        self.dir.join("console")
    }

    fn manifest(&self) -> PathBuf {
        self.dir.join("machine.json")
    }

    fn process(&self) -> PathBuf {
        self.dir.join("process.json")
    }
}

impl Jails {
    /// `state`: the server's state directory; directories are made when the first machine is prepared.
    pub fn new(state: &Path, instance: &InstanceId, kind: VmmKind, consoles: Consoles) -> Result<Self> {
        let cgroups = Cgroups::find()?;
        let unlimited = cgroups.missing()?;
        for Missing { controller, why } in &unlimited {
            tracing::warn!(vmm = kind.as_str(), controller, why, "machines are without this limit");
        }
        let inner = Inner {
            base: state.join("jail").join(kind.as_str()),
            group: format!("clawpot/{instance}"),
            cgroups,
            unlimited,
            confiner: Confiner::default(),
            consoles,
            relays: Relays::default(),
            children: Mutex::default(),
            halted: Mutex::default(),
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// The machine's places, whether or not it exists.
    pub fn jail(&self, id: &MachineId) -> Result<Jail> {
        let cgroup = self.inner.cgroups.group(&format!("{}/{id}", self.inner.group))?;
        Ok(Jail { id: id.clone(), dir: self.inner.base.join(id.to_string()), cgroup })
    }

    /// Makes the machine's directory. Again is fine; one that is half made or stale is made afresh.
    /// `FailedPrecondition`: it runs; or the state directory and the images are on two file systems.
    pub async fn prepare(&self, machine: &Machine) -> Result<()> {
        self.prepare_with(machine, |_| Ok(())).await
    }

    /// [`Self::prepare`]; `furnish` (run where blocking is fine) adds what only one VMM needs.
    pub async fn prepare_with<F>(&self, machine: &Machine, furnish: F) -> Result<()>
    where
        F: FnOnce(&Jail) -> Result<()> + Send + 'static,
    {
        let (this, id, machine) = (self.clone(), machine.id.clone(), machine.clone());
        self.blocking("preparing", &id, move |jail| {
            match this.look(&jail)? {
                Some(VmmFact::Prepared) => return Ok(()),
                Some(VmmFact::Running { .. }) => return Err(Error::new(Kind::FailedPrecondition, "it runs")),
                Some(VmmFact::Unproven { why }) => return Err(Error::new(Kind::FailedPrecondition, why)),
                Some(VmmFact::Exited { .. }) => clawpot_host::fs::remove_tree_if_exists(jail.dir())?,
                None => {}
            }
            directory::make(&this.inner.base, &jail, &machine)?;
            furnish(&jail)?;
            directory::complete(&jail, &machine)
        })
        .await
    }

    /// Starts the VMM under `limits`, once prepared: `spawn` (run where blocking is fine) says which program with what;
    /// group, standard output and error are added here. A living machine is left as it is. Limits of version-1 hierarchies
    /// hold from a moment later on, while the guest's kernel boots; see [`confine`].
    /// `FailedPrecondition`: it is not prepared, or it ran already.
    pub async fn start<F>(&self, id: &MachineId, limits: Limits, spawn: F) -> Result<()>
    where
        F: FnOnce(&Jail) -> Result<Spawn> + Send + 'static,
    {
        // Before the process: what a FIFO holds is gone with the last one who has it open.
        self.drain(id)?;
        let this = self.clone();
        self.blocking("starting", id, move |jail| process::start(&this, &jail, &limits, spawn)).await?;
        self.confine(id)
    }

    /// Sees to it that the console is drained and the limits hold, from now on. To be called inside a runtime.
    pub fn attach(&self, id: &MachineId) -> Result<()> {
        process::identify(&self.jail(id)?).map_err(|error| error.context(format!("machine {id}: identifying it")))?;
        self.drain(id)?;
        self.confine(id)
    }

    fn drain(&self, id: &MachineId) -> Result<()> {
        let jail = self.jail(id)?;
        let drained = self.inner.consoles.drain(id, &jail.console());
        drained.map_err(|error| error.context(format!("machine {id}: draining its console")))?;
        failpoint::reached(Point::VmmDrained);
        Ok(())
    }

    /// Off the caller's path. A machine that cannot be limited is ended; [`Self::inspect`] says why.
    fn confine(&self, id: &MachineId) -> Result<()> {
        if self.inner.cgroups.is_hybrid() {
            self.inner.confiner.confine(id, self.jail(id)?.cgroup);
        }
        Ok(())
    }

    /// Serves the machine's socket while it lives. Again is fine. To be called inside a runtime.
    pub fn serve(&self, id: &MachineId, guest: Guest) -> Result<()> {
        let jail = self.jail(id)?;
        let (socket, what) = (jail.socket(), format!("machine {id}: serving its socket"));
        let served = self.inner.relays.serve(id, &socket, guest, async move { jail.ended().await });
        served.map_err(|error| error.context(what))?;
        failpoint::reached(Point::VmmServed);
        Ok(())
    }

    /// What is there of the machine.
    pub async fn inspect(&self, id: &MachineId) -> Fact<VmmFact> {
        let look = self.jail(id).and_then(|jail| self.look(&jail));
        let Ok(Some(VmmFact::Exited { .. })) = &look else { return Fact::from_look(look) };
        // Better known than by the signal that it died of.
        if let Some(why) = self.inner.confiner.gave_up(id) {
            return Fact::Present(VmmFact::Exited { how: VmmEnd::Unseen(why) });
        }
        // The group is empty a moment before the process can be reaped.
        let child = self.children().get(id).cloned();
        match child {
            _ if self.halted().contains(id) => {
                Fact::Present(VmmFact::Exited { how: VmmEnd::Unseen(halt::HALTED.to_owned()) })
            }
            Some(child) => Fact::from_look(child.wait().await.map(|exit| Some(VmmFact::Exited { how: end(exit) }))),
            None => Fact::from_look(look),
        }
    }

    /// A dozen of system calls.
    fn look(&self, jail: &Jail) -> Result<Option<VmmFact>> {
        match (jail.cgroup().populated()?, directory::look(jail)?) {
            (Some(true), _) => self.living(jail).map(Some),
            (_, directory::State::Started) if let Some(outside) = process::outside(jail)? => {
                Ok(Some(VmmFact::Unproven { why: outside.why }))
            }
            // Not even in a hierarchy that only limits.
            (None, directory::State::Absent) if !jail.cgroup().exists()? => Ok(None),
            (_, directory::State::Prepared) => Ok(Some(VmmFact::Prepared)),
            (_, state) => Ok(Some(VmmFact::Exited { how: VmmEnd::Unseen(state.explain().to_owned()) })),
        }
    }

    /// Whether what lives in the machine's group is the machine.
    fn living(&self, jail: &Jail) -> Result<VmmFact> {
        let child = self.children().get(jail.id()).cloned();
        // What this daemon started is known for as long as it lives there.
        let own = child.filter(|child| clawpot_host::process::is_alive(&**child).unwrap_or(false));
        let own = own.map_or(Ok(false), |child| jail.cgroup().holds(child.pid()))?;
        if !own {
            // A thread of the kernel's may be all that is left in its group.
            let why = process::strange(jail)?.or(process::outside(jail)?.map(|outside| outside.why));
            if let Some(why) = why {
                return Ok(VmmFact::Unproven { why });
            }
        }
        Ok(VmmFact::Running { attached: self.inner.consoles.is_drained(jail.id()) })
    }

    /// Returns once no process is left in the machine's group. One whose guest has halted is ended here: see [`halt`].
    pub async fn exited(&self, id: &MachineId) {
        let Ok(jail) = self.jail(id) else { return };
        let socket = jail.socket();
        tokio::select! {
            () = jail.left() => return,
            () = halt::halted(&self.inner.consoles, id, &socket) => {}
        }
        tracing::info!(machine = %id, "its guest has halted: its VMM is ended");
        self.halted().insert(id.clone());
        while let Err(error) = self.stop(id) {
            tracing::warn!(machine = %id, error = error.chain(), "ending a machine whose guest has halted");
            tokio::time::sleep(halt::PAUSE).await;
        }
        jail.left().await;
    }

    /// Kills every process of the machine, in its group or moved out of it; does not wait.
    pub fn stop(&self, id: &MachineId) -> Result<()> {
        let killed = self.jail(id).and_then(|jail| {
            jail.cgroup().kill()?;
            process::kill_outside(&jail)
        });
        killed.map_err(|error| error.context(format!("machine {id}: killing it")))?;
        failpoint::reached(Point::VmmKilled);
        Ok(())
    }

    /// Removes directory and group of a machine without processes. Again is fine.
    pub async fn destroy(&self, id: &MachineId) -> Result<()> {
        let jail = self.jail(id)?;
        let what = || format!("machine {id}: removing it");
        if jail.cgroup().populated().map_err(|error| error.context(what()))? == Some(true) {
            return Err(Error::new(Kind::FailedPrecondition, format!("{}: its processes live", what())));
        }
        if let Some(outside) = process::outside(&jail).map_err(|error| error.context(what()))? {
            let ended = tokio::time::timeout(PAUSE, clawpot_host::process::ended(&outside.pidfd)).await;
            let lives = |_| Error::new(Kind::FailedPrecondition, outside.why);
            ended.map_err(lives).flatten().map_err(|error| error.context(what()))?;
        }
        self.inner.consoles.finish(id).await;
        self.inner.relays.finish(id).await;
        failpoint::reached(Point::VmmFinished);
        self.blocking("removing", id, move |jail| directory::remove(&jail)).await?;
        jail.cgroup().remove().await.map_err(|error| error.context(what()))?;
        failpoint::reached(Point::VmmGroupGone);
        self.children().remove(id);
        self.halted().remove(id);
        self.inner.confiner.forget(id);
        Ok(())
    }

    /// Every machine of which something exists. A name that is not a machine's is not ours and stays.
    pub fn list(&self) -> Result<Vec<MachineId>> {
        let mut found: BTreeSet<MachineId> = directory::list(&self.inner.base)?.into_iter().collect();
        let groups = self.inner.cgroups.list(&self.inner.group)?;
        found.extend(groups.iter().filter_map(|name| name.parse().ok()));
        Ok(found.into_iter().collect())
    }

    fn children(&self) -> MutexGuard<'_, BTreeMap<MachineId, Arc<Child>>> {
        // Whatever panicked, a map of descriptors stays whole.
        self.inner.children.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn halted(&self) -> MutexGuard<'_, BTreeSet<MachineId>> {
        self.inner.halted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `work` on a thread where blocking is fine. A caller that goes away does not stop it.
    async fn blocking<T, F>(&self, doing: &str, id: &MachineId, work: F) -> Result<T>
    where
        T: Send + 'static,
        F: FnOnce(Jail) -> Result<T> + Send + 'static,
    {
        let what = format!("machine {id}: {doing} it");
        let jail = self.jail(id)?;
        let done = tokio::task::spawn_blocking(move || work(jail)).await;
        done.unwrap_or_else(|error| Err(Error::new(Kind::Internal, "it panicked").because(error)))
            .map_err(|error| error.context(what))
    }
}

const fn end(exit: Exit) -> VmmEnd {
    match exit {
        Exit::Code(code) => VmmEnd::Code(code),
        Exit::Signal(signal) => VmmEnd::Signal(signal),
    }
}
