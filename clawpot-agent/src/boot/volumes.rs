//! Extra disks: each an ext4 that is mounted at its place. One that cannot be ends the boot: a program would else write beside it.

use std::fs::DirBuilder;

use rustix::mount::{MountFlags, mount as mount_at};

use super::cmdline::Mount;
use super::{BootError, Doing, Volume, mounts};

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
            written.push(Volume { path: path.clone(), root: mounts::open_root(path.as_str())? });
        }
    }
    written.reverse();
    Ok(written)
}
