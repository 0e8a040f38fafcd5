//! Use cases over the ports: what an RPC asks for becomes intent in the store; one runner per VM makes it so.
//!
//! - [`service`] one file per verb: checks, then one transaction, then a wake-up without data
//! - [`runner`] the only writer of a VM's phase: look, plan, one step, look again
//! - [`records`] the typed store and its projection in memory; publishes every change
//! - [`live`] what only this daemon's memory knows of a VM: its endpoint, its clients
//! - [`builds`] images of flakes, each in a VM that is made for it by [`service`] and always removed
//! - [`library`] images: what is done to them, and by whom
//! - [`adopt`] at start: every record gets its runner, unreadable ones are shown and left alone
//! - `keep` what has no owner goes, after a grace time · `strays` until then it keeps volumes from others
//!
//! Architecture Invariant: nothing here names a driver, reads a clock other than the port's, or iterates a hash map.

pub mod adopt;
pub mod builds;
pub mod deps;
mod keep;
pub mod library;
pub mod live;
pub mod records;
pub mod runner;
pub mod service;
mod strays;

pub use adopt::start;
pub use builds::{Build, BuildProgress, Builds, build_name};
pub use deps::{Deps, Settings, Vmms};
pub use library::Library;
pub use records::{Changed, Records, Row};
pub use service::Service;
