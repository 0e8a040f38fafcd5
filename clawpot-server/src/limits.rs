//! What a client may send and hold, all of it. Whatever is beyond is refused with the name of the limit; the table for people
//! is in SPECIFICATION.md ("What a client may send").
//!
//! What these come to, in bytes that one user can make the server hold: [`CALLS`] × [`clawpot_common::STREAM_WINDOW`] of data
//! that nobody takes (512 MiB), [`CALLS`] × [`SMALL`] of messages that are coming in (32 MiB), and [`LARGE`] (128 MiB).

use std::time::Duration;

use clawpot_common::{EXEC_CHUNK, MAX_MESSAGE_BYTES};

/// How much there is of something that callers share.
#[derive(Clone, Copy, Debug)]
pub struct Share {
    /// In words, for messages: "connections".
    pub what: &'static str,
    pub all: u64,
    /// For each user, root too.
    pub user: u64,
    /// Of `all`, what only root and the server's own user can have: whatever others do, somebody gets in to end it.
    pub root: u64,
}

/// Connections to the API. A CLI has one while it runs; a program that holds a thousand has lost count.
pub const CONNECTIONS: Share = Share { what: "connections", all: 1024, user: 512, root: 256 };
/// Connections to `/metrics`: scrapers are few.
pub const SCRAPERS: Share = Share { what: "connections", all: 32, user: 16, root: 8 };
/// Connections that are only there to be told that there are too many; beyond these they are closed without a word.
pub const REFUSALS: Share = Share { what: "refusals", all: 64, user: 32, root: 16 };
/// Calls under way: one attached exec for each of the 1,023 VMs of a server, and as many watchers.
pub const CALLS: Share = Share { what: "calls under way", all: 4096, user: 2048, root: 1024 };
/// Messages over [`SMALL`] that are coming in or have just come, bytes in all.
pub const LARGE: Share = Share { what: "bytes of large messages", all: 256 << 20, user: 128 << 20, root: 64 << 20 };
/// Messages up to here are counted by their calls alone, bytes.
pub const SMALL: usize = 16 << 10;

/// Requests in flight on one connection; HTTP/2 has a client wait with more. A CLI has two.
pub const STREAMS_PER_CONNECTION: u32 = 256;

/// How long a connection may be open without a request having come.
pub const FIRST_REQUEST: Duration = Duration::from_secs(10);
/// How long a call may be open without its first message having come: 8 MiB at a megabyte a second, and then some.
pub const FIRST_MESSAGE: Duration = Duration::from_secs(30);
/// How long a connection lives that is one too many, and hears so.
pub const REFUSAL_LIFE: Duration = Duration::from_secs(5);
/// How long a scraper's connection lives. Some seconds pass between two scrapes; they may come over one connection.
pub const SCRAPER_LIFE: Duration = Duration::from_secs(300);

/// A request's headers: a path and some words of gRPC; names, values and 32 for each, as HTTP/2 counts them.
pub const HEADER_BYTES: usize = 16 << 10;
/// The same, enforced by HTTP/2 itself, which can say no more than status 431. Over the other one, so that most are told
/// which limit it was.
pub const HEADER_BYTES_READ: u32 = 64 << 10;

/// Largest messages of a call, bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    pub first: usize,
    /// Every one after it, where there are more.
    pub later: usize,
}

/// A message that only asks something.
const QUESTION: Message = Message::of(64 << 10);
/// A VM's environment and labels have 64 KiB each.
const CREATE: Message = Message::of(256 << 10);
/// The first has what a program is given: Linux takes 6 MiB of arguments and environment. Later ones are [`STDIN`] and a frame.
const EXEC: Message = Message { first: MAX_MESSAGE_BYTES, later: STDIN + (4 << 10) };
/// A piece of an archive, of an image or of what one is built from: the CLI's have 256 KiB.
const PIECE: Message = Message { first: 64 << 10, later: 512 << 10 };

impl Message {
    const fn of(bytes: usize) -> Self {
        Self { first: bytes, later: bytes }
    }

    /// Of the call at `path`.
    #[must_use]
    pub fn at(path: &str) -> Self {
        match path {
            "/clawpot.v1.VmService/CreateVm" => CREATE,
            "/clawpot.v1.VmService/Exec" => EXEC,
            "/clawpot.v1.BuildService/Build" | "/clawpot.v1.ImageService/ImportImage" => PIECE,
            _ => QUESTION,
        }
    }
}

/// Longest text of an error, bytes: it is sent in a header, of which clients take 8 to 16 KiB.
pub const ERROR_BYTES: usize = 4 << 10;

/// Environment of a VM: entries, and bytes of all names and values. It is part of the record.
pub const ENV: usize = 256;
pub const ENV_BYTES: usize = 64 << 10;
/// Longest working directory (`PATH_MAX`) and user (`LOGIN_NAME_MAX`, doubled for "user:group"), bytes.
pub const CWD: usize = 4096;
pub const USER: usize = 512;
/// Arguments, and variables, of one exec. Their bytes are bounded by the message.
pub const WORDS: usize = 65_536;
/// A frame of standard input, bytes: twice what our own clients send.
pub const STDIN: usize = EXEC_CHUNK * 2;
/// Longest reference of an image elsewhere, user or password, bytes: registries' tokens have some kilobytes.
pub const CREDENTIAL: usize = 16 << 10;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_leave_something_for_everyone() {
        for share in [CONNECTIONS, SCRAPERS, REFUSALS, CALLS, LARGE] {
            assert!(share.user < share.all && share.root < share.all, "{share:?}");
            // One user beside root takes neither root's part nor all of the others'.
            assert!(share.user <= share.all - share.root, "{share:?}");
        }
        let most = EXEC.first as u64;
        assert!(LARGE.user >= 8 * most && LARGE.root >= most, "the largest message has room");
        const { assert!(CREATE.first > 3 * ENV_BYTES) };
    }
}
