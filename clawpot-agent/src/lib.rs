//! The guest house: PID 1 of every VM, reached by the host over gRPC (`clawpot.agent.v1`).
//!
//! `main.rs` boots the machine and serves; everything but [`boot`] and [`shutdown`] also runs in an ordinary process.
//!
//! - [`boot`] from the kernel's first process to a Debian (or other) root with network and identity
//! - [`listen`] where the host comes in; [`server`] the gRPC service; [`hello`] its first call
//! - [`exec`] processes with an id; [`reaper`] the one owner of `waitpid`; [`user`] passwd and group by hand
//! - [`builder`] nix for the host, where the image says so, on a port of its own
//! - [`shutdown`] from SIGTERM to the end of the machine; [`console`] what is said before and beside all that

pub mod boot;
pub mod builder;
pub mod console;
pub mod exec;
pub mod hello;
pub mod listen;
pub mod reaper;
pub mod server;
pub mod shutdown;
pub mod user;

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// A lock whose holder panicked is still a lock: nothing here leaves its data half changed over a call that can panic.
pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Time since the kernel started, on its monotonic clock.
#[must_use]
pub fn since_kernel_start() -> Duration {
    Duration::try_from(rustix::time::clock_gettime(rustix::time::ClockId::Monotonic)).unwrap_or_default()
}

/// As the protocol counts; more than 584,000 years are not told apart.
#[must_use]
pub fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
