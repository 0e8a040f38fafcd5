//! One run: a seed, some rounds of operations with things going wrong, and after each round a look whether all is well.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Once};
use std::time::Duration;

use clawpot_core::{Desired, MachineId, Phase, VmRecord};
use clawpot_testkit::Method;
use tokio::task::{JoinSet, LocalSet};

use crate::chance::Chance;
use crate::disk::Disk;
use crate::operation::{Mixture, Operation, Program};
use crate::planted::Planted;
use crate::trace::{Thing, Trace};
use crate::weather::{Climate, Commit, Failpoint};
use crate::world::World;
use crate::{check, client, volumes};

/// Operations between two looks.
const ROUND: u64 = 60;
/// Clients are given up only where they wait for ever.
const CLIENTS: Duration = Duration::from_secs(3_600);

/// What a run is made of.
#[derive(Clone, Debug)]
pub struct Setup {
    pub seed: u64,
    pub operations: u64,
    pub planted: Option<Planted>,
    /// The trace is kept whole.
    pub whole_trace: bool,
    pub disk: Disk,
}

impl Setup {
    #[must_use]
    pub fn new(seed: u64, operations: u64) -> Self {
        Self { seed, operations, planted: None, whole_trace: false, disk: Disk::fake() }
    }
}

/// What came of it.
#[derive(Debug)]
pub struct Report {
    pub seed: u64,
    /// Of the whole trace.
    pub hash: u64,
    pub operations: u64,
    /// Calls of ports.
    pub calls: u64,
    pub crashes: u64,
    /// VMs that there were.
    pub vms: u64,
    /// Volumes that there were.
    pub volumes: u64,
    pub reached: BTreeMap<(Method, Failpoint), u64>,
    pub reached_commits: BTreeMap<(Commit, Failpoint), u64>,
    /// Deletes that were held to their time: nothing went wrong meanwhile.
    pub deletes_checked: u64,
    /// How often a VM came into quarantine.
    pub quarantined: u64,
    /// What was wrong.
    pub wrong: Option<String>,
    pub trace: Vec<String>,
}

/// Runs it from the beginning to the end, in virtual time.
///
/// # Errors
/// The runtime cannot be made.
pub fn run(setup: &Setup) -> std::io::Result<Report> {
    witness_panics();
    PANICS.set(0);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build()?;
    // A client's future borrows across its awaits in ways that only one thread can run.
    let local = LocalSet::new();
    Ok(local.block_on(&runtime, simulate(setup)))
}

thread_local! {
    static PANICS: Cell<u64> = const { Cell::new(0) };
}

/// A task's panic is nobody's otherwise: tokio keeps it for whoever joins the task.
fn witness_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            PANICS.set(PANICS.get() + 1);
            before(info);
        }));
    });
}

async fn simulate(setup: &Setup) -> Report {
    let trace = Arc::new(Trace::new(setup.whole_trace));
    let mut chance = Chance::new(setup.seed, 1);
    let slots = u32::try_from(chance.between(2, 12)).unwrap_or(2);
    let world = World::new(setup.seed, slots, setup.disk.clone(), setup.planted, Arc::clone(&trace));
    let vms = u64::from(slots) / 2 + chance.between(1, 10);
    world.set_room(vms, true);
    let supervisor = tokio::spawn(Arc::clone(&world).keep_a_daemon(Chance::new(setup.seed, 4)));
    let watcher = tokio::task::spawn_local(watch(Arc::clone(&world)));
    let mut run = Run { world: Arc::clone(&world), clients: JoinSet::new(), done: 0, vms };
    let outcome = run.whole(setup.operations, chance).await;
    supervisor.abort();
    watcher.abort();
    Report {
        seed: setup.seed,
        hash: trace.hash(),
        operations: run.done,
        calls: world.weather.calls(),
        crashes: world.crashes.load(Ordering::SeqCst),
        vms: u64::try_from(world.oracle.known().len()).unwrap_or(0),
        volumes: world.oracle.volumes_made(),
        reached: world.weather.reached(),
        reached_commits: world.weather.reached_commits(),
        deletes_checked: world.oracle.deletes_checked(),
        quarantined: world.oracle.quarantined(),
        wrong: outcome.err(),
        trace: trace.lines(),
    }
}

struct Run {
    world: Arc<World>,
    clients: JoinSet<()>,
    done: u64,
    /// For so many the host has memory.
    vms: u64,
}

