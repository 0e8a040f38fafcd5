//! The rules inside a slot's netns. They isolate by themselves: whatever becomes of the host's rules, a guest reaches
//! public addresses and the resolver, and nothing else. No other tool knows of these tables, so none flushes them.

use std::net::Ipv4Addr;

use clawpot_types::guest::{
    GATEWAY_ADDRESS, GATEWAY_MAC, GUEST_ADDRESS, GUEST_MAC, MANAGEMENT_ADDRESS, MANAGEMENT_HOST_ADDRESS,
    MANAGEMENT_HOST_MAC, MANAGEMENT_MAC, MANAGEMENT_TAP, TAP, mac_text,
};

use super::nft::{Expr, Hook, Step, Table, Transaction};
use super::{DNS, denied};
use crate::address::Block;
use crate::slot::UPLINK;

/// Both tables of the netns.
const TABLE: &str = "clawpot";

/// Open connections of one slot: well above what a busy build needs, well below a host's table of 65,536 and up. Each of
/// them is one of the host's too, so this keeps that from being filled.
pub(crate) const CONNECTIONS: u32 = 4096;

/// Frames of ARP a second, and pings to the gateway: a guest needs one now and then.
const ARP_PER_SECOND: u32 = 20;
const PINGS_PER_SECOND: u32 = 10;
/// Refusals told to the guest in a second; more are silent.
const REFUSALS_PER_SECOND: u32 = 100;

/// The same for every slot of `block`. `host`: the host's own addresses, which a public one of would else let through.
pub(crate) fn ruleset(block: &Block, host: &[Ipv4Addr]) -> Transaction {
    let mut rules = Transaction::default();
    guard(&mut rules.table("netdev", TABLE));
    let mut table = rules.table("ip", TABLE);
    table.set("host", &["ipv4_addr"], host.iter().copied().map(Expr::Address).collect());
    translate(&mut table, block);
    refuse(&mut table);
    input(&mut table);
    forward(&mut table, block);
    output(&mut table);
    rules
}

/// `rules` in place of whatever the namespace has of these tables, in one transaction.
pub(crate) fn instead(rules: &Transaction) -> Transaction {
    let mut all = Transaction::default();
    for family in ["netdev", "ip"] {
        // Adding it first makes deleting it never fail.
        all.table(family, TABLE);
        all.delete_table(family, TABLE);
    }
    all.append(rules);
    all
}

/// What may come out of a tap at all, by frame; the rest (IPv6, VLANs, DHCP, multicast, other people's addresses) is dropped
/// before anything looks at it.
fn guard(table: &mut Table<'_>) {
    let hook = |device| Hook { kind: "filter", hook: "ingress", priority: -500, policy: "drop", device: Some(device) };
    let (guest, gateway) = (mac(GUEST_MAC), mac(GATEWAY_MAC));
    table
        .base_chain("guard", hook(TAP))
        .counted("guard", "mac", &[Step::IsNot(ether("saddr"), guest.clone()), Step::Drop])
        .rule(
            "guard",
            &[
                Step::Is(ether("type"), Expr::text("ip")),
                Step::Is(ether("daddr"), gateway),
                Step::Is(ip("saddr"), GUEST_ADDRESS.into()),
                Step::Accept,
            ],
        )
        .rule("guard", &asks_for(GUEST_MAC, GUEST_ADDRESS, GATEWAY_ADDRESS))
        .counted("guard", "guard", &[Step::Drop]);
    table
        .base_chain("guard_management", hook(MANAGEMENT_TAP))
        .counted("guard_management", "mac", &[Step::IsNot(ether("saddr"), mac(MANAGEMENT_MAC)), Step::Drop])
        .rule(
            "guard_management",
            &[
                Step::Is(ether("type"), Expr::text("ip")),
                Step::Is(ether("daddr"), mac(MANAGEMENT_HOST_MAC)),
                Step::Is(ip("saddr"), MANAGEMENT_ADDRESS.into()),
                Step::Is(ip("daddr"), MANAGEMENT_HOST_ADDRESS.into()),
                tcp(),
                Step::Accept,
            ],
        )
        .rule("guard_management", &asks_for(MANAGEMENT_MAC, MANAGEMENT_ADDRESS, MANAGEMENT_HOST_ADDRESS))
        .counted("guard_management", "guard", &[Step::Drop]);
}

/// ARP, only "who has `wanted`" by the one pair of addresses that the guest has.
fn asks_for(own_mac: [u8; 6], own: Ipv4Addr, wanted: Ipv4Addr) -> Vec<Step> {
    let arp = |field| Expr::Field("arp", field);
    vec![
        Step::Is(ether("type"), Expr::text("arp")),
        Step::Is(arp("htype"), Expr::Number(1)),
        Step::Is(arp("ptype"), Expr::text("ip")),
        Step::Is(arp("operation"), Expr::text("request")),
        Step::Is(arp("saddr ether"), mac(own_mac)),
        Step::Is(arp("saddr ip"), own.into()),
        Step::Is(arp("daddr ip"), wanted.into()),
        Step::PerSecond(ARP_PER_SECOND),
        Step::Accept,
    ]
}

/// The guest's constant address to and from the slot's own.
fn translate(table: &mut Table<'_>, block: &Block) {
    let nat = |hook, priority| Hook { kind: "nat", hook, priority, policy: "accept", device: None };
    table
        .base_chain("pre", nat("prerouting", -100))
        .rule("pre", &[from(UPLINK), Step::Dnat(GUEST_ADDRESS)])
        .rule(
            "pre",
            &[
                from(TAP),
                Step::Is(ip("daddr"), GATEWAY_ADDRESS.into()),
                tcp_or_udp(),
                Step::Is(Expr::Field("th", "dport"), DNS.into()),
                Step::Dnat(block.resolver_address()),
            ],
        )
        .base_chain("post", nat("postrouting", 100))
        .rule("post", &[to(UPLINK), Step::Masquerade])
        .rule("post", &[to(TAP), Step::Snat(GATEWAY_ADDRESS)]);
}

