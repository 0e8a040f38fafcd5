//! The kernel modules that the initramfs carries: `/modules/order`, one file name a line, and the files.

use std::fs::File;
use std::io;
use std::path::Path;

use rustix::io::Errno;
use rustix::system::finit_module;

use super::cmdline::{CommandLine, Transport};
use super::{BootError, Doing};
use crate::console::say;

const DIRECTORY: &str = "/modules";

/// Vendor of virtio devices on PCI.
const VIRTIO_VENDOR: &str = "0x1af4";

/// Loads what this machine needs, in order. A module that fails is told and skipped: without what it would have driven a later
/// step fails with its own reason.
pub fn load(commands: &CommandLine) -> Result<(), BootError> {
    let directory = Path::new(DIRECTORY);
    let order = match std::fs::read_to_string(directory.join("order")) {
        // A kernel with everything built in.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        order => order.doing("reading /modules/order")?,
    };
    let on_pci = has_virtio_pci();
    for name in order.lines().map(str::trim).filter(|name| is_needed(name, commands.transport, on_pci)) {
        if let Err(error) = load_file(&directory.join(name)) {
            say(format_args!("loading {name}: {error}"));
        }
    }
    Ok(())
}

/// Loads the driver of a file system that an image turned out to have.
pub fn load_late(name: &str) {
    if let Err(error) = load_file(&Path::new(DIRECTORY).join(name))
        && error.kind() != io::ErrorKind::NotFound
    {
        say(format_args!("loading {name}: {error}"));
    }
}

/// Gives back the memory of the files, which nobody can reach once the root is another.
pub fn drop_files() {
    if let Err(error) = std::fs::remove_dir_all(DIRECTORY)
        && error.kind() != io::ErrorKind::NotFound
    {
        say(format_args!("removing {DIRECTORY}: {error}"));
    }
}

fn is_needed(name: &str, transport: Transport, on_pci: bool) -> bool {
    if name.is_empty() || name == "erofs.ko" {
        // erofs is loaded when the image is one.
        return false;
    }
    if name.contains("vsock") {
        return transport == Transport::Vsock;
    }
    if name.starts_with("virtio_pci") {
        return on_pci;
    }
    name != "virtio_mmio.ko" || !on_pci
}

fn has_virtio_pci() -> bool {
    let Ok(devices) = std::fs::read_dir("/sys/bus/pci/devices") else { return false };
    devices.filter_map(Result::ok).any(|device| {
        std::fs::read_to_string(device.path().join("vendor")).is_ok_and(|vendor| vendor.trim() == VIRTIO_VENDOR)
    })
}

fn load_file(path: &Path) -> io::Result<()> {
    let file = File::open(path)?;
    match finit_module(&file, c"", 0) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}
