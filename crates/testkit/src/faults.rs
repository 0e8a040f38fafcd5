//! What goes wrong, and when: every call of every fake passes through one [`Faults`].

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use clawpot_types::{Error, Kind, Result};
use tokio::sync::watch;

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
    EventsWatch,
}

impl Method {
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
}

/// Shared by all fakes of one world. Deterministic: it counts calls and knows no clock of its own.
#[derive(Debug)]
pub struct Faults {
    state: Mutex<State>,
    crashed: watch::Sender<bool>,
}

#[derive(Debug, Default)]
struct State {
    /// Remaining calls until each injection; 1: the next.
    planned: Vec<(Method, u32, Injection)>,
    always: BTreeMap<Method, Injection>,
    /// Remaining effects until the crash.
    crash_in: Option<u32>,
    /// Which daemon is alive; calls of earlier ones are never answered.
    life: u64,
    calls: Vec<Method>,
}

impl Default for Faults {
    fn default() -> Self {
        Self { state: Mutex::default(), crashed: watch::Sender::new(false) }
    }
}

impl Faults {
    #[must_use]
    pub fn new() -> Arc<Self> {
        Arc::default()
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

    /// Returns when the planned crash has come; forgets it.
    pub async fn crashed(&self) {
        let mut crashed = self.crashed.subscribe();
        // The sender lives in self.
        if crashed.wait_for(|crashed| *crashed).await.is_err() {
            std::future::pending::<()>().await;
        }
        self.crashed.send_replace(false);
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
        due.or_else(|| state.always.get(&method).copied()).map(Planned::Injected)
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
    pub(crate) async fn call<T>(&self, method: Method, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        match self.faults.next(self.life, method) {
            None => work(),
            Some(Planned::Dead) => std::future::pending().await,
            Some(Planned::Crash) => {
                drop(work());
                self.faults.crashed.send_replace(true);
                std::future::pending().await
            }
            Some(Planned::Injected(injection)) => match injection {
                Injection::Error(kind) => Err(injected(method, kind)),
                Injection::ErrorAfter(kind) => work().and(Err(injected(method, kind))),
                Injection::Hang => std::future::pending().await,
                Injection::HangAfter => {
                    drop(work());
                    std::future::pending().await
                }
                Injection::Delay(time) => {
                    tokio::time::sleep(time).await;
                    // It may have died meanwhile.
                    if self.faults.lock().life == self.life { work() } else { std::future::pending().await }
                }
            },
        }
    }
}

enum Planned {
    Injected(Injection),
    Crash,
    /// The caller's daemon is dead already.
    Dead,
}

fn injected(method: Method, kind: Kind) -> Error {
    Error::new(kind, format!("{method:?}: injected failure"))
}
