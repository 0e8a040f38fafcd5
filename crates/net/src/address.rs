//! Numbers that follow from an instance's block: each slot's uid and its /31, and the resolver's address.

use std::net::Ipv4Addr;

use clawpot_types::{Error, Kind, Result, Slot};
use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};

/// Blocks on one host: 32 of 1,024 slots of two addresses fill a /16.
pub const BLOCKS: u32 = 32;

/// The first uid of the first block; far above what people, containers and subordinate ranges use.
pub const FIRST_UID: u32 = 1_900_000_000;

/// The block's last slot has no VM: its uid runs the resolver and its first address is the resolver's.
pub const RESOLVER_SLOT: Slot = Slot(Slot::PER_BLOCK - 1);

/// Two addresses for each slot: the host's end is even, the VM's is odd.
const PER_SLOT: u32 = 2;

/// Ranges to choose from, in order. All are in every guest's deny list.
/// 198.18.0.0/15 is for benchmarks of network gear: the least likely to be in use where somebody routed all of 10/8.
const CANDIDATES: [[u8; 2]; 10] =
    [[10, 201], [10, 202], [10, 203], [10, 211], [10, 222], [172, 29], [172, 28], [172, 27], [198, 18], [198, 19]];

/// Routes wider than this are "everywhere" (a default route, or the two halves a VPN sets) and overlap nothing in particular.
const SHORTEST_ROUTE: u8 = 8;

/// One instance's share of the host: which block of slots, in which /16.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Block {
    /// Below [`BLOCKS`].
    pub number: u32,
    /// A /16.
    pub range: Ipv4Net,
}

impl Block {
    /// The block's 2,048 addresses.
    #[must_use]
    pub fn addresses(&self) -> Ipv4Net {
        let first = self.range.network().to_bits() + self.number * Slot::PER_BLOCK * PER_SLOT;
        Ipv4Net::new_assert(Ipv4Addr::from_bits(first), 21)
    }

    /// Slots that a VM may have.
    #[must_use]
    pub fn slots(&self) -> u32 {
        RESOLVER_SLOT.0
    }

    /// `InvalidArgument`: not a slot for a VM.
    pub fn check(&self, slot: Slot) -> Result<()> {
        if slot < RESOLVER_SLOT {
            return Ok(());
        }
        Err(Error::new(
            Kind::InvalidArgument,
            format!("network slot {slot}: an instance has slots 0 to {}", self.slots() - 1),
        ))
    }

    /// uid and gid of whatever runs for the slot.
    #[must_use]
    pub fn uid(&self, slot: Slot) -> u32 {
        FIRST_UID + self.number * Slot::PER_BLOCK + slot.0
    }

    /// The host's end of the slot's veth, as the netns's gateway. Even.
    #[must_use]
    pub fn host_address(&self, slot: Slot) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.addresses().network().to_bits() + slot.0 * PER_SLOT)
    }

    /// The VM as the host sees it. Odd.
    #[must_use]
    pub fn slot_address(&self, slot: Slot) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.host_address(slot).to_bits() + 1)
    }

    /// Where the resolver listens: an address of the host's that only slots reach.
    #[must_use]
    pub fn resolver_address(&self) -> Ipv4Addr {
        self.host_address(RESOLVER_SLOT)
    }
}

/// The first range in which block `number` overlaps none of `taken`; `previous`, if it still may be used, before the others.
/// `taken`: addresses and routes of the host that are no instance's. `FailedPrecondition`: all overlap.
pub fn choose(number: u32, previous: Option<Ipv4Net>, taken: &[Ipv4Net]) -> Result<Block> {
    let candidates = CANDIDATES.map(|[a, b]| Ipv4Net::new_assert(Ipv4Addr::new(a, b, 0, 0), 16));
    let free = |block: &Block| overlaps(block, taken).next().is_none();
    let previous = previous.filter(|range| candidates.contains(range));
    previous.into_iter().chain(candidates).map(|range| Block { number, range }).find(free).ok_or_else(|| {
        let tried: Vec<String> = candidates.iter().map(ToString::to_string).collect();
        Error::new(
            Kind::FailedPrecondition,
            "choosing addresses for this server's VMs: the host has routes to all candidates",
        )
        .hint(format!("free one of {} on this host (see `ip route`)", tried.join(", ")))
    })
}

