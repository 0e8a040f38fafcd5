//! What of the host matters before a block is claimed.

use std::collections::{BTreeSet, HashMap};
use std::path::Path;

use clawpot_types::{InstanceId, Result};
use ipnet::Ipv4Net;

use crate::claim::HostFacts;
use crate::kernel::look;
use crate::kernel::netlink::Netlink;
use crate::names::instance_of;
use crate::slot::names_in;

/// Looks at links, addresses, routes and names of namespaces. Blocks for a few milliseconds on a host with many.
pub fn host_facts(netns_dir: &Path) -> Result<HostFacts> {
    let mut netlink = Netlink::route()?;
    let links: HashMap<u32, String> =
        look::links(&mut netlink)?.into_iter().map(|link| (link.index, link.name)).collect();
    let of_an_instance = |index: u32| links.get(&index).is_some_and(|name| instance_of(name).is_some());
    let addresses = look::addresses(&mut netlink)?;
    let mut taken: Vec<Ipv4Net> = addresses
        .iter()
        .filter(|address| instance_of(&address.label).is_none() && !of_an_instance(address.index))
        .map(|address| address.net)
        .collect();
    taken.extend(
        look::routes(&mut netlink)?
            .into_iter()
            .filter(|route| !route.index.is_some_and(of_an_instance))
            .map(|route| route.destination),
    );
    let instances: BTreeSet<InstanceId> = links
        .into_values()
        .chain(addresses.into_iter().map(|address| address.label))
        .chain(names_in(netns_dir)?)
        .filter_map(|name| instance_of(&name))
        .collect();
    Ok(HostFacts { taken, instances })
}
