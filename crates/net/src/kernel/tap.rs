//! Taps: made here, opened by the VMM under the slot's uid.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;

use clawpot_types::{Error, Result};
use rustix::ioctl::{IntegerSetter, Opcode, Setter, ioctl};

/// Makes taps in the calling thread's namespace.
pub const TUN_DEVICE: &str = "/dev/net/tun";

// Of linux/if_tun.h. The kernel numbers them as if they passed an int, whatever they pass.
const TUNSETIFF: Opcode = rustix::ioctl::opcode::write::<libc::c_int>(b'T', 202);
const TUNSETPERSIST: Opcode = rustix::ioctl::opcode::write::<libc::c_int>(b'T', 203);
const TUNSETOWNER: Opcode = rustix::ioctl::opcode::write::<libc::c_int>(b'T', 204);
const TUNSETGROUP: Opcode = rustix::ioctl::opcode::write::<libc::c_int>(b'T', 206);

/// `struct ifreq` with flags in its union; the rest is padding to the size the kernel copies.
#[repr(C)]
struct Request {
    name: [u8; libc::IFNAMSIZ],
    flags: u16,
    padding: [u8; 22],
}

/// A tap that stays when it is closed and that only a process of this uid *and* gid may open. Frames on it carry a
/// virtio-net header, by which VMM and host pass large segments whole.
pub(crate) fn create(name: &str, uid: u32, gid: u32) -> Result<()> {
    let what = |doing: &str| format!("tap {name}: {doing}");
    let file = open()?;
    attach(&file, name).map_err(|error| Error::io(what("making it"), error))?;
    let set = |doing: &str, done: rustix::io::Result<()>| done.map_err(|errno| Error::io(what(doing), errno.into()));
    let (uid, gid) = (argument(uid), argument(gid));
    // SAFETY: each of the three takes its argument by value and reads no memory of ours.
    unsafe {
        set("setting its owner", ioctl(&file, IntegerSetter::<TUNSETOWNER>::new_usize(uid)))?;
        set("setting its group", ioctl(&file, IntegerSetter::<TUNSETGROUP>::new_usize(gid)))?;
        set("making it stay", ioctl(&file, IntegerSetter::<TUNSETPERSIST>::new_usize(1)))
    }
}

fn argument(id: u32) -> usize {
    usize::try_from(id).unwrap_or(usize::MAX)
}

pub(crate) fn open() -> Result<File> {
    File::options().read(true).write(true).open(Path::new(TUN_DEVICE)).map_err(|error| {
        Error::io(format!("opening {TUN_DEVICE}"), error).hint("load the module: modprobe tun; see `clawpot doctor`")
    })
}

/// Ties `file` to the tap of this name, which is made if there is none.
pub(crate) fn attach(file: &impl AsFd, name: &str) -> std::io::Result<()> {
    let mut request = Request { name: [0; libc::IFNAMSIZ], flags: flags()?, padding: [0; 22] };
    let bytes = name.as_bytes();
    // One byte is the terminator's.
    request.name[..libc::IFNAMSIZ - 1]
        .get_mut(..bytes.len())
        .ok_or(std::io::ErrorKind::InvalidInput)?
        .copy_from_slice(bytes);
    // SAFETY: TUNSETIFF reads one `struct ifreq`, which is at most as large as `Request` and of the same layout.
    unsafe { ioctl(file, Setter::<TUNSETIFF, _>::new(request)) }.map_err(Into::into)
}

fn flags() -> std::io::Result<u16> {
    u16::try_from(libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR).map_err(std::io::Error::other)
}
