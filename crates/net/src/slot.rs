//! One slot's making and removal, step by step, over the kernel's doors. A crash after any step leaves what [`Site::scan`]
//! finds by name.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use clawpot_types::guest::{
    GATEWAY_ADDRESS, GATEWAY_MAC, GUEST_ADDRESS, GUEST_MAC, LINK_PREFIX, MANAGEMENT_ADDRESS, MANAGEMENT_HOST_ADDRESS,
    MANAGEMENT_HOST_MAC, MANAGEMENT_MAC, MANAGEMENT_TAP, TAP,
};
use clawpot_types::{Error, Kind, Result, Slot};

use crate::address::Block;
use crate::kernel::link::{self, End, Mac, Own};
use crate::kernel::netlink::Netlink;
use crate::kernel::{look, netns, sysctl, tap};
use crate::mark::Mark;
use crate::names::Names;
use crate::steps::{Step, Steps};

/// The netns's end of the veth, by this name in each.
pub(crate) const UPLINK: &str = "up0";

/// Constant too, so that neither end ever asks for the other.
const HOST_END_MAC: Mac = [0x02, 0xca, 0x00, 0x00, 0x00, 0x03];
const UPLINK_MAC: Mac = [0x02, 0xca, 0x00, 0x00, 0x00, 0x04];

/// Prefix of a veth: two addresses, both used (RFC 3021).
const VETH_PREFIX: u8 = 31;

/// Where an instance's slots are on this host.
#[derive(Clone, Debug)]
pub(crate) struct Site {
    pub(crate) names: Names,
    pub(crate) block: Block,
    pub(crate) netns_dir: PathBuf,
}

/// What bears a slot's name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) mark: Option<Mark>,
    pub(crate) mounted: bool,
}

impl Site {
    pub(crate) fn netns(&self, slot: Slot) -> PathBuf {
        self.netns_dir.join(self.names.slot(slot))
    }

    /// Namespace and links of a slot of which nothing is there; no rules yet, and no mark. A netfilter socket inside.
    pub(crate) fn make(&self, slot: Slot, steps: &Steps) -> Result<Netlink> {
        let name = self.names.slot(slot);
        let path = self.netns(slot);
        let mut host = Netlink::route()?;
        netns::create_name(&path)?;
        steps.reached(Step::Named)?;
        let (mut inside, netfilter) = self.make_netns(slot, &path, steps)?;
        let fd = clawpot_host::netns::open(&path)?;
        let near = End { name: &name, mac: HOST_END_MAC };
        link::add_veth(&mut host, &near, &End { name: UPLINK, mac: UPLINK_MAC }, fd.as_fd())?;
        steps.reached(Step::Veth)?;
        self.configure_host_end(&mut host, slot, &name)?;
        self.configure_inside(&mut inside, slot)?;
        steps.reached(Step::Configured)?;
        Ok(netfilter)
    }

