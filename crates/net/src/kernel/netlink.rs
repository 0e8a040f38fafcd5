//! A netlink socket, synchronous: it is used on threads that exist for one piece of work, inside a namespace that only
//! they are in. Requests are built by rtnetlink's types; of replies only the attributes we want are read, so that a newer
//! kernel's other attributes cannot fail us.

use rtnetlink::packet_core::{NLA_TYPE_MASK, NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkMessage};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::sys::protocols::{NETLINK_NETFILTER, NETLINK_ROUTE};
use rtnetlink::sys::{Socket, SocketAddr};
use rustix::io::Errno;

use clawpot_types::{Error, Result};

/// Of `struct nlmsghdr`, bytes.
pub(crate) const HEADER: usize = 16;

const NLMSG_NOOP: u16 = 1;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;

/// `NFNL_MSG_BATCH_{BEGIN,END}`
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;

/// More than any acknowledgement is: without the message it answers.
const ACKNOWLEDGEMENT: usize = 256;

/// A dump that others change meanwhile is asked for again, so often at most.
const DUMP_TRIES: u32 = 20;

#[derive(Debug)]
pub(crate) struct Netlink {
    socket: Socket,
    sequence: u32,
}

/// Why a request failed; a caller may expect one errno or another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Refused(pub(crate) Errno);

impl Refused {
    pub(crate) fn to_error(self, what: impl Into<String>) -> Error {
        Error::io(what, self.0.into())
    }
}

impl From<std::io::Error> for Refused {
    fn from(error: std::io::Error) -> Self {
        Self(Errno::from_io_error(&error).unwrap_or(Errno::IO))
    }
}

impl Netlink {
    /// Of the calling thread's namespace, for as long as it is open.
    pub(crate) fn route() -> Result<Self> {
        Self::open(NETLINK_ROUTE)
    }

    pub(crate) fn netfilter() -> Result<Self> {
        Self::open(NETLINK_NETFILTER)
    }

    fn open(protocol: isize) -> Result<Self> {
        let failed = |error| Error::io("opening a netlink socket", error);
        let mut socket = Socket::new(protocol).map_err(failed)?;
        socket.bind_auto().map_err(failed)?;
        socket.connect(&SocketAddr::new(0, 0)).map_err(failed)?;
        Ok(Self { socket, sequence: 0 })
    }

    /// One change; returns when it is made. `flags`: besides "request" and "acknowledge".
    pub(crate) fn request(&mut self, message: RouteNetlinkMessage, flags: u16) -> Result<(), Refused> {
        self.exchange(message, flags, |_| {})
    }

    /// One object, as bytes after the header.
    pub(crate) fn get(&mut self, message: RouteNetlinkMessage, each: impl FnMut(&[u8])) -> Result<(), Refused> {
        self.exchange(message, 0, each)
    }

    fn exchange(
        &mut self,
        message: RouteNetlinkMessage,
        flags: u16,
        mut each: impl FnMut(&[u8]),
    ) -> Result<(), Refused> {
        let mut message = NetlinkMessage::from(message);
        message.header.flags = NLM_F_REQUEST | NLM_F_ACK | flags;
        self.sequence += 1;
        message.header.sequence_number = self.sequence;
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        self.socket.send(&bytes, 0)?;
        self.replies(|_, payload| each(payload)).map(drop)
    }

    /// One change as bytes after the header, which is put before them.
    pub(crate) fn request_raw(&mut self, kind: u16, flags: u16, body: &[u8]) -> Result<(), Refused> {
        self.send_raw(kind, NLM_F_REQUEST | NLM_F_ACK | flags, body)?;
        self.replies(|_, _| {}).map(drop)
    }

    /// Every object of a kind, as type and bytes after the header; all seen at one time.
    pub(crate) fn dump(&mut self, kind: u16, body: &[u8], mut each: impl FnMut(&[u8])) -> Result<(), Refused> {
        for _ in 0..DUMP_TRIES {
            let mut found = Vec::new();
            self.send_raw(kind, NLM_F_REQUEST | NLM_F_DUMP, body)?;
            let whole = self.replies(|_, payload| found.push(payload.to_vec()))?;
            if whole {
                found.iter().for_each(|payload| each(payload));
                return Ok(());
            }
        }
        Err(Refused(Errno::AGAIN))
    }

    /// Changes of one netfilter subsystem, each as type, flags and bytes after the header: all of them or none.
    pub(crate) fn transaction(&mut self, subsystem: u8, changes: &[(u16, u16, Vec<u8>)]) -> Result<(), Refused> {
        let Some(last) = changes.len().checked_sub(1) else { return Ok(()) };
        // `struct nfgenmsg`: no family, version 0, the subsystem in network order.
        let frame = [0, 0, 0, subsystem];
        let mut bytes = Vec::new();
        self.append(&mut bytes, BATCH_BEGIN, NLM_F_REQUEST, &frame)?;
        let first = self.sequence;
        for (n, (kind, flags, body)) in changes.iter().enumerate() {
            // What is acknowledged last is so after all of it is in force.
            let ack = if n == last { NLM_F_ACK } else { 0 };
            self.append(&mut bytes, *kind, NLM_F_REQUEST | ack | flags, body)?;
        }
        let awaited = self.sequence;
        self.append(&mut bytes, BATCH_END, NLM_F_REQUEST, &frame)?;
        self.socket.set_cap_ack(true)?;
        self.socket.send(&bytes, 0)?;
        self.outcome(first, awaited)
    }

