//! nftables without the program `nft`, for what is done often: two elements of a set, and the same rules once more in a new
//! namespace. Rules are compiled by `nft` alone; here they are only copied, as the kernel tells them.

use clawpot_types::{Error, Kind, Result};
use rtnetlink::packet_core::NLA_TYPE_MASK;
use rustix::io::Errno;

use super::netlink::{Netlink, Refused, append_attribute, attributes};
use crate::rules::nft::Element;

/// `NFNL_SUBSYS_NFTABLES`
const NFTABLES: u8 = 10;

/// `NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_…`
const NEW_TABLE: u16 = 0x0a00;
const GET_TABLE: u16 = 0x0a01;
const NEW_CHAIN: u16 = 0x0a03;
const GET_CHAIN: u16 = 0x0a04;
const NEW_RULE: u16 = 0x0a06;
const GET_RULE: u16 = 0x0a07;
const NEW_SET: u16 = 0x0a09;
const GET_SET: u16 = 0x0a0a;
const NEW_ELEMENT: u16 = 0x0a0c;
const GET_ELEMENT: u16 = 0x0a0d;
const DELETE_ELEMENT: u16 = 0x0a0e;

const CREATE: u16 = 0x400;
/// `NLM_F_APPEND`: behind the chain's other rules.
const APPEND: u16 = 0x800;

const NESTED: u16 = 0x8000;

/// `struct nfgenmsg`: family, version, resource.
const GENERAL: usize = 4;
const INET: [u8; GENERAL] = [1, 0, 0, 0];
const ANY_FAMILY: [u8; GENERAL] = [0; GENERAL];

/// The first attribute of every object but a table is its table's name; a table's is its own.
const TABLE: u16 = 1;
const SET_NAME: u16 = 2;
const SET_ID: u16 = 10;

/// What of an object makes it again. The rest the kernel gives by itself: handles, positions, counts.
const OF_TABLE: [u16; 3] = [TABLE, 2, 6];
const OF_CHAIN: [u16; 7] = [TABLE, 3, 4, 5, 7, 10, 12];
const OF_SET: [u16; 14] = [TABLE, SET_NAME, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 17, 18];
const OF_RULE: [u16; 4] = [TABLE, 2, RULE_EXPRESSIONS, 7];
const RULE_EXPRESSIONS: u16 = 4;

const EXPRESSION_NAME: u16 = 1;
const EXPRESSION_DATA: u16 = 2;

const ELEMENTS: u16 = 3;
const LIST_ELEMENT: u16 = 1;
const ELEMENT_KEY: u16 = 1;
const ELEMENT_DATA: u16 = 2;
const ELEMENT_FLAGS: u16 = 3;
const DATA_VALUE: u16 = 1;
const DATA_VERDICT: u16 = 2;
const VERDICT_CODE: u16 = 1;
const VERDICT_CHAIN: u16 = 2;
const JUMP: i32 = -3;

