//! Changes to links, their addresses, neighbours and routes.

use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsRawFd, BorrowedFd};

use clawpot_types::{Error, Result};
use rtnetlink::packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use rtnetlink::packet_route::address::{AddressAttribute, AddressMessage, AddressScope};
use rtnetlink::packet_route::link::{
    AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InfoData, InfoKind, InfoVeth, LinkMessage,
};
use rtnetlink::packet_route::neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};
use rtnetlink::{LinkMessageBuilder, LinkUnspec, LinkVeth, RouteMessageBuilder};
use rustix::io::Errno;

use super::netlink::{Netlink, Refused};

pub(crate) type Mac = [u8; 6];

const CREATE: u16 = NLM_F_CREATE | NLM_F_EXCL;

/// One end of a veth pair.
pub(crate) struct End<'a> {
    pub(crate) name: &'a str,
    pub(crate) mac: Mac,
}

/// A pair with `near` in the socket's namespace and `far` in `netns`, both down.
pub(crate) fn add_veth(netlink: &mut Netlink, near: &End<'_>, far: &End<'_>, netns: BorrowedFd<'_>) -> Result<()> {
    let peer = LinkMessageBuilder::<LinkUnspec>::new()
        .name(far.name)
        .address(far.mac.to_vec())
        .setns_by_fd(netns.as_raw_fd())
        .build();
    let message = LinkMessageBuilder::<LinkVeth>::new_with_info_kind(InfoKind::Veth)
        .name(near.name)
        .address(near.mac.to_vec())
        .set_info_data(InfoData::Veth(InfoVeth::Peer(peer)))
        .build();
    netlink
        .request(RouteNetlinkMessage::NewLink(message), CREATE)
        .map_err(|refused| refused.to_error(format!("making the link {}", near.name)))
}

/// No IPv6 address by itself. In a message of its own and before the link is up: together with "up" the kernel makes the
/// address first, and in the message that makes the link it refuses.
pub(crate) fn no_ipv6_address(netlink: &mut Netlink, name: &str) -> Result<()> {
    let none = AfSpecUnspec::Inet6(vec![AfSpecInet6::AddrGenMode(In6AddrGenMode::None)]);
    let message = LinkMessageBuilder::<LinkUnspec>::new()
        .name(name)
        .append_extra_attribute(rtnetlink::packet_route::link::LinkAttribute::AfSpecUnspec(vec![none]))
        .build();
    match set(netlink, message) {
        // A kernel without IPv6.
        Ok(()) | Err(Refused(Errno::AFNOSUPPORT)) => Ok(()),
        Err(refused) => Err(refused.to_error(format!("link {name}: no IPv6 addresses"))),
    }
}

pub(crate) fn up(netlink: &mut Netlink, name: &str) -> Result<()> {
    let message = LinkMessageBuilder::<LinkUnspec>::new().name(name).up().build();
    set(netlink, message).map_err(|refused| refused.to_error(format!("link {name}: bringing it up")))
}

pub(crate) fn set_mac(netlink: &mut Netlink, name: &str, mac: Mac) -> Result<()> {
    let message = LinkMessageBuilder::<LinkUnspec>::new().name(name).address(mac.to_vec()).build();
    set(netlink, message).map_err(|refused| refused.to_error(format!("link {name}: setting its MAC address")))
}

/// At most 255 bytes that the kernel keeps with the link and nobody reads but us. `false`: no such link.
pub(crate) fn set_alias(netlink: &mut Netlink, name: &str, alias: &str) -> Result<bool> {
    let message = LinkMessageBuilder::<LinkUnspec>::new().name(name).alias(alias).build();
    match set(netlink, message) {
        Ok(()) => Ok(true),
        Err(Refused(Errno::NODEV)) => Ok(false),
        Err(refused) => Err(refused.to_error(format!("link {name}: marking it {alias:?}"))),
    }
}

