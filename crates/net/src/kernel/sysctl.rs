//! Settings of the calling thread's network namespace. `/proc/sys/net` shows the namespace of whoever opens it.

use std::fs::File;
use std::io::Write as _;
use std::path::PathBuf;

use clawpot_types::{Error, Result};

/// All of a slot's namespace. What a new one inherits is the host administrator's choice, so every value that matters is
/// set. To be called before the links are made: they take their own from `default`.
pub(crate) fn set_slot() -> Result<()> {
    for scope in ["all", "default"] {
        for (key, value) in OF_A_ROUTER {
            set(&format!("ipv4/conf/{scope}/{key}"), value)?;
        }
        set_if_there(&format!("ipv6/conf/{scope}/disable_ipv6"), "1")?;
    }
    set("ipv4/ip_forward", "1")
}

/// The same for the host's end of a veth, which the host's own `default` has shaped.
pub(crate) fn set_host_link(name: &str) -> Result<()> {
    for (key, value) in OF_A_ROUTER {
        set(&format!("ipv4/conf/{name}/{key}"), value)?;
    }
    set_if_there(&format!("ipv6/conf/{name}/disable_ipv6"), "1")
}

/// Strict reverse path, no redirects, no source routes, no proxying, and ARP only for and with the asked link's own address.
const OF_A_ROUTER: [(&str, &str); 7] = [
    ("accept_redirects", "0"),
    ("send_redirects", "0"),
    ("accept_source_route", "0"),
    ("proxy_arp", "0"),
    ("rp_filter", "1"),
    ("arp_ignore", "1"),
    ("arp_announce", "2"),
];

/// Whether a link of this name is still known here. Unlike a question by netlink or ioctl it neither waits for the lock on
/// all links nor loads a module; it turns false only after the name is free.
pub(crate) fn link_is_known(name: &str) -> bool {
    path(&format!("ipv4/conf/{name}")).exists()
}

/// Whether this host forwards IPv4 at all. Never set here: it is the installer's, for all of the host.
pub fn ip_forward() -> Result<bool> {
    let path = path("ipv4/ip_forward");
    std::fs::read_to_string(&path)
        .map(|text| text.trim() == "1")
        .map_err(|error| Error::io(format!("reading {}", path.display()), error))
}

fn path(key: &str) -> PathBuf {
    PathBuf::from("/proc/sys/net").join(key)
}

fn set(key: &str, value: &str) -> Result<()> {
    write(key, value).map_err(|error| Error::io(format!("setting net/{key} to {value}"), error))
}

/// A kernel without IPv6 has nothing to switch off.
fn set_if_there(key: &str, value: &str) -> Result<()> {
    match write(key, value) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        done => done.map_err(|error| Error::io(format!("setting net/{key} to {value}"), error)),
    }
}

fn write(key: &str, value: &str) -> std::io::Result<()> {
    File::options().write(true).open(path(key))?.write_all(value.as_bytes())
}
