//! nftables rules as values. [`nft`] is the vocabulary, the others write sentences in it; only `kernel::nft` speaks them.
//!
//! - [`slot`] inside each netns: what isolates. The same text for every slot of an instance
//! - [`host`] the instance's one table on the host: what lets a slot talk at all, two elements for each

pub(crate) mod host;
pub(crate) mod nft;
pub(crate) mod slot;

use nft::Expr;

/// What no guest reaches: this network, private, shared (CGNAT), loopback, link-local (metadata services), protocol
/// assignments, benchmarks, multicast and everything above (IANA's special-purpose registry, less the documentation nets).
const DENIED: [([u8; 4], u8); 10] = [
    ([0, 0, 0, 0], 8),
    ([10, 0, 0, 0], 8),
    ([100, 64, 0, 0], 10),
    ([127, 0, 0, 0], 8),
    ([169, 254, 0, 0], 16),
    ([172, 16, 0, 0], 12),
    ([192, 0, 0, 0], 24),
    ([192, 168, 0, 0], 16),
    ([198, 18, 0, 0], 15),
    ([224, 0, 0, 0], 3),
];

pub(crate) const DNS: u16 = 53;

fn denied() -> Vec<Expr> {
    DENIED.map(|(address, length)| Expr::Prefix(address.into(), length)).into()
}

/// Whether no guest reaches it anyway.
pub(crate) fn is_denied(address: std::net::Ipv4Addr) -> bool {
    DENIED
        .into_iter()
        .any(|(net, length)| ipnet::Ipv4Net::new(net.into(), length).is_ok_and(|net| net.contains(&address)))
}
