//! Tap devices, opened for a VMM: it is handed the descriptor and needs no `/dev/net/tun` of its own.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use clawpot_types::{Error, Kind, Result};
use rustix::net::{AddressFamily, SocketFlags, SocketType};

use crate::netns::in_netns;

/// Opens the taps `names` of the namespace at `netns`, in their order: whole Ethernet frames, each behind a
/// `virtio_net_hdr`. They must exist. Blocks for a thread's life, about 0.1 ms.
/// `NotFound`: no such tap, namespace or `/dev/net/tun`; `FailedPrecondition`: someone has it open.
pub fn open(netns: &Path, names: &[&str]) -> Result<Vec<OwnedFd>> {
    in_netns(netns, || {
        names
            .iter()
            .map(|name| {
                open_here(name).map_err(|error| error.context(format!("opening {name} in {}", netns.display())))
            })
            .collect()
    })
}

fn open_here(name: &str) -> Result<OwnedFd> {
    // TUNSETIFF would make what does not exist, and the guest would be without a network.
    let socket = rustix::net::socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)
        .map_err(|errno| crate::failed("making a socket", errno))?;
    rustix::net::netdevice::name_to_index(&socket, name).map_err(|_| {
        Error::new(Kind::NotFound, format!("looking for the tap {name}: the namespace has no such link"))
    })?;
    let tun =
        File::options().read(true).write(true).open("/dev/net/tun").map_err(|error| {
            Error::io("opening /dev/net/tun", error).hint("load the kernel's module tun: modprobe tun")
        })?;
    // SAFETY: all-zero is a valid `ifreq`.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.len() >= request.ifr_name.len() {
        return Err(Error::new(Kind::InvalidArgument, format!("{name}: longer than a link's name may be")));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(flags).map_err(|_| flags_too_wide())?;
    // SAFETY: the call reads and writes one `ifreq`, which is ours.
    if unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF as _, &raw mut request) } < 0 {
        let error = std::io::Error::last_os_error();
        return Err(match error.raw_os_error() {
            Some(libc::EBUSY) => Error::new(Kind::FailedPrecondition, "someone has it open").because(error),
            _ => Error::io("attaching to it", error),
        });
    }
    Ok(tun.into())
}

fn flags_too_wide() -> Error {
    Error::new(Kind::Internal, "the flags of a tap do not fit")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tap_that_does_not_exist_is_not_made() {
        match open(Path::new("/proc/self/ns/net"), &["cp-test-none"]) {
            Err(error) if error.kind() == Kind::PermissionDenied || error.chain().contains("entering") => {
                eprintln!("SKIPPED: entering a network namespace needs CAP_SYS_ADMIN");
            }
            result => assert_eq!(result.unwrap_err().kind(), Kind::NotFound),
        }
        assert!(!Path::new("/sys/class/net/cp-test-none").exists());
    }
}
