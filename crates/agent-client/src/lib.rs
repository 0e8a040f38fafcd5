//! The host's side of the guest agent: the `Guest` port over gRPC.
//!
//! - [`dial`] one HTTP/2 connection to one machine, by vsock or by TCP inside its netns
//! - [`client`] [`AgentClient`]: the port, and the connections it keeps
//! - [`builder`] [`BuilderClient`]: the `BuilderGuest` port, lines of JSON to a builder VM
//! - [`gather`] small writes that follow each other leave as one packet
//! - [`exec`] frames as messages, each checked: the guest is hostile
//!
//! Called through the port alone ([`check_output`] and [`check_hello`] by the fuzzer too); calls `clawpot-host` for sockets in other namespaces.

mod builder;
mod client;
mod dial;
mod exec;
mod gather;

pub use builder::BuilderClient;
pub use client::{AgentClient, hello as check_hello};
pub use exec::{Offsets, output as check_output};
