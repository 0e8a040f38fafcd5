//! The daemon.
//!
//! - [`config`] settings · [`app`] the composition root: the only place that names a driver · [`api`] the doors
//! - [`socket`] Unix sockets · [`metrics`] · [`chance`] clock and randomness

mod api;
mod chance;
mod config;
mod metrics;
mod socket;

fn main() {}
