//! A host, a disk, and one daemon after another.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use clawpot_control::{Deps, Service, Settings, Vmms, start};
use clawpot_core::VmmKind;
use clawpot_core::admission::Room;
use clawpot_testkit::{
    Boot, FakeClock, FakeConsole, FakeGuest, FakeHost, FakeIds, FakeImages, FakeNet, FakeRoom, FakeVmm, FakeVolumes,
    Faults, Shutdown, samples,
};
use clawpot_types::{MiB, Result};
use tokio::sync::Notify;

use crate::chance::Chance;
use crate::disk::{Disk, SimStore};
use crate::oracle::Oracle;
use crate::planted::{Planted, Ports};
use crate::trace::{Thing, Trace};
use crate::weather::{Climate, Weather};

/// The daemon that lives, and which one it is.
#[derive(Clone, Debug)]
pub struct Daemon {
    pub life: u64,
    pub service: Service,
}

pub struct World {
    pub trace: Arc<Trace>,
    pub weather: Arc<Weather>,
    pub oracle: Arc<Oracle>,
    pub host: Arc<FakeHost>,
    pub faults: Arc<Faults>,
    pub clock: Arc<FakeClock>,
    pub full: Arc<AtomicBool>,
    pub disk: Disk,
    pub crashes: AtomicU64,
    ids: Arc<FakeIds>,
    up: Mutex<Option<Daemon>>,
    /// The daemon came up or died.
    turned: Notify,
    reboot: AtomicBool,
    planted: Option<Planted>,
}

impl std::fmt::Debug for World {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("World").finish_non_exhaustive()
    }
}

/// Guests that behave.
const GOOD_BOOT: Boot = Boot::ReadyAfter(Duration::from_millis(100));
const GOOD_SHUTDOWN: Shutdown = Shutdown::After(Duration::from_millis(50));

impl World {
    #[must_use]
    pub fn new(seed: u64, slots: u32, disk: Disk, planted: Option<Planted>, trace: Arc<Trace>) -> Arc<Self> {
        let faults = Faults::new();
        let weather = Arc::new(Weather::new(seed, Arc::clone(&trace)));
        faults.direct(weather.clone());
        let host = FakeHost::new(Arc::clone(&faults), slots);
        let oracle = Arc::new(Oracle::new(Arc::clone(&trace), Arc::clone(&weather), Arc::clone(&host)));
        Arc::new(Self {
            trace,
            weather,
            oracle,
            host,
            faults,
            clock: Arc::new(FakeClock::following_tokio()),
            full: Arc::default(),
            disk,
            crashes: AtomicU64::new(0),
            ids: Arc::new(FakeIds::seeded(seed)),
            up: Mutex::default(),
            turned: Notify::new(),
            reboot: AtomicBool::new(false),
            planted,
        })
    }

    /// The host has memory for so many of the VMs that clients ask for, and its disk has room or not.
    pub fn set_room(&self, vms: u64, disk: bool) {
        let limit = vms * samples::spec().memory.0;
        // A tenth is the host's own.
        let memory = MiB((limit * 10).div_ceil(9));
        let (disk, disk_free) = (MiB(1 << 30), MiB(if disk { 1 << 30 } else { 0 }));
        self.host.set_room(Room { cpus: 1 << 20, memory, memory_available: memory, disk, disk_free });
        self.oracle.set_memory(limit);
    }

    pub fn tell(&self, what: impl Into<String>) {
        self.trace.add(Thing::Told(what.into()));
    }

    fn deps(&self) -> Result<Deps> {
        let store = Arc::new(SimStore {
            disk: self.disk.clone(),
            line: self.faults.line(),
            oracle: Arc::clone(&self.oracle),
            full: Arc::clone(&self.full),
        });
        let mut ports = Ports {
            vmm: Arc::new(FakeVmm::new(&self.host)),
            net: Arc::new(FakeNet::new(&self.host)),
            images: Arc::new(FakeImages::new(&self.host)),
            volumes: FakeVolumes::new(&self.host),
            store: store.clone(),
        };
        if let Some(planted) = self.planted {
            ports = planted.into_ports(ports);
        }
        let Ports { vmm, net, images, volumes, store: state } = ports;
        Ok(Deps {
            store: state,
            events: store,
            images,
            volumes,
            net,
            vmms: Vmms::new(VmmKind::Qemu, [vmm])?,
            console: Arc::new(FakeConsole::new(&self.host)),
            guest: Arc::new(FakeGuest::new(&self.host)),
            room: Arc::new(FakeRoom::new(&self.host)),
            clock: self.clock.clone(),
            ids: self.ids.clone(),
            boot_id: self.host.boot_id(),
            settings: Settings::default(),
        })
    }

