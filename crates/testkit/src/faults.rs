//! What goes wrong, and when: every call of every fake passes through one [`Faults`].

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use clawpot_types::{Error, Kind, Result};
use tokio::sync::Notify;

/// The methods of the ports that have an effect or take a look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Method {
    ImagesResolve,
    ImagesLook,
    ImagesEnsure,
    ImagesLookDisk,
    ImagesCreateDisk,
    ImagesRemoveDisk,
    NetLook,
    NetEnsure,
    NetRemove,
    NetList,
    VmmPrepare,
    VmmStart,
    VmmAttach,
    VmmInspect,
    VmmStop,
    VmmDestroy,
    VmmList,
    ConsoleTail,
    ConsoleRead,
    ConsoleLook,
    ConsoleErase,
    GuestHello,
    GuestExec,
    GuestShutdown,
    StoreGet,
    StoreList,
    StoreTxn,
    StoreWatch,
    EventsList,
    RoomLook,
    EventsWatch,
    VolumesLook,
    VolumesCreate,
    VolumesCopy,
    VolumesCheck,
    VolumesGrow,
    VolumesRemove,
    VolumesList,
}

impl Method {
    pub const ALL: [Self; 38] = [
        Self::ImagesResolve,
        Self::ImagesLook,
        Self::ImagesEnsure,
        Self::ImagesLookDisk,
        Self::ImagesCreateDisk,
        Self::ImagesRemoveDisk,
        Self::NetLook,
        Self::NetEnsure,
        Self::NetRemove,
        Self::NetList,
        Self::VmmPrepare,
        Self::VmmStart,
        Self::VmmAttach,
        Self::VmmInspect,
        Self::VmmStop,
        Self::VmmDestroy,
        Self::VmmList,
        Self::ConsoleTail,
        Self::ConsoleRead,
        Self::ConsoleLook,
        Self::ConsoleErase,
        Self::GuestHello,
        Self::GuestExec,
        Self::GuestShutdown,
        Self::StoreGet,
        Self::StoreList,
        Self::StoreTxn,
        Self::StoreWatch,
        Self::EventsList,
        Self::EventsWatch,
        Self::RoomLook,
        Self::VolumesLook,
        Self::VolumesCreate,
        Self::VolumesCopy,
        Self::VolumesCheck,
        Self::VolumesGrow,
        Self::VolumesRemove,
        Self::VolumesList,
    ];

    /// The steps of a VM's life on the host, each of which can fail or be the last before a crash.
    pub const STEPS: [Self; 12] = [
        Self::ImagesEnsure,
        Self::ImagesCreateDisk,
        Self::NetEnsure,
        Self::VmmPrepare,
        Self::VmmStart,
        Self::VmmAttach,
        Self::GuestHello,
        Self::GuestShutdown,
        Self::VmmStop,
        Self::VmmDestroy,
        Self::NetRemove,
        Self::ImagesRemoveDisk,
    ];

    /// The looks that facts are made of.
    pub const LOOKS: [Self; 5] =
        [Self::ImagesLook, Self::ImagesLookDisk, Self::NetLook, Self::VmmInspect, Self::ConsoleLook];

    /// Whether the world may be another one afterwards; a crash is tried after each of these.
    #[must_use]
    pub const fn has_effect(self) -> bool {
        matches!(
            self,
            Self::ImagesEnsure
                | Self::ImagesCreateDisk
                | Self::ImagesRemoveDisk
                | Self::NetEnsure
                | Self::NetRemove
                | Self::VmmPrepare
                | Self::VmmStart
                | Self::VmmAttach
                | Self::VmmStop
                | Self::VmmDestroy
                | Self::ConsoleErase
                | Self::GuestHello
                | Self::GuestShutdown
                | Self::StoreTxn
                | Self::VolumesCreate
                | Self::VolumesCopy
                | Self::VolumesCheck
                | Self::VolumesGrow
                | Self::VolumesRemove
        )
    }
}

