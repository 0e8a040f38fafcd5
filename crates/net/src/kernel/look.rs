//! What there is of links, addresses and routes in a socket's namespace.

use std::net::Ipv4Addr;

use clawpot_types::Result;
use ipnet::Ipv4Net;
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::{LinkMessageBuilder, LinkUnspec};
use rustix::io::Errno;

use super::netlink::{Netlink, Refused, attributes, text};

const RTM_GETLINK: u16 = 18;
const RTM_GETADDR: u16 = 22;
const RTM_GETROUTE: u16 = 26;

/// Sizes of the structures that stand before the attributes.
const LINK_HEADER: usize = 16;
const ADDRESS_HEADER: usize = 8;
const ROUTE_HEADER: usize = 12;

const IFLA_IFNAME: u16 = 3;
const IFLA_IFALIAS: u16 = 20;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_LABEL: u16 = 3;
const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;

const AF_INET: u8 = 2;
const RTN_LOCAL: u8 = 2;
const RTN_BROADCAST: u8 = 3;
const RTN_MULTICAST: u8 = 5;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Link {
    pub(crate) index: u32,
    pub(crate) name: String,
    pub(crate) alias: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Address {
    pub(crate) index: u32,
    pub(crate) label: String,
    pub(crate) local: Ipv4Addr,
    pub(crate) net: Ipv4Net,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Route {
    /// Of its first hop; none for a route that goes nowhere.
    pub(crate) index: Option<u32>,
    pub(crate) destination: Ipv4Net,
}

pub(crate) fn links(netlink: &mut Netlink) -> Result<Vec<Link>> {
    let mut found = Vec::new();
    netlink
        .dump(RTM_GETLINK, &[0; LINK_HEADER], |payload| found.extend(parse_link(payload)))
        .map_err(|refused| refused.to_error("listing the host's links"))?;
    Ok(found)
}

/// `None`: no such link.
pub(crate) fn link(netlink: &mut Netlink, name: &str) -> Result<Option<Link>> {
    let message = LinkMessageBuilder::<LinkUnspec>::new().name(name).build();
    let mut found = None;
    match netlink.get(RouteNetlinkMessage::GetLink(message), |payload| found = parse_link(payload)) {
        Ok(()) => Ok(found),
        Err(Refused(Errno::NODEV)) => Ok(None),
        Err(refused) => Err(refused.to_error(format!("looking for the link {name}"))),
    }
}

pub(crate) fn addresses(netlink: &mut Netlink) -> Result<Vec<Address>> {
    let mut body = [0; ADDRESS_HEADER];
    body[0] = AF_INET;
    let mut found = Vec::new();
    netlink
        .dump(RTM_GETADDR, &body, |payload| found.extend(parse_address(payload)))
        .map_err(|refused| refused.to_error("listing the host's addresses"))?;
    Ok(found)
}

/// Unicast routes and those that refuse, of all tables; without the kernel's own for local addresses and broadcast.
pub(crate) fn routes(netlink: &mut Netlink) -> Result<Vec<Route>> {
    let mut body = [0; ROUTE_HEADER];
    body[0] = AF_INET;
    let mut found = Vec::new();
    netlink
        .dump(RTM_GETROUTE, &body, |payload| found.extend(parse_route(payload)))
        .map_err(|refused| refused.to_error("listing the host's routes"))?;
    Ok(found)
}

fn parse_link(payload: &[u8]) -> Option<Link> {
    let (header, rest) = payload.split_at_checked(LINK_HEADER)?;
    let index = number(header.get(4..8)?)?;
    let find = |wanted| attributes(rest).find(|(kind, _)| *kind == wanted).map(|(_, value)| text(value));
    Some(Link { index, name: find(IFLA_IFNAME)?, alias: find(IFLA_IFALIAS) })
}

fn parse_address(payload: &[u8]) -> Option<Address> {
    let (header, rest) = payload.split_at_checked(ADDRESS_HEADER)?;
    let [family, prefix, ..] = *header else { return None };
    let index = number(header.get(4..8)?)?;
    let find = |wanted| attributes(rest).find(|(kind, _)| *kind == wanted).map(|(_, value)| value);
    let address = find(IFA_ADDRESS).and_then(ipv4)?;
    let local = find(IFA_LOCAL).and_then(ipv4).unwrap_or(address);
    let net = Ipv4Net::new(address, prefix).ok()?.trunc();
    (family == AF_INET).then(|| Address { index, label: find(IFA_LABEL).map(text).unwrap_or_default(), local, net })
}

fn parse_route(payload: &[u8]) -> Option<Route> {
    let (header, rest) = payload.split_at_checked(ROUTE_HEADER)?;
    let [family, prefix, _, _, _, _, _, kind, ..] = *header else { return None };
    if family != AF_INET || matches!(kind, RTN_LOCAL | RTN_BROADCAST | RTN_MULTICAST) {
        return None;
    }
    let find = |wanted| attributes(rest).find(|(kind, _)| *kind == wanted).map(|(_, value)| value);
    let address = find(RTA_DST).and_then(ipv4).unwrap_or(Ipv4Addr::UNSPECIFIED);
    let destination = Ipv4Net::new(address, prefix).ok()?.trunc();
    Some(Route { index: find(RTA_OIF).and_then(number), destination })
}

fn number(bytes: &[u8]) -> Option<u32> {
    bytes.try_into().ok().map(u32::from_ne_bytes)
}

fn ipv4(bytes: &[u8]) -> Option<Ipv4Addr> {
    <[u8; 4]>::try_from(bytes).ok().map(Ipv4Addr::from)
}
