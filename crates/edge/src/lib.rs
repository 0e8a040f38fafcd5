//! The egress process and what the server needs to keep one. Its first room is the resolver: the guests' name server, a
//! small process without privileges that outlives the server and forwards to the host's own resolvers.
//!
//! ```text
//!  guest ─► 172.31.255.1:53 ─(the netns's NAT)─► the instance's address:53 ─► clawpot-edge ─► /etc/resolv.conf's servers
//! ```
//!
//! - [`resolver`] what runs in the process: `front` (sockets) → `answer` (one query) → `upstream` (the host's servers);
//!   `limits` keeps one guest from taking all
//! - [`keeper`] the server's side: bind, spawn, find again, replace, remove
//! - [`log`] the process's log, which stays small by itself

pub mod keeper;
pub mod log;
pub mod resolver;

pub use keeper::{Kept, Resolver};