/// What happens instead of a call, or after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Injection {
    /// Nothing is done, and it fails.
    Error(Kind),
    /// It is done, and fails all the same: the answer was lost.
    ErrorAfter(Kind),
    /// Nothing is done, and it never returns.
    Hang,
    /// It is done, and never returns.
    HangAfter,
    /// It takes that long, and is done then.
    Delay(Duration),
    /// It is done at once, and is answered that much later.
    DelayAfter(Duration),
    /// The daemon dies before anything is done.
    CrashBefore,
    /// It is done, and the daemon dies before it hears so.
    CrashAfter,
}

/// Is asked at every call that a living daemon makes what shall go wrong, and told how it was answered. A simulator's way to
/// have everything go wrong by chance.
pub trait Director: Send + Sync {
    fn decide(&self, method: Method) -> Option<Injection>;

    /// `None`: it was done. Not told of calls that are never answered.
    fn answered(&self, method: Method, error: Option<Kind>);
}

/// Shared by all fakes of one world. Deterministic: it counts calls and knows no clock of its own.
pub struct Faults {
    state: Mutex<State>,
    crashed: Notify,
    director: OnceLock<Arc<dyn Director>>,
}

impl std::fmt::Debug for Faults {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Faults").field("state", &self.state).finish_non_exhaustive()
    }
}

#[derive(Debug, Default)]
struct State {
    /// Remaining calls until each injection; 1: the next.
    planned: Vec<(Method, u32, Injection)>,
    always: BTreeMap<Method, Injection>,
    /// Remaining effects until the crash.
    crash_in: Option<u32>,
    /// One has come, and nobody was told yet.
    crashed: bool,
    /// Which daemon is alive; calls of earlier ones are never answered.
    life: u64,
    calls: Vec<Method>,
}

impl Default for Faults {
    fn default() -> Self {
        Self { state: Mutex::default(), crashed: Notify::new(), director: OnceLock::new() }
    }
}

impl Faults {
    #[must_use]
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// From now on `director` decides wherever nothing was planned. The first one stays.
    pub fn direct(&self, director: Arc<dyn Director>) {
        self.director.get_or_init(|| director);
    }

    /// At the `nth` call of `method` from now (1: the next), once.
    pub fn at(&self, method: Method, nth: u32, injection: Injection) {
        self.lock().planned.push((method, nth.max(1), injection));
    }

    /// At every call of `method`, until [`Self::heal`].
    pub fn always(&self, method: Method, injection: Injection) {
        self.lock().always.insert(method, injection);
    }

    /// Nothing planned for `method` happens any more.
    pub fn heal(&self, method: Method) {
        let mut state = self.lock();
        state.always.remove(&method);
        state.planned.retain(|(planned, ..)| *planned != method);
    }

    /// The daemon dies in the `nth` call with an effect from now: the effect is there, the answer never comes, and
    /// nothing that this daemon still does has an effect. Wait for [`Self::crashed`] and build the next one.
    pub fn crash_at_effect(&self, nth: u32) {
        self.lock().crash_in = Some(nth.max(1));
    }

    /// `kill -9`, now: nothing that the daemon still does has an effect, and no crash is planned any more.
    pub fn kill_daemon(&self) {
        let mut state = self.lock();
        state.crash_in = None;
        state.life += 1;
    }

    /// As [`Self::kill_daemon`], and whoever waits in [`Self::crashed`] is told.
    pub fn crash(&self) {
        self.kill_daemon();
        self.fell();
    }

    /// Returns when the planned crash has come; forgets it.
    pub async fn crashed(&self) {
        loop {
            let mut crashed = std::pin::pin!(self.crashed.notified());
            crashed.as_mut().enable();
            if std::mem::take(&mut self.lock().crashed) {
                return;
            }
            crashed.await;
        }
    }

    fn fell(&self) {
        self.lock().crashed = true;
        self.crashed.notify_waiters();
    }

