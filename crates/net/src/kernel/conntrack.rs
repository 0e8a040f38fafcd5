//! Makes the host forget the connections of an address, by ctnetlink. A connection that its next holder inherited would
//! be let through to it as an established one.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;

use clawpot_types::Result;
use rustix::io::Errno;

use super::netlink::{Netlink, Refused, append_attribute, attributes};

/// `NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_{GET,DELETE}`
const GET: u16 = 0x0101;
const DELETE: u16 = 0x0102;

/// `struct nfgenmsg`: family, version, resource.
const HEADER: [u8; 4] = [2, 0, 0, 0];

const CTA_TUPLE_ORIG: u16 = 1;
const CTA_TUPLE_REPLY: u16 = 2;
const CTA_ID: u16 = 12;
const CTA_ZONE: u16 = 18;
const CTA_TUPLE_IP: u16 = 1;
const CTA_IP_V4_SRC: u16 = 1;
const CTA_IP_V4_DST: u16 = 2;
const NESTED: u16 = 0x8000;

/// Whoever they talked to and whoever talked to them; how many there were. Reads the whole table: some 8 ms for its 262,144
/// buckets, and about 1 ms per 10,000 entries.
pub(crate) fn forget(addresses: &BTreeSet<Ipv4Addr>) -> Result<usize> {
    let failed = |refused: Refused| refused.to_error(format!("deleting the connections of {addresses:?}"));
    let mut netlink = Netlink::netfilter()?;
    let mut doomed = Vec::new();
    let listed = netlink.dump(GET, &HEADER, |payload| {
        let Some(entry) = payload.get(HEADER.len()..) else { return };
        if concerns(entry, addresses) {
            doomed.push(key(entry));
        }
    });
    match listed {
        // A kernel without ctnetlink, or nothing here tracks connections.
        Err(Refused(Errno::OPNOTSUPP | Errno::INVAL)) => return Ok(0),
        listed => listed.map_err(failed)?,
    }
    for key in &doomed {
        match netlink.request_raw(DELETE, 0, key) {
            // It ended meanwhile.
            Ok(()) | Err(Refused(Errno::NOENT)) => {}
            Err(refused) => return Err(failed(refused)),
        }
    }
    Ok(doomed.len())
}

/// Whether one of the addresses is an end of it, before or after translation.
fn concerns(entry: &[u8], addresses: &BTreeSet<Ipv4Addr>) -> bool {
    attributes(entry)
        .filter(|(kind, _)| matches!(*kind, CTA_TUPLE_ORIG | CTA_TUPLE_REPLY))
        .flat_map(|(_, tuple)| attributes(tuple))
        .filter(|(kind, _)| *kind == CTA_TUPLE_IP)
        .flat_map(|(_, ip)| attributes(ip))
        .any(|(kind, value)| {
            let end = <[u8; 4]>::try_from(value).map(Ipv4Addr::from);
            matches!(kind, CTA_IP_V4_SRC | CTA_IP_V4_DST) && end.is_ok_and(|end| addresses.contains(&end))
        })
}

/// As little as names this one entry: its first tuple, zone and id, as they were told to us.
fn key(entry: &[u8]) -> Vec<u8> {
    let mut bytes = HEADER.to_vec();
    for (kind, value) in attributes(entry) {
        let flag = match kind {
            CTA_TUPLE_ORIG => NESTED,
            CTA_ZONE | CTA_ID => 0,
            _ => continue,
        };
        append_attribute(&mut bytes, kind | flag, value);
    }
    bytes
}
