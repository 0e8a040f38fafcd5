//! Addresses, by the oldest calls there are: a handful of ioctls on constants, no netlink needed.

use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use clawpot_types::guest::{
    GATEWAY_ADDRESS, GUEST_ADDRESS, GUEST_MAC, LINK_PREFIX, MANAGEMENT_ADDRESS, MANAGEMENT_MAC, mac_text,
};
use libc::{c_int, c_short, c_ulong};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

use super::{BootError, Doing};

/// A NIC is there as soon as its driver is; a host that gave none is told so after this.
const LIMIT: Duration = Duration::from_secs(5);

/// lo with 127.0.0.1, which the kernel adds by itself.
pub fn loopback() -> Result<(), BootError> {
    let socket = control_socket().doing("bringing lo up")?;
    bring_up(&socket, "lo").doing("bringing lo up")
}

/// The guest's NIC, its address and the way out.
pub fn guest() -> Result<(), BootError> {
    let device = nic(GUEST_MAC)?;
    let doing = format!("giving {device} the address {GUEST_ADDRESS}/{LINK_PREFIX} and the route by {GATEWAY_ADDRESS}");
    let socket = control_socket().doing(&doing)?;
    set_address(&socket, &device, GUEST_ADDRESS).doing(&doing)?;
    default_route(&socket, GATEWAY_ADDRESS).doing(&doing)
}

/// The management NIC; returns its name.
pub fn management() -> Result<String, BootError> {
    let device = nic(MANAGEMENT_MAC)?;
    let doing = format!("giving {device} the management address {MANAGEMENT_ADDRESS}/{LINK_PREFIX}");
    let socket = control_socket().doing(&doing)?;
    set_address(&socket, &device, MANAGEMENT_ADDRESS).doing(&doing)?;
    Ok(device)
}

/// What is sent and received by `socket` passes `device` and no other.
pub fn bind_to_device(socket: impl AsFd, device: &str) -> io::Result<()> {
    let length = libc::socklen_t::try_from(device.len()).map_err(io::Error::other)?;
    // SAFETY: the kernel reads `length` bytes of `device`.
    let result = unsafe {
        let fd = socket.as_fd().as_raw_fd();
        libc::setsockopt(fd, libc::SOL_SOCKET, libc::SO_BINDTODEVICE, device.as_ptr().cast(), length)
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// The name of the NIC with this MAC, waiting for it a little.
fn nic(mac: [u8; 6]) -> Result<String, BootError> {
    let text = mac_text(mac);
    let deadline = Instant::now() + LIMIT;
    loop {
        if let Some(name) = find(&text).doing("listing /sys/class/net")? {
            return Ok(name);
        }
        if Instant::now() >= deadline {
            return Err(io::Error::from(io::ErrorKind::TimedOut))
                .doing(format_args!("waiting for the NIC {text} (does the VMM have it, the initramfs its driver?)"));
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn find(mac: &str) -> io::Result<Option<String>> {
    for entry in Path::new("/sys/class/net").read_dir()? {
        let entry = entry?;
        // A NIC that goes away while we look is not ours.
        if std::fs::read_to_string(entry.path().join("address")).is_ok_and(|address| address.trim() == mac) {
            return Ok(entry.file_name().into_string().ok());
        }
    }
    Ok(None)
}

fn control_socket() -> io::Result<OwnedFd> {
    Ok(socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?)
}

fn set_address(socket: &OwnedFd, device: &str, address: Ipv4Addr) -> io::Result<()> {
    let mask = Ipv4Addr::from(u32::MAX.checked_shl(32 - u32::from(LINK_PREFIX)).unwrap_or(0));
    let mut request = request(device)?;
    request.ifr_ifru.ifru_addr = socket_address(address);
    control(socket, libc::SIOCSIFADDR, &mut request)?;
    request.ifr_ifru.ifru_netmask = socket_address(mask);
    control(socket, libc::SIOCSIFNETMASK, &mut request)?;
    bring_up(socket, device)
}

fn bring_up(socket: &OwnedFd, device: &str) -> io::Result<()> {
    let mut request = request(device)?;
    request.ifr_ifru.ifru_flags = c_short::try_from(libc::IFF_UP | libc::IFF_RUNNING).map_err(io::Error::other)?;
    control(socket, libc::SIOCSIFFLAGS, &mut request)
}

fn default_route(socket: &OwnedFd, gateway: Ipv4Addr) -> io::Result<()> {
    // SAFETY: a C struct of numbers and pointers; zero is its empty value.
    let mut route: libc::rtentry = unsafe { std::mem::zeroed() };
    route.rt_dst = socket_address(Ipv4Addr::UNSPECIFIED);
    route.rt_genmask = socket_address(Ipv4Addr::UNSPECIFIED);
    route.rt_gateway = socket_address(gateway);
    route.rt_flags = libc::RTF_UP | libc::RTF_GATEWAY;
    control(socket, libc::SIOCADDRT, &mut route)
}

fn request(device: &str) -> io::Result<libc::ifreq> {
    // SAFETY: as above.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // The last byte stays the NUL.
    if device.len() >= request.ifr_name.len() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "name too long for a device"));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(device.bytes()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    Ok(request)
}

/// A `sockaddr_in` in the clothes of a `sockaddr`.
fn socket_address(address: Ipv4Addr) -> libc::sockaddr {
    // SAFETY: as above.
    let mut socket: libc::sockaddr = unsafe { std::mem::zeroed() };
    socket.sa_family = libc::sa_family_t::try_from(libc::AF_INET).unwrap_or_default();
    // Two bytes of port, then the address.
    for (to, from) in socket.sa_data.iter_mut().skip(2).zip(SocketAddrV4::new(address, 0).ip().octets()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    socket
}

fn control<T>(socket: &OwnedFd, call: c_ulong, argument: &mut T) -> io::Result<()> {
    // SAFETY: each caller passes the struct that its call reads and writes.
    let result: c_int = unsafe { libc::ioctl(socket.as_raw_fd(), call, std::ptr::from_mut(argument)) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