impl Run {
    async fn whole(&mut self, operations: u64, mut chance: Chance) -> Result<(), String> {
        let climate = Climate::drawn(&mut chance);
        let mut mixture = Mixture::drawn(&mut chance, &climate);
        while self.done < operations {
            self.world.weather.set(climate.clone());
            for _ in 0..ROUND.min(operations - self.done) {
                let (gap, operation) = mixture.next(&mut chance);
                tokio::time::sleep(gap).await;
                self.operate(operation);
                self.verdict()?;
            }
            self.rest().await?;
        }
        self.all_run().await?;
        self.adopted().await?;
        self.all_go().await
    }

    fn operate(&mut self, operation: Operation) {
        let world = &self.world;
        world.trace.add(Thing::Operation(format!("{operation:?}")));
        self.done += 1;
        if befall(world, &operation, self.vms) {
            return;
        }
        self.clients.spawn_local(client::act(Arc::clone(world), operation, self.done));
        while self.clients.try_join_next().is_some() {}
    }

    fn verdict(&self) -> Result<(), String> {
        if PANICS.get() > 0 {
            return Err("a task panicked".to_owned());
        }
        self.world.oracle.verdict().map_or(Ok(()), Err)
    }

    /// Nothing goes wrong any more: all is well in the end.
    async fn rest(&mut self) -> Result<(), String> {
        self.world.heal();
        let clients = &mut self.clients;
        let waiting = async { while clients.join_next().await.is_some() {} };
        if tokio::time::timeout(CLIENTS, waiting).await.is_err() {
            return Err(format!("{} clients wait for ever", self.clients.len()));
        }
        check::settle(&self.world).await?;
        self.verdict()?;
        let daemon = self.world.daemon().await;
        check::truth(&self.world, &daemon.service).into_iter().next().map_or(Ok(()), Err)?;
        volumes::counted(&self.world, &daemon.service).await
    }

    /// Whoever failed or was stopped can be started, and every guest runs a command.
    async fn all_run(&mut self) -> Result<(), String> {
        self.rest().await?;
        // All that was stopped meanwhile, too.
        self.world.set_room(1 << 20, true);
        for (id, seen) in self.world.oracle.vms() {
            let idle = seen.record.phase != Phase::Running && stays(&seen.record);
            if idle {
                let answer = self.world.ask(async |service| service.start(id.as_str(), "uid=0").await.map(drop)).await;
                if let Some(Err(error)) = answer {
                    return Err(format!("VM {id} cannot be started: {}", error.chain()));
                }
            }
        }
        self.rest().await?;
        for (id, seen) in self.world.oracle.vms() {
            let record = &seen.record;
            if !stays(record) {
                continue;
            }
            if record.phase != Phase::Running {
                return Err(format!("VM {id} was started and is {}: {:?}", record.phase, record.failure));
            }
            self.done += 1;
            let number = self.done.wrapping_add(1 << 40);
            client::exec(&self.world, id.as_str(), &Program::Exit(7), number)
                .await
                .map_err(|error| format!("VM {id} runs no command though nothing goes wrong: {}", error.chain()))?;
        }
        self.verdict()
    }

    /// The next daemon finds every machine, and starts none anew.
    async fn adopted(&mut self) -> Result<(), String> {
        let machines = |world: &World| -> BTreeMap<MachineId, Phase> {
            let vms = world.oracle.vms().into_values().filter(|seen| stays(&seen.record));
            vms.map(|seen| (seen.record.machine(), seen.record.phase)).collect()
        };
        let before = machines(&self.world);
        self.world.kill_daemon();
        self.rest().await?;
        let after = machines(&self.world);
        if before == after { Ok(()) } else { Err(format!("before the daemon's death {before:?}, after it {after:?}")) }
    }