/// As [`set_alias`], and the link goes down, in one message: whoever dies meanwhile has done both or neither.
pub(crate) fn set_alias_and_down(netlink: &mut Netlink, name: &str, alias: &str) -> Result<bool> {
    let message = LinkMessageBuilder::<LinkUnspec>::new().name(name).alias(alias).down().build();
    match set(netlink, message) {
        Ok(()) => Ok(true),
        Err(Refused(Errno::NODEV)) => Ok(false),
        Err(refused) => Err(refused.to_error(format!("link {name}: marking it {alias:?} and taking it down"))),
    }
}

/// `false`: no such link.
pub(crate) fn delete(netlink: &mut Netlink, name: &str) -> Result<bool> {
    let message = LinkMessageBuilder::<LinkUnspec>::new().name(name).build();
    match netlink.request(RouteNetlinkMessage::DelLink(message), 0) {
        Ok(()) => Ok(true),
        Err(Refused(Errno::NODEV)) => Ok(false),
        Err(refused) => Err(refused.to_error(format!("link {name}: removing it"))),
    }
}

/// Changes an existing link only.
fn set(netlink: &mut Netlink, message: LinkMessage) -> Result<(), Refused> {
    netlink.request(RouteNetlinkMessage::SetLink(message), 0)
}

/// What a link is to have as its own.
pub(crate) struct Own {
    pub(crate) index: u32,
    pub(crate) address: Ipv4Addr,
    pub(crate) prefix: u8,
}

/// There already is fine.
pub(crate) fn add_address(netlink: &mut Netlink, own: &Own, label: Option<&str>) -> Result<()> {
    match netlink.request(RouteNetlinkMessage::NewAddress(address_message(own, label)), CREATE) {
        Ok(()) | Err(Refused(Errno::EXIST)) => Ok(()),
        Err(refused) => Err(refused.to_error(format!("giving a link the address {}/{}", own.address, own.prefix))),
    }
}

/// Gone already is fine.
pub(crate) fn delete_address(netlink: &mut Netlink, own: &Own) -> Result<()> {
    match netlink.request(RouteNetlinkMessage::DelAddress(address_message(own, None)), 0) {
        Ok(()) | Err(Refused(Errno::ADDRNOTAVAIL)) => Ok(()),
        Err(refused) => Err(refused.to_error(format!("taking the address {}/{}", own.address, own.prefix))),
    }
}

fn address_message(own: &Own, label: Option<&str>) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = AddressFamily::Inet;
    message.header.prefix_len = own.prefix;
    message.header.scope = AddressScope::Universe;
    message.header.index = own.index;
    let address = IpAddr::V4(own.address);
    message.attributes = vec![AddressAttribute::Local(address), AddressAttribute::Address(address)];
    message.attributes.extend(label.map(|label| AddressAttribute::Label(label.to_owned())));
    message
}

/// A neighbour that is never asked for and never forgotten.
pub(crate) fn add_neighbour(netlink: &mut Netlink, index: u32, address: Ipv4Addr, mac: Mac) -> Result<()> {
    let mut message = NeighbourMessage::default();
    message.header.family = AddressFamily::Inet;
    message.header.ifindex = index;
    message.header.state = NeighbourState::Permanent;
    message.attributes = vec![
        NeighbourAttribute::Destination(NeighbourAddress::Inet(address)),
        NeighbourAttribute::LinkLayerAddress(mac.to_vec()),
    ];
    netlink
        .request(RouteNetlinkMessage::NewNeighbour(message), NLM_F_CREATE | NLM_F_REPLACE)
        .map_err(|refused| refused.to_error(format!("adding the neighbour {address}")))
}

pub(crate) fn add_default_route(netlink: &mut Netlink, index: u32, gateway: Ipv4Addr) -> Result<()> {
    let message = RouteMessageBuilder::<Ipv4Addr>::new().gateway(gateway).output_interface(index).build();
    netlink
        .request(RouteNetlinkMessage::NewRoute(message), CREATE)
        .map_err(|refused| refused.to_error(format!("adding the default route by {gateway}")))
}

/// Number of a link in the socket's namespace. `NotFound`: there is none.
pub(crate) fn index(netlink: &mut Netlink, name: &str) -> Result<u32> {
    super::look::link(netlink, name)?
        .map(|link| link.index)
        .ok_or_else(|| Error::new(clawpot_types::Kind::NotFound, format!("link {name}: there is none")))
}
