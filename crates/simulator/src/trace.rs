//! What happened, in order: its hash always, its last lines for whoever has to understand a failure.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use clawpot_core::Phase;
use clawpot_testkit::{Injection, Method};
use clawpot_types::{Kind, Revision, VmId};
use tokio::time::Instant;

/// Things kept for a failure's report.
const KEPT: usize = 400;

/// One thing that happened.
#[derive(Clone, Debug)]
pub enum Thing {
    /// What a client asked for, or what befell the host.
    Operation(String),
    Injected(Method, Injection),
    Answered(Method, Option<Kind>),
    /// A VM's row was committed; `None`: deleted.
    Committed(Revision, VmId, Option<Phase>),
    Told(String),
}

#[derive(Debug)]
pub struct Trace {
    begun: Instant,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    hash: u64,
    count: u64,
    /// With the microseconds since the beginning.
    last: VecDeque<(u64, Thing)>,
    keep: usize,
}

impl Trace {
    /// `whole`: everything is kept, not only the end.
    #[must_use]
    pub fn new(whole: bool) -> Self {
        let keep = if whole { usize::MAX } else { KEPT };
        // FNV-1a's offset basis.
        let inner = Inner { hash: 0xcbf2_9ce4_8422_2325, count: 0, last: VecDeque::new(), keep };
        Self { begun: Instant::now(), inner: Mutex::new(inner) }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn add(&self, thing: Thing) {
        let at = u64::try_from(self.begun.elapsed().as_micros()).unwrap_or(u64::MAX);
        let mut inner = self.lock();
        inner.count += 1;
        inner.take(&at.to_le_bytes());
        match &thing {
            Thing::Operation(text) => inner.take_words(1, text),
            Thing::Injected(method, injection) => inner.take_words(2, &format!("{method:?}{injection:?}")),
            Thing::Answered(method, kind) => inner.take(&[3, number(*method), kind.map_or(255, kind_number)]),
            Thing::Committed(revision, vm, phase) => {
                inner.take(&revision.0.to_le_bytes());
                inner.take_words(4, vm.as_str());
                inner.take(phase.map_or("gone", Phase::as_str).as_bytes());
            }
            Thing::Told(text) => inner.take_words(5, text),
        }
        if inner.last.len() >= inner.keep {
            inner.last.pop_front();
        }
        inner.last.push_back((at, thing));
    }

    #[must_use]
    pub fn hash(&self) -> u64 {
        self.lock().hash
    }

    /// How many things happened.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.lock().count
    }

    /// What is kept, a line each.
    #[must_use]
    pub fn lines(&self) -> Vec<String> {
        self.lock().last.iter().map(|(at, thing)| format!("{:>12.3} ms  {}", ms(*at), words(thing))).collect()
    }
}

impl Inner {
    fn take(&mut self, bytes: &[u8]) {
        for byte in bytes {
            // FNV-1a's prime.
            self.hash = (self.hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }

    fn take_words(&mut self, tag: u8, text: &str) {
        self.take(&[tag]);
        self.take(text.as_bytes());
    }
}

fn number(method: Method) -> u8 {
    let at = Method::ALL.iter().position(|known| *known == method);
    at.and_then(|at| u8::try_from(at).ok()).unwrap_or(u8::MAX)
}

fn kind_number(kind: Kind) -> u8 {
    // Their order is the order of their declaration.
    let all = [
        Kind::InvalidArgument,
        Kind::NotFound,
        Kind::AlreadyExists,
        Kind::Conflict,
        Kind::FailedPrecondition,
        Kind::Exhausted,
        Kind::Unavailable,
        Kind::Unsupported,
        Kind::Timeout,
        Kind::Corrupt,
        Kind::PermissionDenied,
        Kind::Cancelled,
        Kind::Compacted,
        Kind::Internal,
    ];
    all.iter().position(|known| *known == kind).and_then(|at| u8::try_from(at).ok()).unwrap_or(u8::MAX)
}

#[expect(clippy::cast_precision_loss, reason = "for reading: a run lasts some virtual days, 2^53 µs are 285 years")]
fn ms(micros: u64) -> f64 {
    micros as f64 / 1000.0
}

fn words(thing: &Thing) -> String {
    match thing {
        Thing::Operation(text) => format!("── {text}"),
        Thing::Injected(method, injection) => format!("   {method:?}: {injection:?} injected"),
        Thing::Answered(method, None) => format!("   {method:?}: done"),
        Thing::Answered(method, Some(kind)) => format!("   {method:?}: {kind:?}"),
        Thing::Committed(revision, vm, Some(phase)) => format!("   revision {revision}: VM {vm} is {phase}"),
        Thing::Committed(revision, vm, None) => format!("   revision {revision}: VM {vm} is forgotten"),
        Thing::Told(text) => format!("   {text}"),
    }
}
