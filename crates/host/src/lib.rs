//! The host's kernel, as far as drivers need it: the only place where a process is spawned or a file replaced.
//!
//! - [`fs`] atomic replacement, clones, links, trees, free space
//! - [`unix`] Unix sockets below a directory whose path may be longer than `sun_path`
//! - [`connect`] the `CONNECT <port>` handshake that leads to a port of a guest
//! - [`netns`] work done inside another network namespace, on threads that end there
//! - [`tap`] the packets of a tap device, for a VMM
//! - [`cgroup`] one named group per machine: its processes, their death, its limits
//! - [`process`] spawning, waiting, running tools, and telling one process from another
//! - [`watch`] a descriptor under the runtime's eye
//!
//! Called by every driver and by the server; calls none of them. Blocking functions say so.

pub mod cgroup;
pub mod connect;
pub mod fs;
pub mod netns;
pub mod process;
pub mod tap;
pub mod unix;

use std::os::fd::OwnedFd;

use clawpot_types::{Error, Result};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// `/proc/sys/kernel/random/boot_id`: another after each boot of the host.
pub fn boot_id() -> Result<String> {
    let path = "/proc/sys/kernel/random/boot_id";
    let text = std::fs::read_to_string(path).map_err(|error| Error::io(format!("reading {path}"), error))?;
    Ok(text.trim().to_owned())
}

/// `fd` under the runtime's eye. To be called inside a runtime.
pub fn watch(fd: OwnedFd, interest: Interest) -> std::io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` is open and means the same file as long as it lives, and the `AsyncFd` owns it.
    Ok(unsafe { AsyncFd::register_with_interest(fd, interest) }?)
}

/// An error of a system call while `what`.
pub(crate) fn failed(what: impl Into<String>, errno: rustix::io::Errno) -> Error {
    Error::io(what, errno.into())
}