fn refuse(table: &mut Table<'_>) {
    table
        .chain("refuse")
        .rule("refuse", &[Step::PerSecond(REFUSALS_PER_SECOND), Step::Reject])
        .rule("refuse", &[Step::Drop]);
}

fn filter(hook: &'static str) -> Hook {
    Hook { kind: "filter", hook, priority: 0, policy: "drop", device: None }
}

fn input(table: &mut Table<'_>) {
    table
        .base_chain("input", filter("input"))
        .rule("input", &[established(), Step::Accept])
        .rule(
            "input",
            &[
                from(TAP),
                Step::Is(ip("daddr"), GATEWAY_ADDRESS.into()),
                Step::Is(Expr::Field("icmp", "type"), Expr::text("echo-request")),
                Step::PerSecond(PINGS_PER_SECOND),
                Step::Accept,
            ],
        )
        .counted("input", "input", &[Step::Drop]);
}

fn forward(table: &mut Table<'_>, block: &Block) {
    let out = |more: Vec<Step>| [vec![from(TAP), to(UPLINK)], more].concat();
    let protocols = Expr::AnyOf(["tcp", "udp", "icmp"].map(Expr::text).into());
    let own = block.addresses();
    table
        .base_chain("forward", filter("forward"))
        .counted("forward", "invalid", &[Step::Is(Expr::Ct("state"), Expr::text("invalid")), Step::Drop])
        .rule("forward", &[established(), Step::Accept])
        .counted("forward", "connections", &out(vec![Step::ConnectionsOver(CONNECTIONS), Step::Drop]))
        .rule(
            "forward",
            &out(vec![
                Step::Is(ip("daddr"), block.resolver_address().into()),
                tcp_or_udp(),
                Step::Is(Expr::Field("th", "dport"), DNS.into()),
                Step::Accept,
            ]),
        )
        .counted("forward", "private", &out(vec![Step::Is(ip("daddr"), Expr::AnyOf(denied())), Step::Goto("refuse")]))
        .counted("forward", "host", &out(vec![Step::Is(ip("daddr"), Expr::Set("host")), Step::Goto("refuse")]))
        .rule("forward", &out(vec![Step::Is(Expr::Meta("l4proto"), protocols), Step::Accept]))
        // New connections to the guest: from the host's ends, which are even. A sibling is odd, and so is whoever follows
        // a connection that the slot's last VM left behind: not in the range at all.
        .rule(
            "forward",
            &[
                from(UPLINK),
                to(TAP),
                Step::Is(ip("saddr"), Expr::Prefix(own.network(), own.prefix_len())),
                Step::Is(
                    Expr::Masked(Box::new(ip("saddr")), Box::new(Ipv4Addr::new(0, 0, 0, 1).into())),
                    Ipv4Addr::UNSPECIFIED.into(),
                ),
                Step::Accept,
            ],
        )
        .counted("forward", "forward", &[Step::Drop]);
}

/// Nobody opens a socket in here, a captured VMM least of all; only root dials the guest, at whatever port listens there.
fn output(table: &mut Table<'_>) {
    let errors = Expr::AnyOf(["destination-unreachable", "time-exceeded"].map(Expr::text).into());
    table
        .base_chain("output", filter("output"))
        .rule("output", &[established(), Step::Accept])
        .rule("output", &[Step::Is(Expr::Field("icmp", "type"), errors), Step::Accept])
        .rule(
            "output",
            &[
                to(MANAGEMENT_TAP),
                Step::Is(Expr::Meta("skuid"), Expr::Number(0)),
                Step::Is(ip("daddr"), MANAGEMENT_ADDRESS.into()),
                tcp(),
                Step::Accept,
            ],
        );
}

fn established() -> Step {
    Step::Is(Expr::Ct("state"), Expr::AnyOf(["established", "related"].map(Expr::text).into()))
}

fn tcp() -> Step {
    Step::Is(Expr::Meta("l4proto"), Expr::text("tcp"))
}

fn tcp_or_udp() -> Step {
    Step::Is(Expr::Meta("l4proto"), Expr::AnyOf(["tcp", "udp"].map(Expr::text).into()))
}

fn from(link: &str) -> Step {
    Step::Is(Expr::Meta("iifname"), Expr::text(link))
}

fn to(link: &str) -> Step {
    Step::Is(Expr::Meta("oifname"), Expr::text(link))
}

fn ip(field: &'static str) -> Expr {
    Expr::Field("ip", field)
}

fn ether(field: &'static str) -> Expr {
    Expr::Field("ether", field)
}

fn mac(mac: [u8; 6]) -> Expr {
    Expr::Text(mac_text(mac))
}

impl From<Ipv4Addr> for Expr {
    fn from(address: Ipv4Addr) -> Self {
        Self::Address(address)
    }
}

impl From<u16> for Expr {
    fn from(number: u16) -> Self {
        Self::Number(number.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ruleset_of_a_slot() {
        let block = Block { number: 2, range: "10.201.0.0/16".parse().unwrap() };
        insta::assert_json_snapshot!(ruleset(&block, &[Ipv4Addr::new(203, 0, 113, 9)]).to_json());
    }

    #[test]
    fn a_host_without_public_addresses() {
        let block = Block { number: 0, range: "10.201.0.0/16".parse().unwrap() };
        let text = ruleset(&block, &[]).to_json().to_string();
        assert!(!text.contains("\"elem\""), "an empty set has no list of elements");
    }
}