    async fn all_go(&mut self) -> Result<(), String> {
        for id in self.world.oracle.vms().into_keys() {
            let answer = self.world.ask(async |service| service.delete(id.as_str(), false, "uid=0").await).await;
            match answer {
                Some(Ok(_)) | None => {}
                // It went by itself a moment ago.
                Some(Err(_)) if !self.world.oracle.vms().contains_key(&id) => {}
                Some(Err(error)) => return Err(format!("VM {id} cannot be deleted: {}", error.chain())),
            }
        }
        self.rest().await?;
        // They outlived all of them.
        for record in self.world.oracle.volumes() {
            let name = record.name;
            let asked = name.clone();
            if let Some(Err(error)) = self.world.ask(async |service| service.delete_volume(asked, "uid=0").await).await
            {
                return Err(format!("volume {name} cannot be removed: {}", error.chain()));
            }
        }
        // Longer than strays are left alone.
        tokio::time::sleep(Duration::from_secs(60)).await;
        self.verdict()?;
        check::empty(&self.world).into_iter().next().map_or(Ok(()), Err)
    }
}

/// Whether it neither goes nor stops by itself.
fn stays(record: &VmRecord) -> bool {
    record.desired != Desired::Deleted && !record.remove_when_done && record.ttl.is_none()
}

/// What befalls the host or the daemon; `false`: it is a client's.
fn befall(world: &Arc<World>, operation: &Operation, vms: u64) -> bool {
    let nth = |number: u64| {
        let living = world.host.living();
        let count = u64::try_from(living.len()).unwrap_or(1).max(1);
        living.get(usize::try_from(number % count).unwrap_or(0)).map(|machine| machine.vm.clone())
    };
    let disturbed = match operation {
        Operation::KillVmm(number) => nth(*number).is_some_and(|vm| world.host.kill_vmm(&vm)),
        Operation::PowerOff(number) => nth(*number).is_some_and(|vm| world.host.power_off(&vm)),
        Operation::PanicGuest(number) => nth(*number).is_some_and(|vm| world.host.panic_guest(&vm)),
        Operation::SilenceGuest(number) => nth(*number).is_some_and(|vm| {
            world.host.silence_guest(&vm);
            true
        }),
        Operation::Intrude(number, moving) => nth(*number).is_some_and(|vm| {
            world.host.intrude(&vm, *moving);
            true
        }),
        Operation::IntrudersLeave => {
            world.host.intruders_leave();
            true
        }
        Operation::KillDaemon => {
            world.kill_daemon();
            true
        }
        Operation::LeaveDaemon => {
            tokio::task::spawn_local(leave(Arc::clone(world)));
            true
        }
        Operation::RebootHost => {
            world.reboot_host();
            true
        }
        Operation::ClockJump(by) => {
            world.clock.jump(by.saturating_mul(1_000));
            true
        }
        Operation::DiskFull(time) => {
            world.full.store(true, Ordering::SeqCst);
            world.set_room(vms, false);
            tokio::spawn(empty_disk(Arc::clone(world), *time, vms));
            true
        }
        Operation::Guests(boot) => {
            world.host.set_boot(boot.clone());
            true
        }
        Operation::Shutdowns(shutdown) => {
            world.host.set_shutdown(*shutdown);
            true
        }
        _ => return false,
    };
    if disturbed {
        world.weather.disturb(Duration::ZERO);
    }
    true
}

async fn leave(world: Arc<World>) {
    if world.ask(async |service| service.leave().await).await.is_some() {
        world.kill_daemon();
    }
}

async fn empty_disk(world: Arc<World>, time: Duration, vms: u64) {
    tokio::time::sleep(time / 2).await;
    // Above the watermark again, and the store still finds none.
    world.set_room(vms, true);
    tokio::time::sleep(time / 2).await;
    world.full.store(false, Ordering::SeqCst);
    world.weather.disturb(Duration::ZERO);
}

/// Somebody watches all VMs, from one daemon to the next.
async fn watch(world: Arc<World>) {
    loop {
        let daemon = world.daemon().await;
        let mut changes = daemon.service.watch(None, BTreeMap::new());
        let mut last = BTreeMap::new();
        loop {
            let next = world.ask(async |service| {
                // Only while it is the same daemon.
                let same = Arc::ptr_eq(service.records(), daemon.service.records());
                if same { futures_util::StreamExt::next(&mut changes).await } else { None }
            });
            match next.await.flatten() {
                Some(Ok(changed)) => {
                    let before = last.insert(changed.id.clone(), changed.revision);
                    if before.is_some_and(|before| before >= changed.revision) {
                        let what = format!("VM {}: {} was told after {before:?}", changed.id, changed.revision);
                        world.oracle.broken(what);
                    }
                }
                // Too slow, or the daemon is gone.
                Some(Err(_)) | None => break,
            }
        }
    }
}