    /// For ever: a daemon, its death, the next one.
    pub async fn keep_a_daemon(self: Arc<Self>, mut chance: Chance) {
        for life in 1.. {
            let service = self.come_up(&mut chance).await;
            self.tell(format!("daemon {life} is up"));
            self.weather.disturb(Duration::ZERO);
            self.turn(Some(Daemon { life, service }));
            self.faults.crashed().await;
            self.turn(None);
            self.go_down(&mut chance).await;
        }
    }

    async fn come_up(&self, chance: &mut Chance) -> Service {
        loop {
            // Whatever the last one still does has no effect any more.
            self.faults.kill_daemon();
            self.host.forget_ends();
            let started = match self.deps() {
                Ok(deps) => tokio::select! {
                    biased;
                    () = self.faults.crashed() => None,
                    started = start(deps) => Some(started),
                },
                Err(error) => Some(Err(error)),
            };
            match started {
                Some(Ok(service)) => return service,
                Some(Err(error)) => self.tell(format!("the daemon does not start: {}", error.chain())),
                None => self.go_down(chance).await,
            }
            tokio::time::sleep(Duration::from_millis(chance.between(1, 200))).await;
        }
    }

    async fn go_down(&self, chance: &mut Chance) {
        self.crashes.fetch_add(1, Ordering::SeqCst);
        self.tell("the daemon is dead");
        if self.reboot.swap(false, Ordering::SeqCst) {
            self.host.reboot();
            self.tell("the host was restarted");
        }
        let most = *chance.pick(&[1, 100, 2_000, 60_000]).unwrap_or(&1);
        let time = Duration::from_millis(chance.between(0, most));
        self.weather.disturb(time);
        tokio::time::sleep(time).await;
    }

    /// `kill -9`.
    pub fn kill_daemon(&self) {
        self.weather.disturb(Duration::ZERO);
        self.faults.crash();
    }

    pub fn reboot_host(&self) {
        self.reboot.store(true, Ordering::SeqCst);
        self.kill_daemon();
    }

    fn turn(&self, daemon: Option<Daemon>) {
        *self.up.lock().unwrap_or_else(PoisonError::into_inner) = daemon;
        self.turned.notify_waiters();
    }

    /// What `look` finds in the daemon that lives, or in its absence.
    async fn until<T>(&self, mut look: impl FnMut(&Option<Daemon>) -> Option<T>) -> T {
        loop {
            let mut turned = std::pin::pin!(self.turned.notified());
            turned.as_mut().enable();
            if let Some(found) = look(&self.up.lock().unwrap_or_else(PoisonError::into_inner)) {
                return found;
            }
            turned.await;
        }
    }

    /// The daemon that lives; waits while there is none.
    pub async fn daemon(&self) -> Daemon {
        self.until(Clone::clone).await
    }

    /// Asks the daemon that lives. `None`: it died before it answered.
    pub async fn ask<T>(&self, question: impl AsyncFnOnce(Service) -> T) -> Option<T> {
        let Daemon { life, service } = self.daemon().await;
        let other = |up: &Option<Daemon>| up.as_ref().is_none_or(|up| up.life != life).then_some(());
        tokio::select! {
            biased;
            () = self.until(other) => None,
            answer = question(service) => Some(answer),
        }
    }

    /// Nothing goes wrong from now on, and guests behave. Those that fell silent are ended.
    pub fn heal(&self) {
        self.tell("from here on nothing goes wrong");
        self.weather.set(Climate::CALM);
        self.full.store(false, Ordering::SeqCst);
        self.host.set_boot(GOOD_BOOT);
        self.host.set_shutdown(GOOD_SHUTDOWN);
        self.host.intruders_leave();
        let answering = self.host.answering();
        for machine in self.host.living().into_iter().filter(|machine| !answering.contains(machine)) {
            self.host.kill_vmm(&machine.vm);
        }
        self.weather.disturb(Duration::ZERO);
    }
}
