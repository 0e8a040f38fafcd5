//! What goes wrong at the ports, by chance, and how often each failpoint was reached.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use clawpot_core::ports::{Op, Txn};
use clawpot_core::{Phase, VmRecord};
use clawpot_testkit::{Director, Injection, Method};
use clawpot_types::Kind;
use tokio::time::Instant;

use crate::chance::Chance;
use crate::trace::{Thing, Trace};

/// Where a call of a port can go wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Failpoint {
    /// The daemon dies before it.
    CrashBefore,
    /// The daemon dies after it, without an answer.
    CrashAfter,
    /// It is not done; of a look: Unknown.
    Error,
    /// It is done, and the answer is an error.
    LostAnswer,
    Slow,
    /// It is done, and answered late.
    SlowAnswer,
}

impl Failpoint {
    pub const ALL: [Self; 6] =
        [Self::CrashBefore, Self::CrashAfter, Self::Error, Self::LostAnswer, Self::Slow, Self::SlowAnswer];

    /// Without an effect, before and after are the same.
    #[must_use]
    pub const fn is_of(self, method: Method) -> bool {
        method.has_effect() || matches!(self, Self::CrashBefore | Self::Error | Self::Slow)
    }
}

/// Every place where something can go wrong. Nothing of control calls the store's watch: reads come from its projection.
#[must_use]
pub fn failpoints() -> Vec<(Method, Failpoint)> {
    let methods = Method::ALL.into_iter().filter(|method| *method != Method::StoreWatch);
    methods
        .flat_map(|method| Failpoint::ALL.into_iter().filter(move |at| at.is_of(method)).map(move |at| (method, at)))
        .collect()
}

/// Commits at which something can go wrong in a way of its own, beside every other: policies and admission act by them alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Commit {
    /// Admitted, and promised what its machine will hold.
    Create,
    /// Likewise.
    Start,
    /// Another time to live.
    Life,
    /// The time to live is over.
    Expiry,
    /// It ended, and its policy will start it again.
    RestartPlanned,
    /// Its policy starts it again.
    RestartBegun,
    Quarantine,
    Release,
    /// A volume is going to be made.
    VolumeBegun,
    /// Something is going to be done to it.
    VolumeHeld,
    /// It is done.
    VolumeReady,
    VolumeDoomed,
    VolumeGone,
}

impl Commit {
    pub const ALL: [Self; 13] = [
        Self::Create,
        Self::Start,
        Self::Life,
        Self::Expiry,
        Self::RestartPlanned,
        Self::RestartBegun,
        Self::Quarantine,
        Self::Release,
        Self::VolumeBegun,
        Self::VolumeHeld,
        Self::VolumeReady,
        Self::VolumeDoomed,
        Self::VolumeGone,
    ];

    /// What `txn` is if it is a volume's own. Its event tells.
    #[must_use]
    pub fn of_volume(txn: &Txn) -> Option<Self> {
        txn.events.iter().find_map(|event| match event.kind {
            "volume.create" | "volume.copy" => Some(Self::VolumeBegun),
            "volume.resize" | "volume.check" => Some(Self::VolumeHeld),
            "volume.ready" => Some(Self::VolumeReady),
            "volume.delete" => Some(Self::VolumeDoomed),
            "volume.gone" => Some(Self::VolumeGone),
            _ => None,
        })
    }

    /// What `txn` is; `before`: its VM's record as it is.
    #[must_use]
    pub fn of(txn: &Txn, before: Option<&VmRecord>) -> Option<Self> {
        let after = txn.ops.iter().find_map(|op| match op {
            Op::Put { key, value } if key.starts_with("vms/") => VmRecord::decode(value).ok(),
            _ => None,
        })?;
        let Some(before) = before else { return Some(Self::Create) };
        let told = |kind: &str| txn.events.iter().any(|event| event.kind == kind);
        match (before.restart.at, after.restart.at) {
            _ if told("vm.start") => Some(Self::Start),
            _ if told("vm.ttl") => Some(Self::Life),
            _ if told("vm.expire") => Some(Self::Expiry),
            _ if after.quarantine.is_some() => Some(Self::Quarantine),
            _ if before.quarantine.is_some() => Some(Self::Release),
            (None, Some(_)) => Some(Self::RestartPlanned),
            (Some(_), None) if after.phase == Phase::Preparing => Some(Self::RestartBegun),
            _ => None,
        }
    }
}

/// Each of those, in each way.
#[must_use]
pub fn commits() -> Vec<(Commit, Failpoint)> {
    Commit::ALL.into_iter().flat_map(|commit| Failpoint::ALL.map(|at| (commit, at))).collect()
}

/// How often something goes wrong, per 10,000 calls.
#[derive(Clone, Debug)]
pub struct Climate {
    rates: [u64; 6],
    /// One method that goes wrong more often than the others, and how often.
    focus: Option<(Method, u64)>,
    /// Likewise one commit.
    commit: Option<(Commit, u64)>,
    /// Longest delay.
    slowest: Duration,
}

