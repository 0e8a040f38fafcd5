//! Extra disks: each an ext4 that is mounted at its place. One that cannot be ends the boot: a program would else write beside it.

use std::fs::{DirBuilder, File};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use clawpot_types::ext4::{self, Superblock};
use rustix::mount::{MountFlags, mount as mount_at};

use super::cmdline::Mount;
use super::{BootError, Doing, Volume, mounts};
use crate::console::say;

/// `_IOW('f', 16, __u64)` of linux/ext4.h: blocks that the file system is to have.
const EXT4_IOC_RESIZE_FS: libc::c_ulong = 0x4008_6610;

/// Mounts them, outer places before inner ones; those that are written to are given back, inner ones first.
pub fn mount(volumes: &[Mount]) -> Result<Vec<Volume>, BootError> {
    let mut volumes: Vec<&Mount> = volumes.iter().collect();
    volumes.sort_by_key(|volume| volume.path.names().count());
    let mut written = Vec::new();
    for Mount { device, read_only, path } in volumes {
        let doing = || format!("mounting {device} (ext4) on {path}");
        // Whatever of the path is missing. What is there is taken as it is, a link of the image as well.
        DirBuilder::new().recursive(true).create(path.as_str()).doing(format_args!("making directory {path}"))?;
        // No device files: they would be ways around what the kernel's own /dev offers. Set-uid programs work as on any disk.
        let (flags, options) = match read_only {
            // With something in its journal this fails: that is the host's to bring in order first.
            true => (MountFlags::NODEV | MountFlags::RDONLY, c""),
            // As of the VM's own disk.
            false => (MountFlags::NODEV, c"noinit_itable"),
        };
        mount_at(device.as_str(), path.as_str(), "ext4", flags, options).doing(doing())?;
        if !read_only {
            if let Err(error) = fill(device, path.as_str()) {
                say(format_args!("{path}: its file system stays smaller than {device}: {error}"));
            }
            written.push(Volume { path: path.clone(), root: mounts::open_root(path.as_str())? });
        }
    }
    written.reverse();
    Ok(written)
}

/// The disk may have been made larger. Grown while it is mounted, the file system is whole whatever happens meanwhile: its journal
/// sees to it.
fn fill(device: &str, path: &str) -> io::Result<()> {
    let mut disk = File::open(device)?;
    let size = disk.seek(SeekFrom::End(0))?;
    let mut superblock = [0; ext4::LEN];
    disk.read_exact_at(&mut superblock, ext4::AT)?;
    let Some(blocks) = Superblock::of(&superblock).and_then(|superblock| missing(size, superblock)) else {
        return Ok(());
    };
    let root = File::open(path)?;
    // SAFETY: a descriptor that lives, and the number that the call reads.
    let grown = unsafe { libc::ioctl(root.as_raw_fd(), EXT4_IOC_RESIZE_FS, std::ptr::from_ref(&blocks)) };
    if grown == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// How many blocks it would have on the whole of a disk of `size` bytes; `None`: it has them.
fn missing(size: u64, superblock: Superblock<'_>) -> Option<u64> {
    Some(size / superblock.block()?).filter(|could| *could > superblock.blocks())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_too_small_grows() {
        let mut bytes = [0; ext4::LEN];
        bytes[0x38..0x3a].copy_from_slice(&[0x53, 0xef]);
        bytes[0x4..0x8].copy_from_slice(&65_536_u32.to_le_bytes());
        bytes[0x18] = 2;
        let missing = |size, bytes: &[u8; ext4::LEN]| missing(size, Superblock::of(bytes).unwrap());
        assert_eq!(missing(256 << 20, &bytes), None);
        // Less than a block more is nothing.
        assert_eq!(missing((256 << 20) + 4095, &bytes), None);
        assert_eq!(missing(512 << 20, &bytes), Some(131_072));
        bytes[0x150] = 1;
        assert_eq!(missing(512 << 20, &bytes), None);
        bytes[0x150] = 0;
        bytes[0x18] = 0xff;
        assert_eq!(missing(512 << 20, &bytes), None, "whatever a superblock says");
    }
}