    /// Whether a planned crash is still to come.
    #[must_use]
    pub fn crash_is_planned(&self) -> bool {
        self.lock().crash_in.is_some()
    }

    /// The line of the daemon that lives now.
    #[must_use]
    pub fn line(self: &Arc<Self>) -> Line {
        let life = self.lock().life;
        Line { faults: Arc::clone(self), life }
    }

    /// Every call so far, in order.
    #[must_use]
    pub fn calls(&self) -> Vec<Method> {
        self.lock().calls.clone()
    }

    /// How often `method` was called.
    #[must_use]
    pub fn count(&self, method: Method) -> usize {
        self.lock().calls.iter().filter(|called| **called == method).count()
    }

    fn next(&self, life: u64, method: Method) -> Option<Planned> {
        let mut state = self.lock();
        if state.life != life {
            return Some(Planned::Dead);
        }
        state.calls.push(method);
        if let Some(left) = state.crash_in.filter(|_| method.has_effect()) {
            state.crash_in = (left > 1).then(|| left - 1);
            if left == 1 {
                state.life += 1;
                return Some(Planned::Crash);
            }
        }
        let mut due = None;
        for (planned, left, injection) in &mut state.planned {
            if *planned == method {
                *left -= 1;
                if *left == 0 && due.is_none() {
                    due = Some(*injection);
                }
            }
        }
        state.planned.retain(|(_, left, _)| *left > 0);
        let due = due.or_else(|| state.always.get(&method).copied());
        drop(state);
        due.or_else(|| self.director.get().and_then(|director| director.decide(method))).map(Planned::Injected)
    }

    fn tell<T>(&self, method: Method, outcome: Result<T>) -> Result<T> {
        if let Some(director) = self.director.get() {
            director.answered(method, outcome.as_ref().err().map(Error::kind));
        }
        outcome
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The way of one daemon's calls. After its death they are never answered, whoever still makes them.
#[derive(Clone, Debug)]
pub struct Line {
    faults: Arc<Faults>,
    life: u64,
}

impl Line {
    /// A call: `work` with whatever was planned for it.
    pub async fn call<T>(&self, method: Method, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let outcome = match self.faults.next(self.life, method) {
            None => work(),
            Some(Planned::Dead) => std::future::pending().await,
            Some(Planned::Crash) => {
                drop(work());
                self.faults.fell();
                std::future::pending().await
            }
            Some(Planned::Injected(injection)) => self.injected(method, injection, work).await,
        };
        self.faults.tell(method, outcome)
    }

    async fn injected<T>(
        &self,
        method: Method,
        injection: Injection,
        work: impl FnOnce() -> Result<T> + Send,
    ) -> Result<T> {
        match injection {
            Injection::Error(kind) => Err(failure(method, kind)),
            Injection::ErrorAfter(kind) => work().and(Err(failure(method, kind))),
            Injection::Hang => std::future::pending().await,
            Injection::HangAfter => {
                drop(work());
                std::future::pending().await
            }
            Injection::Delay(time) => {
                self.sleep(time).await;
                work()
            }
            Injection::DelayAfter(time) => {
                let outcome = work();
                self.sleep(time).await;
                outcome
            }
            Injection::CrashBefore => {
                self.faults.crash();
                std::future::pending().await
            }
            Injection::CrashAfter => {
                drop(work());
                self.faults.crash();
                std::future::pending().await
            }
        }
    }

    /// Never returns when the daemon died meanwhile.
    async fn sleep(&self, time: Duration) {
        tokio::time::sleep(time).await;
        if self.faults.lock().life != self.life {
            std::future::pending().await
        }
    }
}

enum Planned {
    Injected(Injection),
    Crash,
    /// The caller's daemon is dead already.
    Dead,
}

fn failure(method: Method, kind: Kind) -> Error {
    Error::new(kind, format!("{method:?}: injected failure"))
}