impl Climate {
    pub const CALM: Self = Self { rates: [0; 6], focus: None, commit: None, slowest: Duration::ZERO };

    #[must_use]
    pub fn is_calm(&self) -> bool {
        self.rates == [0; 6] && self.focus.is_none() && self.commit.is_none()
    }

    /// Whether what goes wrong more often than other things is about volumes.
    #[must_use]
    pub fn is_of_volumes(&self) -> bool {
        use Commit::{VolumeBegun, VolumeDoomed, VolumeGone, VolumeHeld, VolumeReady};
        use Method::{VolumesCheck, VolumesCopy, VolumesCreate, VolumesGrow, VolumesRemove};
        let methods = [VolumesCheck, VolumesCopy, VolumesCreate, VolumesGrow, VolumesRemove];
        let commits = [VolumeBegun, VolumeHeld, VolumeReady, VolumeDoomed, VolumeGone];
        self.focus.is_some_and(|(method, _)| methods.contains(&method))
            || self.commit.is_some_and(|(commit, _)| commits.contains(&commit))
    }

    /// Or about times to live.
    #[must_use]
    pub fn is_of_lives(&self) -> bool {
        self.commit.is_some_and(|(commit, _)| matches!(commit, Commit::Life | Commit::Expiry))
    }

    /// A different mixture each time: a run in which everything fails finds less than runs in which some things do.
    #[must_use]
    pub fn drawn(chance: &mut Chance) -> Self {
        if chance.one_in(10) {
            return Self::CALM;
        }
        let mut rates = [0; 6];
        for (rate, strongest) in rates.iter_mut().zip([40, 40, 400, 300, 500, 500]) {
            if chance.one_in(2) {
                *rate = chance.between(1, strongest);
            }
        }
        let focus = chance.one_in(2).then(|| focused(chance, &Method::ALL, &RARE_METHODS)).flatten();
        let slowest = *chance.pick(&[50, 1_000, 30_000, 300_000]).unwrap_or(&50);
        let commit = chance.one_in(2).then(|| focused(chance, &Commit::ALL, &RARE_COMMITS)).flatten();
        Self { rates, focus, commit, slowest: Duration::from_millis(slowest) }
    }
}

/// Called so seldom that each way of theirs to go wrong would come once or never in the operations of a test.
const RARE_METHODS: [Method; 8] = [
    Method::VolumesCreate,
    Method::VolumesCopy,
    Method::VolumesCheck,
    Method::VolumesGrow,
    Method::VolumesRemove,
    Method::GuestShutdown,
    Method::ConsoleRead,
    Method::EventsWatch,
];
const RARE_COMMITS: [Commit; 6] =
    [Commit::VolumeHeld, Commit::VolumeDoomed, Commit::VolumeGone, Commit::Expiry, Commit::Quarantine, Commit::Release];

/// One of `all`, as often as not a rare one, and how often it goes wrong.
fn focused<T: Copy>(chance: &mut Chance, all: &[T], rare: &[T]) -> Option<(T, u64)> {
    let (from, rates) = if chance.one_in(2) { (rare, [2_000, 6_000, 9_000]) } else { (all, [500, 2_000, 6_000]) };
    Some((*chance.pick(from)?, *chance.pick(&rates)?))
}

/// How a call that is in focus goes wrong. From a crash most is learnt, and what goes wrong elsewhere is seldom one: twice.
fn ways(method: Method) -> Vec<Failpoint> {
    let ways = Failpoint::ALL.into_iter().chain([Failpoint::CrashBefore, Failpoint::CrashAfter]);
    ways.filter(|at| at.is_of(method)).collect()
}

/// Far more calls than all VMs of a run make at one instant.
const SPIN: u64 = 20_000;

/// Decides at every call.
pub struct Weather {
    trace: Arc<Trace>,
    state: Mutex<State>,
}

struct State {
    chance: Chance,
    climate: Climate,
    reached: BTreeMap<(Method, Failpoint), u64>,
    reached_commits: BTreeMap<(Commit, Failpoint), u64>,
    /// What the next transaction is.
    coming: Option<Commit>,
    calls: u64,
    /// Calls at one instant of virtual time.
    spinning: (Option<Instant>, u64),
    /// Until when the last of what went wrong lasts.
    rough_until: Option<Instant>,
}

impl std::fmt::Debug for Weather {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Weather").finish_non_exhaustive()
    }
}

