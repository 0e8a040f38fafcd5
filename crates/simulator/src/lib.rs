//! The whole control plane in virtual time: the real `core` and `control` over the fakes of `testkit`, everything drawn from a seed.
//!
//! - [`chance`] what is drawn · [`operation`] what clients ask for and what befalls the host · [`weather`] what goes wrong at the ports
//! - [`world`] the host, the disk, and one daemon after another · [`client`] who asks again, and hangs up · [`disk`] the store
//! - [`oracle`] looks at every commit · [`volumes`] what must be so of volumes · [`check`] compares records, host and disk at rest · [`trace`] what happened, and its hash
//! - [`run`] puts it together: rounds of operations, a rest after each, and in the end nothing may be left
//! - [`planted`] bugs that have to be found
//!
//! Architecture Invariant: one thread, tokio's paused clock, no hash map: the same seed gives the same trace.

pub mod chance;
pub mod check;
pub mod client;
pub mod disk;
pub mod operation;
pub mod oracle;
pub mod planted;
pub mod run;
pub mod trace;
pub mod volumes;
pub mod weather;
pub mod world;

pub use planted::Planted;
pub use run::{Report, Setup, run};
