//! The kernel's doors: each function does one thing and decides nothing. All block, for microseconds to a few milliseconds.
//!
//! - [`netlink`] one socket, requests and dumps
//! - [`link`] links, addresses, neighbours, routes
//! - [`look`] what the host has of those
//! - [`netns`] namespaces under names that `ip netns` knows
//! - [`tap`] the taps that VMMs open
//! - [`sysctl`] settings of the calling thread's namespace
//! - [`conntrack`] forgetting an address's connections
//! - [`nfnetlink`] elements of sets, and copies of rules
//! - [`nft`] rules; the only one that runs a program, and async

pub(crate) mod conntrack;
pub(crate) mod link;
pub(crate) mod look;
pub(crate) mod netlink;
pub(crate) mod netns;
pub(crate) mod nfnetlink;
pub(crate) mod nft;
pub(crate) mod sysctl;
pub(crate) mod tap;
