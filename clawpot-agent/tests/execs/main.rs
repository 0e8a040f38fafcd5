//! The service over real gRPC on a Unix socket, with real processes. Each test says so when it has no right to make cgroups.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod attach;
mod run;
mod support;
