//! Execs: processes with an id, which outlive the streams that are attached to them.
//!
//! - [`table`] all of them by id; start, find, forget, their bounds
//! - [`request`] what is asked for, checked → a plan; [`spawn`] the plan → a process; [`cgroup`], [`pty`], [`io`] what it gets
//! - [`resource`] one exec: rings, stdin, end, attachment; [`ring`] a bounded run of bytes
//! - `driver` the task behind an exec; [`attachment`] the two directions of a stream

pub mod attachment;
pub mod cgroup;
mod driver;
mod io;
mod pty;
mod request;
mod resource;
pub mod ring;
mod spawn;
pub mod table;

pub use cgroup::Cgroups;
pub use request::{failed, shown};
pub use spawn::FileLimit;
pub use table::{Shared, Surroundings};

/// How long a lost caller is waited for in production: a restart of the server takes a few seconds.
pub const PATIENCE: std::time::Duration = std::time::Duration::from_secs(30);
