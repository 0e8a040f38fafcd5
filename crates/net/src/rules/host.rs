//! The instance's one table on the host. It enables: without a slot's two elements the slot has no traffic, and without
//! the table no slot has any. It touches packets of this instance's links only.

use clawpot_types::Slot;

use super::nft::{Element, Expr, Hook, Step, Transaction};
use super::{DNS, denied};
use crate::address::Block;
use crate::names::Names;

const FAMILY: &str = "inet";
/// Which link may use which address.
const SOURCES: &str = "slot_src";
/// What a link may do.
const EGRESS: &str = "slot_egress";
const OPEN: &str = "egress_open";

/// Bytes of a link's name in a set's key.
const IFNAMSIZ: usize = 16;

/// The whole table anew, with these slots' elements, in one transaction: nobody sees a moment without it.
pub(crate) fn replace(names: &Names, block: &Block, slots: impl IntoIterator<Item = Slot>) -> Transaction {
    let name = names.table();
    let mut rules = Transaction::default();
    // Adding it first makes deleting it never fail.
    rules.table(FAMILY, &name);
    rules.delete_table(FAMILY, &name);
    table(&mut rules, &name, names, block);
    for slot in slots {
        add_elements(&mut rules, &name, names, block, slot);
    }
    rules
}

pub(crate) fn remove(names: &Names) -> Transaction {
    let name = names.table();
    let mut rules = Transaction::default();
    rules.table(FAMILY, &name);
    rules.delete_table(FAMILY, &name);
    rules
}

/// What lets the slot talk, and without which it has no traffic: its address on its link, and what the link may do.
pub(crate) fn elements(names: &Names, block: &Block, slot: Slot) -> [Element; 2] {
    let mut link = names.slot(slot).into_bytes();
    link.resize(IFNAMSIZ, 0);
    let source = [&link[..], &block.slot_address(slot).octets()].concat();
    [Element { set: SOURCES, key: source, jump: None }, Element { set: EGRESS, key: link, jump: Some(OPEN) }]
}

fn keys(names: &Names, block: &Block, slot: Slot) -> (Expr, Expr) {
    let link = Expr::Text(names.slot(slot));
    (link.clone(), Expr::Concat(vec![link, block.slot_address(slot).into()]))
}

fn add_elements(rules: &mut Transaction, table: &str, names: &Names, block: &Block, slot: Slot) {
    let (link, source) = keys(names, block, slot);
    rules.existing(FAMILY, table).element(SOURCES, &source).jump_element(EGRESS, &link, OPEN);
}

fn table(rules: &mut Transaction, name: &str, names: &Names, block: &Block) {
    let links = Expr::Text(names.any_link());
    let from_slot = Step::Is(Expr::Meta("iifname"), links.clone());
    let to_slot = Step::Is(Expr::Meta("oifname"), links);
    let source = Expr::Concat(vec![Expr::Meta("iifname"), Expr::Field("ip", "saddr")]);
    let destination = || Expr::Field("ip", "daddr");
    let established = || Step::Is(Expr::Ct("state"), Expr::AnyOf(["established", "related"].map(Expr::text).into()));
    let words = |list: &[&str]| Expr::AnyOf(list.iter().copied().map(Expr::text).collect());
    let filter = |hook, priority| Hook { kind: "filter", hook, priority, policy: "accept", device: None };

    let mut table = rules.table(FAMILY, name);
    table
        .set(SOURCES, &["ifname", "ipv4_addr"], Vec::new())
        .chain(OPEN)
        .rule(OPEN, &[Step::Accept])
        .chain("refuse")
        .rule("refuse", &[Step::PerSecond(100), Step::Reject])
        .rule("refuse", &[Step::Drop])
        .verdict_map(EGRESS, "ifname");
    table
        .chain("raw_slot")
        .counted("raw_slot", "not IPv4", &[Step::IsNot(Expr::Meta("protocol"), Expr::text("ip")), Step::Drop])
        .counted("raw_slot", "spoof", &[Step::IsNot(source, Expr::Set(SOURCES)), Step::Drop])
        .base_chain("raw", filter("prerouting", -300))
        .rule("raw", &[from_slot.clone(), Step::Jump("raw_slot")]);
    table
        .chain("to_host")
        .rule("to_host", &[established(), Step::Accept])
        .rule(
            "to_host",
            &[
                Step::Is(destination(), block.resolver_address().into()),
                Step::Is(Expr::Meta("l4proto"), words(&["tcp", "udp"])),
                Step::Is(Expr::Field("th", "dport"), DNS.into()),
                Step::Accept,
            ],
        )
        .counted("to_host", "host", &[Step::Goto("refuse")])
        .base_chain("input", filter("input", 0))
        .rule("input", &[from_slot.clone(), Step::Jump("to_host")]);
    table
        .chain("from_slot")
        .counted("from_slot", "sibling", &[to_slot.clone(), Step::Goto("refuse")])
        .counted("from_slot", "private", &[Step::Is(destination(), Expr::AnyOf(denied())), Step::Goto("refuse")])
        .counted(
            "from_slot",
            "protocol",
            &[Step::IsNot(Expr::Meta("l4proto"), words(&["tcp", "udp", "icmp"])), Step::Drop],
        )
        .rule("from_slot", &[established(), Step::Accept])
        .counted("from_slot", "invalid", &[Step::Is(Expr::Ct("state"), Expr::text("invalid")), Step::Drop])
        .rule("from_slot", &[Step::Verdict(Expr::Meta("iifname"), EGRESS)])
        .counted("from_slot", "not admitted", &[Step::Drop])
        .chain("to_slot")
        .rule("to_slot", &[established(), Step::Accept])
        .counted("to_slot", "unasked", &[Step::Drop])
        .base_chain("forward", filter("forward", 0))
        .rule("forward", &[from_slot.clone(), Step::Jump("from_slot")])
        .rule("forward", &[to_slot, Step::Jump("to_slot")]);
    table
        .base_chain("post", Hook { kind: "nat", hook: "postrouting", priority: 100, policy: "accept", device: None })
        .rule("post", &[from_slot, Step::Masquerade]);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names() -> Names {
        Names::new("3f7a".parse().unwrap())
    }

    fn block() -> Block {
        Block { number: 2, range: "10.201.0.0/16".parse().unwrap() }
    }

    #[test]
    fn table_of_an_instance() {
        insta::assert_json_snapshot!(replace(&names(), &block(), [Slot(7)]).to_json());
    }

    #[test]
    fn two_elements_for_a_slot() {
        let [source, egress] = elements(&names(), &block(), Slot(7));
        assert_eq!(source.key, b"cp3f7a-7\0\0\0\0\0\0\0\0\x0a\xc9\x10\x0f");
        assert_eq!(egress.key, b"cp3f7a-7\0\0\0\0\0\0\0\0");
        assert_eq!((source.set, source.jump, egress.set, egress.jump), (SOURCES, None, EGRESS, Some(OPEN)));
    }
}