/// Those of `taken` that lie where the block does.
pub(crate) fn overlaps<'a>(block: &Block, taken: &'a [Ipv4Net]) -> impl Iterator<Item = &'a Ipv4Net> {
    let own = block.addresses();
    taken.iter().filter(move |route| route.prefix_len() >= SHORTEST_ROUTE && overlap(&own, route))
}

fn overlap(a: &Ipv4Net, b: &Ipv4Net) -> bool {
    a.contains(b) || b.contains(a)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    fn net(text: &str) -> Ipv4Net {
        text.parse().unwrap()
    }

    #[test]
    fn no_two_slots_of_any_two_blocks_share_anything() {
        let mut addresses = HashSet::new();
        let mut uids = HashSet::new();
        let range = net("10.201.0.0/16");
        for number in 0..BLOCKS {
            let block = Block { number, range };
            for n in 0..Slot::PER_BLOCK {
                let (host, own) = (block.host_address(Slot(n)), block.slot_address(Slot(n)));
                assert!(block.addresses().contains(&host) && block.addresses().contains(&own));
                assert!(host.octets()[3] % 2 == 0 && own.octets()[3] % 2 == 1);
                assert!(addresses.insert(host) && addresses.insert(own));
                assert!(uids.insert(block.uid(Slot(n))));
            }
        }
        assert_eq!(addresses.len(), 65_536);
        assert!(addresses.iter().all(|address| range.contains(address)));
    }

    #[test]
    fn known_values() {
        let block = Block { number: 2, range: net("10.201.0.0/16") };
        assert_eq!(block.host_address(Slot(7)), Ipv4Addr::new(10, 201, 16, 14));
        assert_eq!(block.slot_address(Slot(7)), Ipv4Addr::new(10, 201, 16, 15));
        assert_eq!(block.uid(Slot(7)), 1_900_002_055);
        assert_eq!(block.resolver_address(), Ipv4Addr::new(10, 201, 23, 254));
        assert!(block.check(Slot(1022)).is_ok());
        assert_eq!(block.check(Slot(1023)).unwrap_err().kind(), Kind::InvalidArgument);
    }

    #[test]
    fn a_range_in_use_is_passed_over() {
        let everywhere = [net("0.0.0.0/0"), net("0.0.0.0/1"), net("128.0.0.0/1")];
        assert_eq!(choose(0, None, &everywhere).unwrap().range, net("10.201.0.0/16"));
        // Only the block's own share counts: another instance may live in the same /16.
        assert_eq!(choose(1, None, &[net("10.201.0.0/21")]).unwrap().range, net("10.201.0.0/16"));
        assert_eq!(choose(0, None, &[net("10.201.3.0/24")]).unwrap().range, net("10.202.0.0/16"));
        assert_eq!(choose(0, None, &[net("10.0.0.0/8")]).unwrap().range, net("172.29.0.0/16"));
        assert_eq!(choose(0, Some(net("10.203.0.0/16")), &[]).unwrap().range, net("10.203.0.0/16"));
        assert_eq!(choose(0, Some(net("192.168.0.0/16")), &[]).unwrap().range, net("10.201.0.0/16"));
        let all = [net("10.0.0.0/8"), net("172.16.0.0/12"), net("198.18.0.0/15")];
        assert_eq!(choose(0, None, &all).unwrap_err().kind(), Kind::FailedPrecondition);
    }

    proptest::proptest! {
        #[test]
        fn what_is_chosen_overlaps_nothing(
            number in 0..BLOCKS,
            routes in proptest::collection::vec((0u32.., 0u8..=32), 0..40),
        ) {
            let taken: Vec<_> =
                routes.into_iter().map(|(a, len)| Ipv4Net::new_assert(Ipv4Addr::from_bits(a), len).trunc()).collect();
            if let Ok(block) = choose(number, None, &taken) {
                let own = block.addresses();
                for route in taken.iter().filter(|route| route.prefix_len() >= SHORTEST_ROUTE) {
                    for address in [own.network(), own.broadcast(), block.resolver_address()] {
                        proptest::prop_assert!(!route.contains(&address));
                    }
                }
            }
        }
    }
}