    /// The namespace with its settings and taps, made on a thread that ends; the two sockets stay inside.
    fn make_netns(&self, slot: Slot, path: &Path, steps: &Steps) -> Result<(Netlink, Netlink)> {
        let uid = self.block.uid(slot);
        let work = || {
            netns::unshare_named(path)?;
            steps.reached(Step::Mounted)?;
            sysctl::set_slot()?;
            tap::create(TAP, uid, uid)?;
            tap::create(MANAGEMENT_TAP, uid, uid)?;
            steps.reached(Step::Taps)?;
            Ok((Netlink::route()?, Netlink::netfilter()?))
        };
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new()
                .name("netns".to_owned())
                .spawn_scoped(scope, work)
                .map_err(|error| Error::io("starting a thread for a network namespace", error))?;
            thread.join().unwrap_or_else(|_| {
                Err(Error::new(Kind::Internal, format!("making the network namespace {}: panicked", path.display())))
            })
        })
    }

    fn configure_host_end(&self, host: &mut Netlink, slot: Slot, name: &str) -> Result<()> {
        sysctl::set_host_link(name)?;
        link::no_ipv6_address(host, name)?;
        let index = link::index(host, name)?;
        let address = self.block.host_address(slot);
        link::add_address(host, &Own { index, address, prefix: VETH_PREFIX }, None)?;
        link::up(host, name)?;
        link::add_neighbour(host, index, self.block.slot_address(slot), UPLINK_MAC)
    }

    fn configure_inside(&self, inside: &mut Netlink, slot: Slot) -> Result<()> {
        link::set_mac(inside, TAP, GATEWAY_MAC)?;
        link::set_mac(inside, MANAGEMENT_TAP, MANAGEMENT_HOST_MAC)?;
        let host = self.block.host_address(slot);
        configure_link(inside, TAP, (GATEWAY_ADDRESS, LINK_PREFIX), (GUEST_ADDRESS, GUEST_MAC))?;
        let management = (MANAGEMENT_HOST_ADDRESS, LINK_PREFIX);
        configure_link(inside, MANAGEMENT_TAP, management, (MANAGEMENT_ADDRESS, MANAGEMENT_MAC))?;
        let own = (self.block.slot_address(slot), VETH_PREFIX);
        let index = configure_link(inside, UPLINK, own, (host, HOST_END_MAC))?;
        link::add_default_route(inside, index, host)
    }

    /// `false`: the slot has no link.
    pub(crate) fn mark(&self, slot: Slot, mark: Mark) -> Result<bool> {
        let (netlink, name, mark_text) = (&mut Netlink::route()?, self.names.slot(slot), mark.to_string());
        match mark {
            // Not by the host's rules alone, which anybody may flush: nothing leaves through a link that is down.
            Mark::CutOff => link::set_alias_and_down(netlink, &name, &mark_text),
            _ => link::set_alias(netlink, &name, &mark_text),
        }
    }

    /// The namespace loses its name. Its links go a moment later.
    pub(crate) fn unname(&self, slot: Slot) -> Result<()> {
        netns::remove(&self.netns(slot))
    }

    /// For a veth that outlives its namespace's name: somebody holds the namespace.
    pub(crate) fn delete_link(&self, slot: Slot) -> Result<()> {
        let name = self.names.slot(slot);
        if link::delete(&mut Netlink::route()?, &name)? {
            tracing::warn!(
                link = name,
                "a process still held the slot's network namespace; its veth was removed by hand"
            );
        }
        Ok(())
    }

    pub(crate) fn link_is_known(&self, slot: Slot) -> bool {
        sysctl::link_is_known(&self.names.slot(slot))
    }

    /// Every slot of which a link or a name of a namespace exists.
    pub(crate) fn scan(&self) -> Result<BTreeMap<Slot, Seen>> {
        let mut found: BTreeMap<Slot, Seen> = BTreeMap::new();
        for link in look::links(&mut Netlink::route()?)? {
            if let Some(slot) = self.names.parse_slot(&link.name) {
                found.entry(slot).or_default().mark = link.alias.as_deref().and_then(Mark::parse);
            }
        }
        for name in names_in(&self.netns_dir)? {
            if let Some(slot) = self.names.parse_slot(&name) {
                found.entry(slot).or_default().mounted = netns::is_mounted(&self.netns_dir.join(name))?;
            }
        }
        Ok(found)
    }

    /// The host's own addresses that a guest might take for public ones.
    pub(crate) fn host_addresses(&self) -> Result<Vec<Ipv4Addr>> {
        let mut own: Vec<Ipv4Addr> =
            look::addresses(&mut Netlink::route()?)?.into_iter().map(|address| address.local).collect();
        own.retain(|address| !crate::rules::is_denied(*address));
        own.sort_unstable();
        own.dedup();
        Ok(own)
    }
}

/// Address, up, and the one neighbour. The link's number.
fn configure_link(
    netlink: &mut Netlink,
    name: &str,
    (address, prefix): (Ipv4Addr, u8),
    (neighbour, mac): (Ipv4Addr, Mac),
) -> Result<u32> {
    link::no_ipv6_address(netlink, name)?;
    let index = link::index(netlink, name)?;
    link::add_address(netlink, &Own { index, address, prefix }, None)?;
    link::up(netlink, name)?;
    link::add_neighbour(netlink, index, neighbour, mac)?;
    Ok(index)
}

/// Names in a directory; none when there is no directory.
pub(crate) fn names_in(dir: &Path) -> Result<Vec<String>> {
    let failed = |error| Error::io(format!("listing {}", dir.display()), error);
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failed(error)),
    };
    let mut names = Vec::new();
    for entry in entries {
        // A name that is not UTF-8 is not ours.
        names.extend(entry.map_err(failed)?.file_name().into_string());
    }
    Ok(names)
}
