//! Network slots: for each VM a netns with taps, rules and a veth, under names that follow from a number.
//!
//! ```text
//!  guest eth0 ── tap0 ┐  netns cp<id>-<slot>      ┌ cp<id>-<slot> ── host ── the world
//!  172.31.255.2       ├─ rules: isolate, NAT ─ up0 ┤  rules: admit, NAT        resolver on lo
//!  guest eth1 ─ mgmt0 ┘  (the same in each)        └ veth /31
//! ```
//!
//! - [`instance`], [`claim`] which instance a state directory is, and its block of slots on this host
//! - [`address`], [`names`] what follows from block and slot: uids, addresses, names
//! - [`SlotNet`] the `Net` port: `driver` (doors) → `work` (one slot, to its end) → `slot` (the steps) → `kernel`;
//!   `warm` works ahead, `forget` ends connections, `table` keeps the host's rules, `rules` writes all rules, `original` keeps a slot's as the kernel has
//!   them, `renew` brings those of slots in use up to date, `mark` tells after a crash what is what
//!
//! Called by the server's `app.rs`; calls `host` for threads, processes and files.

pub mod address;
pub mod claim;
mod driver;
mod forget;
mod host;
pub mod instance;
mod kernel;
mod mark;
pub mod names;
mod original;
mod renew;
mod rules;
mod slot;
mod steps;
mod table;
mod warm;
mod work;

#[cfg(test)]
mod real;

pub use claim::{BLOCKS_DIR, Claim, HostFacts};
pub use driver::{Paths, ResolverSeat, SlotNet};
pub use host::host_facts;
pub use kernel::netns::NETNS_DIR;
pub use kernel::sysctl::ip_forward;
pub use kernel::tap::TUN_DEVICE;