/// Whether the `inet` table is there, in the socket's namespace. Some microseconds.
pub(crate) fn inet_table_exists(netlink: &mut Netlink, name: &str) -> Result<bool, Refused> {
    let mut body = INET.to_vec();
    append_attribute(&mut body, TABLE, &terminated(name));
    match netlink.request_raw(GET_TABLE, 0, &body) {
        Ok(()) => Ok(true),
        Err(Refused(Errno::NOENT)) => Ok(false),
        Err(refused) => Err(refused),
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    /// There already is fine.
    Add,
    /// `NOENT`: not there.
    Delete,
}

/// All of them or none, in one transaction. `NOENT`: no such table or set. About 0.1 ms.
pub(crate) fn change_elements(
    netlink: &mut Netlink,
    change: Change,
    table: &str,
    elements: &[Element],
) -> Result<(), Refused> {
    let (kind, flags) = match change {
        Change::Add => (NEW_ELEMENT, CREATE),
        Change::Delete => (DELETE_ELEMENT, 0),
    };
    let messages: Vec<_> = elements.iter().map(|element| (kind, flags, element_message(table, element))).collect();
    netlink.transaction(NFTABLES, &messages)
}

fn element_message(table: &str, element: &Element) -> Vec<u8> {
    let mut entry = nested(ELEMENT_KEY | NESTED, &nested(DATA_VALUE, &element.key));
    if let Some(chain) = element.jump {
        let mut verdict = nested(VERDICT_CODE, &JUMP.to_be_bytes());
        append_attribute(&mut verdict, VERDICT_CHAIN, &terminated(chain));
        append_attribute(&mut entry, ELEMENT_DATA | NESTED, &nested(DATA_VERDICT | NESTED, &verdict));
    }
    let mut body = INET.to_vec();
    append_attribute(&mut body, TABLE, &terminated(table));
    append_attribute(&mut body, SET_NAME, &terminated(element.set));
    append_attribute(&mut body, ELEMENTS | NESTED, &nested(LIST_ELEMENT | NESTED, &entry));
    body
}

/// Everything that a namespace has of nftables, as messages that make it again in another. Only for what `rules::slot`
/// writes: sets of constant elements, no maps, objects or flowtables.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Ruleset(Vec<(u16, u16, Vec<u8>)>);

impl Ruleset {
    /// Of the socket's namespace. About 0.2 ms.
    pub(crate) fn read(netlink: &mut Netlink) -> Result<Self> {
        Self::try_read(netlink).map_err(|refused| refused.to_error("reading the rules of a network namespace"))
    }

    fn try_read(netlink: &mut Netlink) -> Result<Self, Refused> {
        let mut all = Vec::new();
        for (get, new, kept) in [(GET_TABLE, NEW_TABLE, &OF_TABLE[..]), (GET_CHAIN, NEW_CHAIN, &OF_CHAIN)] {
            netlink
                .dump(get, &ANY_FAMILY, |payload| all.extend(pick(payload, kept).map(|body| (new, CREATE, body))))?;
        }
        let mut sets = Vec::new();
        netlink.dump(GET_SET, &ANY_FAMILY, |payload| sets.extend(pick(payload, &OF_SET)))?;
        for (id, set) in (1_u32..).zip(&sets) {
            let mut body = set.clone();
            append_attribute(&mut body, SET_ID, &id.to_be_bytes());
            all.push((NEW_SET, CREATE, body));
            all.extend(elements_of(netlink, set)?.map(|body| (NEW_ELEMENT, CREATE, body)));
        }
        netlink.dump(GET_RULE, &ANY_FAMILY, |payload| {
            all.extend(pick(payload, &OF_RULE).map(|body| (NEW_RULE, CREATE | APPEND, body)));
        })?;
        Ok(Self(all))
    }

    /// Into the socket's namespace, which has none yet, in one transaction; then looks that it is there, whole and nothing
    /// else. About 0.6 ms.
    pub(crate) fn write(&self, netlink: &mut Netlink) -> Result<Copied> {
        let what = "copying rules into a network namespace";
        match netlink.transaction(NFTABLES, &self.0) {
            Ok(()) => {}
            Err(refused) if is_about_content(refused.0) => return Ok(Copied::Refused(refused.to_error(what))),
            Err(refused) => return Err(refused.to_error(what)),
        }
        if Self::read(netlink)? == *self {
            return Ok(Copied::Whole);
        }
        Ok(Copied::Refused(Error::new(Kind::Internal, format!("{what}: the copy is not as its original"))))
    }
}

#[cfg(test)]
impl Ruleset {
    /// One object: its message's type, and what follows the header.
    pub(crate) fn of_one(kind: u16, body: Vec<u8>) -> Self {
        Self(vec![(kind, CREATE, body)])
    }
}

/// What became of a copy that the kernel looked at.
#[derive(Debug)]
pub(crate) enum Copied {
    Whole,
    /// It would do so again: it does not take back what it tells, or makes something else of it.
    Refused(Error),
}

/// Whether the kernel says so of what stands in a message, and not of a moment's want of memory, descriptors or rights.
fn is_about_content(errno: Errno) -> bool {
    const NOTSUPP: Errno = Errno::from_raw_os_error(524);
    matches!(
        errno,
        Errno::INVAL
            | Errno::OPNOTSUPP
            | NOTSUPP
            | Errno::AFNOSUPPORT
            | Errno::NOENT
            | Errno::EXIST
            | Errno::RANGE
            | Errno::OVERFLOW
            | Errno::BUSY
            | Errno::LOOP
            | Errno::MLINK
    )
}

/// An object with as much as makes it again.
fn pick(payload: &[u8], kept: &[u16]) -> Option<Vec<u8>> {
    let (general, rest) = payload.split_at_checked(GENERAL)?;
    // The resource is the dump's.
    let mut body = vec![*general.first()?, 0, 0, 0];
    for (kind, value) in flagged_attributes(rest) {
        let number = kind & NLA_TYPE_MASK;
        if number == RULE_EXPRESSIONS && kept == OF_RULE {
            append_attribute(&mut body, kind, &uncounted(value));
        } else if kept.contains(&number) {
            append_attribute(&mut body, kind, value);
        }
    }
    Some(body)
}

/// Expressions of a rule, with counters at nothing.
fn uncounted(expressions: &[u8]) -> Vec<u8> {
    const BYTES: u16 = 1;
    const PACKETS: u16 = 2;
    let mut all = Vec::new();
    for (kind, expression) in flagged_attributes(expressions) {
        let is_counter = attributes(expression).any(|(kind, value)| kind == EXPRESSION_NAME && value == b"counter\0");
        if !is_counter {
            append_attribute(&mut all, kind, expression);
            continue;
        }
        let mut zero = nested(BYTES, &[0; 8]);
        append_attribute(&mut zero, PACKETS, &[0; 8]);
        let mut counter = nested(EXPRESSION_NAME, b"counter\0");
        append_attribute(&mut counter, EXPRESSION_DATA | NESTED, &zero);
        append_attribute(&mut all, kind, &counter);
    }
    all
}

/// The message that makes the elements of a set, in ascending order: a hash lists them in any, and an interval's start has
/// to come before its end. `None`: the set has none.
fn elements_of(netlink: &mut Netlink, set: &[u8]) -> Result<Option<Vec<u8>>, Refused> {
    let name = pick(set, &[TABLE, SET_NAME]).unwrap_or_default();
    let mut elements = Vec::new();
    netlink.dump(GET_ELEMENT, &name, |payload| {
        let lists = flagged_attributes(payload.get(GENERAL..).unwrap_or_default());
        for (_, list) in lists.filter(|(kind, _)| kind & NLA_TYPE_MASK == ELEMENTS) {
            elements.extend(flagged_attributes(list).map(|(kind, element)| (order(element), nested(kind, element))));
        }
    })?;
    if elements.is_empty() {
        return Ok(None);
    }
    elements.sort();
    let list: Vec<u8> = elements.into_iter().flat_map(|(_, element)| element).collect();
    let mut body = name;
    append_attribute(&mut body, ELEMENTS | NESTED, &list);
    Ok(Some(body))
}

/// By key; where one interval ends and the next begins, the end comes first.
fn order(element: &[u8]) -> (Vec<u8>, bool) {
    let find = |wanted| attributes(element).find(|(kind, _)| *kind == wanted).map(|(_, value)| value);
    (find(ELEMENT_KEY).unwrap_or_default().to_vec(), find(ELEMENT_FLAGS).is_none())
}

/// One attribute.
fn nested(kind: u16, value: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(value.len() + 8);
    append_attribute(&mut bytes, kind, value);
    bytes
}

/// As [`attributes`], with the flags in their type.
fn flagged_attributes(bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    let mut rest = bytes;
    attributes(bytes).map(move |(_, value)| {
        let kind = rest.get(2..4).and_then(|kind| kind.try_into().ok()).map_or(0, u16::from_ne_bytes);
        rest = rest.get((value.len() + 4).next_multiple_of(4)..).unwrap_or_default();
        (kind, value)
    })
}

fn terminated(text: &str) -> Vec<u8> {
    [text.as_bytes(), &[0]].concat()
}
