//! What the server and its helper say to each other: one JSON message a packet, layers as descriptors beside it.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use clawpot_types::{Digest, Error, Kind, Result};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::limits::Limits;

/// The helper finds its end of the socket here, and the directory that it works in as its current one.
pub const SOCKET: i32 = 3;
/// Open as long as the helper lives, or what it has become: the lock on its owners.
pub const OWN: i32 = 4;
/// In that directory: the tree, and the file system made of it.
pub const TREE: &str = "tree";
pub const ROOTFS: &str = "rootfs";
/// What `debugfs` is to do.
pub const COMMANDS: &str = "commands";
/// Bytes of one message.
const MESSAGE: usize = 64 << 10;

/// To the helper.
#[derive(Debug, Serialize, Deserialize)]
pub enum Order {
    /// Its user namespace has its owners. With a file: the disk that it is to read for [`Self::Dump`].
    Mapped { limits: Limits },
    /// In the place of layers: `files` of the ext4 on that disk, to files of their names; `debugfs` is the program's path.
    Dump { files: Vec<String>, debugfs: String },
    /// The next layer, lowest first; its file comes along. `plain`: nothing in it is a mark.
    Layer { diff_id: Option<Digest>, plain: bool },
    /// That was the last one. Times are seconds since the epoch; `mke2fs` is the program's path.
    Make { uuid: String, time: i64, mke2fs: String },
}

/// From the helper.
#[derive(Debug, Serialize, Deserialize)]
pub enum Report {
    /// In a user namespace that has no owners yet.
    Unshared,
    /// Of the layer that is being unpacked: packed bytes read.
    Progress {
        read: u64,
    },
    LayerDone,
    /// The file system is being made, of this many bytes; how it goes is told by the exit status.
    Making {
        bytes: u64,
        devices: u64,
        xattrs: u64,
    },
    Failed {
        kind: Kind,
        what: String,
        hint: Option<String>,
    },
}

impl Report {
    #[must_use]
    pub fn failed(error: &Error) -> Self {
        let what = error.chain().chars().take(4000).collect();
        Self::Failed { kind: error.kind(), what, hint: error.next_step().map(str::to_owned) }
    }
}

pub fn send<T: Serialize>(socket: BorrowedFd<'_>, message: &T, file: Option<BorrowedFd<'_>>) -> Result<()> {
    let bytes =
        serde_json::to_vec(message).map_err(|error| Error::new(Kind::Internal, "encoding a message").because(error))?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let files: Vec<_> = file.into_iter().collect();
    if !files.is_empty() {
        control.push(SendAncillaryMessage::ScmRights(&files));
    }
    loop {
        match rustix::net::sendmsg(socket, &[IoSlice::new(&bytes)], &mut control, SendFlags::NOSIGNAL) {
            Ok(_) => return Ok(()),
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(Error::io("sending a message", errno.into())),
        }
    }
}

/// `None` when the other side is gone.
pub fn receive<T: DeserializeOwned>(socket: impl AsFd) -> Result<Option<(T, Option<OwnedFd>)>> {
    let mut bytes = vec![0; MESSAGE];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let length = loop {
        match rustix::net::recvmsg(&socket, &mut [IoSliceMut::new(&mut bytes)], &mut control, RecvFlags::CMSG_CLOEXEC) {
            Ok(got) => break got.bytes,
            Err(rustix::io::Errno::INTR) => {}
            Err(rustix::io::Errno::CONNRESET) => return Ok(None),
            Err(errno) => return Err(Error::io("receiving a message", errno.into())),
        }
    };
    if length == 0 {
        return Ok(None);
    }
    let file = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut files) => files.next(),
        _ => None,
    });
    let message = serde_json::from_slice(&bytes[..length])
        .map_err(|error| Error::new(Kind::Internal, "a message that makes no sense").because(error))?;
    Ok(Some((message, file)))
}
