//! What tests stand on: fakes of every port over one host that is not there, and the suites that fakes and drivers both pass.
//!
//! - [`faults`] what goes wrong and when; every call of every fake passes through it
//! - [`host`] the shared inventory: [`FakeHost::left_behind`], [`FakeHost::violations`]
//! - [`images`], [`net`], [`vmm`], [`guest`], [`room`], [`volumes`] the ports over it; [`store`] `StateStore` and `EventLog`; [`time`] `Clock` and `Ids`
//! - [`samples`] records to begin with
//! - [`conformance`] the contract of `StateStore` and `EventLog` as a suite
//!
//! Deterministic: no wall clock, no randomness, no HashMap; time is tokio's paused clock.

pub mod conformance;
pub mod faults;
pub mod guest;
pub mod host;
pub mod images;
pub mod net;
pub mod room;
pub mod samples;
pub mod store;
pub mod time;
pub mod vmm;
pub mod volumes;

pub use faults::{Director, Faults, Injection, Line, Method};
pub use guest::FakeGuest;
pub use host::{Boot, FakeHost, Shutdown};
pub use images::FakeImages;
pub use net::FakeNet;
pub use room::FakeRoom;
pub use store::FakeStore;
pub use time::{FakeClock, FakeIds};
pub use vmm::{FakeConsole, FakeVmm};
pub use volumes::FakeVolumes;