impl Weather {
    #[must_use]
    pub fn new(seed: u64, trace: Arc<Trace>) -> Self {
        let state = State {
            chance: Chance::new(seed, 3),
            climate: Climate::CALM,
            reached: BTreeMap::new(),
            reached_commits: BTreeMap::new(),
            coming: None,
            calls: 0,
            spinning: (None, 0),
            rough_until: None,
        };
        Self { trace, state: Mutex::new(state) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn set(&self, climate: Climate) {
        self.lock().climate = climate;
    }

    /// Something other than a call goes wrong, for `time` from now.
    pub fn disturb(&self, time: Duration) {
        self.lock().disturb(time);
    }

    /// Whether nothing has gone wrong since `since`.
    #[must_use]
    pub fn calm_since(&self, since: Instant) -> bool {
        self.lock().rough_until.is_none_or(|until| until < since)
    }

    /// Whether all that went wrong is over: the last delay too.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.lock().rough_until.is_none_or(|until| until < Instant::now())
    }

    /// Whether nothing has ever gone wrong.
    #[must_use]
    pub fn always_calm(&self) -> bool {
        self.lock().rough_until.is_none()
    }

    #[must_use]
    pub fn reached(&self) -> BTreeMap<(Method, Failpoint), u64> {
        self.lock().reached.clone()
    }

    #[must_use]
    pub fn reached_commits(&self) -> BTreeMap<(Commit, Failpoint), u64> {
        self.lock().reached_commits.clone()
    }

    /// What the transaction is that is asked for now.
    pub fn comes(&self, commit: Option<Commit>) {
        self.lock().coming = commit;
    }

    #[must_use]
    pub fn calls(&self) -> u64 {
        self.lock().calls
    }
}

impl State {
    /// A task that never waits would keep the virtual clock where it is, for ever.
    fn count_call(&mut self) {
        self.calls += 1;
        let now = Some(Instant::now());
        self.spinning = if self.spinning.0 == now { (now, self.spinning.1 + 1) } else { (now, 0) };
        assert!(self.spinning.1 < SPIN, "{SPIN} calls of ports and no time went by: something spins");
    }

    fn disturb(&mut self, time: Duration) {
        let until = Instant::now() + time;
        self.rough_until = Some(self.rough_until.map_or(until, |known| known.max(until)));
    }

    fn drawn(&mut self, method: Method, commit: Option<Commit>) -> Option<Failpoint> {
        if let Some((focus, rate)) = self.climate.commit
            && Some(focus) == commit
            && self.chance.below(10_000) < rate
        {
            return self.chance.pick(&ways(method)).copied();
        }
        if let Some((focus, rate)) = self.climate.focus
            && focus == method
            && self.chance.below(10_000) < rate
        {
            return self.chance.pick(&ways(method)).copied();
        }
        let mut left = self.chance.below(10_000);
        for (at, rate) in Failpoint::ALL.into_iter().zip(self.climate.rates) {
            if left < rate {
                return Some(at).filter(|at| at.is_of(method));
            }
            left -= rate;
        }
        None
    }

    fn injection(&mut self, at: Failpoint) -> Injection {
        let kinds = [
            Kind::Internal,
            Kind::Unavailable,
            Kind::Exhausted,
            Kind::Timeout,
            Kind::FailedPrecondition,
            Kind::Corrupt,
            Kind::PermissionDenied,
        ];
        let kind = *self.chance.pick(&kinds).unwrap_or(&Kind::Internal);
        let most = u64::try_from(self.climate.slowest.as_micros()).unwrap_or(0).max(1);
        // Most delays are short.
        let most = if self.chance.one_in(8) { most } else { most.min(200_000) };
        let delay = Duration::from_micros(self.chance.between(1, most));
        match at {
            Failpoint::CrashBefore => Injection::CrashBefore,
            Failpoint::CrashAfter => Injection::CrashAfter,
            Failpoint::Error => Injection::Error(kind),
            Failpoint::LostAnswer => Injection::ErrorAfter(kind),
            Failpoint::Slow => Injection::Delay(delay),
            Failpoint::SlowAnswer => Injection::DelayAfter(delay),
        }
    }
}

impl Director for Weather {
    fn decide(&self, method: Method) -> Option<Injection> {
        let mut state = self.lock();
        state.count_call();
        let commit = if method == Method::StoreTxn { state.coming.take() } else { None };
        let at = state.drawn(method, commit)?;
        if let Some(commit) = commit {
            *state.reached_commits.entry((commit, at)).or_default() += 1;
        }
        let injection = state.injection(at);
        *state.reached.entry((method, at)).or_default() += 1;
        state.disturb(match injection {
            Injection::Delay(time) | Injection::DelayAfter(time) => time,
            _ => Duration::ZERO,
        });
        drop(state);
        self.trace.add(Thing::Injected(method, injection));
        Some(injection)
    }

    fn answered(&self, method: Method, error: Option<Kind>) {
        self.trace.add(Thing::Answered(method, error));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn effects_have_six_failpoints_and_looks_three() {
        let all = failpoints();
        let of = |method| all.iter().filter(|(known, _)| *known == method).count();
        assert_eq!((of(Method::VmmStart), of(Method::VmmInspect), of(Method::StoreWatch)), (6, 3, 0));
    }
}