    /// The first refusal of any of these, else whether the last was acknowledged. All answers are there when the kernel has
    /// taken a transaction; when it throws one away as a whole, some never come.
    fn outcome(&self, first: u32, last: u32) -> Result<(), Refused> {
        let mut acknowledged = false;
        loop {
            let mut bytes = Vec::with_capacity(ACKNOWLEDGEMENT);
            match self.socket.recv(&mut bytes, libc::MSG_DONTWAIT) {
                Ok(_) => {}
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error.into()),
            }
            let mut rest = &bytes[..];
            while let Some(message) = Message::split(&mut rest) {
                if message.kind != NLMSG_ERROR || !(first..=last).contains(&message.sequence) {
                    continue;
                }
                match message.error() {
                    Some(errno) => return Err(Refused(errno)),
                    None => acknowledged |= message.sequence == last,
                }
            }
        }
        if acknowledged { Ok(()) } else { Err(Refused(Errno::IO)) }
    }

    fn send_raw(&mut self, kind: u16, flags: u16, body: &[u8]) -> Result<(), Refused> {
        let mut bytes = Vec::with_capacity(HEADER + body.len());
        self.append(&mut bytes, kind, flags, body)?;
        self.socket.send(&bytes, 0)?;
        Ok(())
    }

    fn append(&mut self, bytes: &mut Vec<u8>, kind: u16, flags: u16, body: &[u8]) -> Result<(), Refused> {
        self.sequence += 1;
        let length = u32::try_from(HEADER + body.len()).map_err(|_| Refused(Errno::MSGSIZE))?;
        bytes.extend_from_slice(&length.to_ne_bytes());
        bytes.extend_from_slice(&kind.to_ne_bytes());
        bytes.extend_from_slice(&flags.to_ne_bytes());
        bytes.extend_from_slice(&self.sequence.to_ne_bytes());
        // The kernel knows our address.
        bytes.extend_from_slice(&0_u32.to_ne_bytes());
        bytes.extend_from_slice(body);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        Ok(())
    }

    /// Reads to the acknowledgement or the dump's end. Whether nothing changed while a dump was made.
    fn replies(&mut self, mut each: impl FnMut(u16, &[u8])) -> Result<bool, Refused> {
        let mut whole = true;
        loop {
            let (bytes, _) = self.socket.recv_from_full()?;
            let mut rest = &bytes[..];
            while let Some(message) = Message::split(&mut rest) {
                if message.sequence != self.sequence {
                    continue;
                }
                whole &= message.flags & NLM_F_DUMP_INTR == 0;
                match message.kind {
                    NLMSG_NOOP => {}
                    NLMSG_ERROR | NLMSG_DONE => {
                        // The end of a dump may say an errno too; without one it stands for success.
                        return message.error().map_or(Ok(whole), |errno| Err(Refused(errno)));
                    }
                    kind => each(kind, message.payload),
                }
            }
        }
    }
}

struct Message<'a> {
    kind: u16,
    flags: u16,
    sequence: u32,
    payload: &'a [u8],
}

impl<'a> Message<'a> {
    /// Of an answer that ends an exchange; none is success.
    fn error(&self) -> Option<Errno> {
        let code = self.payload.first_chunk().map_or(0, |code| i32::from_ne_bytes(*code));
        (code < 0).then(|| Errno::from_raw_os_error(-code))
    }

    fn split(rest: &mut &'a [u8]) -> Option<Self> {
        let header = rest.first_chunk::<HEADER>()?;
        let [a, b, c, d, e, f, g, h, i, j, k, l, ..] = *header;
        let length = usize::try_from(u32::from_ne_bytes([a, b, c, d])).ok()?;
        let payload = rest.get(HEADER..length)?;
        *rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(Self {
            kind: u16::from_ne_bytes([e, f]),
            flags: u16::from_ne_bytes([g, h]),
            sequence: u32::from_ne_bytes([i, j, k, l]),
            payload,
        })
    }
}

/// The attributes in `bytes`, without the flags in their type; stops at one that does not fit.
pub(crate) fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let [a, b, c, d] = *bytes.first_chunk()?;
        let length = usize::from(u16::from_ne_bytes([a, b]));
        let value = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((u16::from_ne_bytes([c, d]) & NLA_TYPE_MASK, value))
    })
}

/// One more attribute at the end of a message; `kind` with its flags.
pub(crate) fn append_attribute(bytes: &mut Vec<u8>, kind: u16, value: &[u8]) {
    // What we send, or were sent as an attribute, is shorter than 64 KiB.
    let length = u16::try_from(value.len() + 4).unwrap_or(u16::MAX);
    bytes.extend_from_slice(&length.to_ne_bytes());
    bytes.extend_from_slice(&kind.to_ne_bytes());
    bytes.extend_from_slice(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
}

/// A string attribute, without its terminator.
pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes.strip_suffix(&[0]).unwrap_or(bytes)).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_that_lie_end_the_list() {
        let good = [6, 0, 3, 0x80, b'a', 0, 0, 0, 5, 0, 4, 0, 9];
        let list: Vec<_> = attributes(&good).collect();
        assert_eq!(list, [(3, &b"a\0"[..]), (4, &[9][..])]);
        assert_eq!(text(list[0].1), "a");
        for bad in [&[0, 0, 1, 0][..], &[3, 0, 1, 0], &[200, 0, 1, 0, 5], &[1]] {
            assert_eq!(attributes(bad).count(), 0, "{bad:?}");
        }
    }

    #[test]
    fn messages_that_lie_end_the_list() {
        let mut short = &[255, 255, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0][..];
        assert!(Message::split(&mut short).is_none());
        let mut small = &[4, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0][..];
        assert!(Message::split(&mut small).is_none());
    }
}
