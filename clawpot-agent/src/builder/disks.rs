//! The host's disks, mounted for a build and unmounted behind it, so that the host finds them whole.

use std::fs::{DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt};
use std::path::Path;

use rustix::fs::{AtFlags, CWD, StatxAttributes, StatxFlags, statx};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use super::config::{Config, Device, Place};
use super::{Context, Failure};
use crate::boot::mounts::format_of_device;
use crate::console::say;

/// What a build has mounted; unmounted when dropped, at the latest.
#[derive(Debug, Default)]
pub struct Disks {
    mounted: Vec<Place>,
}

impl Disks {
    /// Mounts the output disk, and the input disk if the flake is there. What is mounted there already is taken as it is.
    pub fn mount(config: &Config, with_input: bool) -> Result<Self, Failure> {
        let mut disks = Self::default();
        disks.add("output", &config.output, MountFlags::empty())?;
        if with_input {
            disks.add("input", &config.input, MountFlags::RDONLY)?;
        }
        Ok(disks)
    }

    fn add(&mut self, what: &str, place: &Place, flags: MountFlags) -> Result<(), Failure> {
        let Some(device) = &place.device else { return Ok(()) };
        if is_mount_point(&place.path).context(format_args!("looking at {}", place.path.display()))? {
            return Ok(());
        }
        check(device).context(format_args!("{what} disk {}", device.path.display()))?;
        let doing = format!("mounting the {what} disk {} on {}", device.path.display(), place.path.display());
        let format = format_of_device(&device.path).context(&doing)?;
        DirBuilder::new().recursive(true).mode(0o755).create(&place.path).context(&doing)?;
        let flags = flags | MountFlags::NOSUID | MountFlags::NODEV;
        mount(&device.path, &place.path, format, flags, c"").context(&doing)?;
        self.mounted.push(place.clone());
        Ok(())
    }

    /// Everything is on the disks, and nothing of ours mounted. An error says what the host may find.
    pub fn release(mut self) -> Result<(), Failure> {
        let mut result = Ok(());
        while let Some(place) = self.mounted.pop() {
            let one = unmount_place(&place);
            result = result.and(one);
        }
        result
    }
}

impl Drop for Disks {
    fn drop(&mut self) {
        while let Some(place) = self.mounted.pop() {
            if let Err(failure) = unmount_place(&place) {
                say(format_args!("builder: {failure}"));
            }
        }
    }
}

fn unmount_place(place: &Place) -> Result<(), Failure> {
    let path = &place.path;
    let doing = format!("unmounting {}", path.display());
    let synced = File::open(path).and_then(|root| Ok(rustix::fs::syncfs(root)?)).context(&doing);
    // Someone who looks around in there by an exec keeps it, not its name; it was synced.
    let unmounted =
        unmount(path, UnmountFlags::empty()).or_else(|_| unmount(path, UnmountFlags::DETACH)).context(&doing);
    synced.and(unmounted)
}

fn is_mount_point(path: &Path) -> io::Result<bool> {
    match statx(CWD, path, AtFlags::NO_AUTOMOUNT, StatxFlags::TYPE) {
        Ok(found) => Ok(found.stx_attributes.contains(StatxAttributes::MOUNT_ROOT)),
        Err(Errno::NOENT) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

/// It is there, and not the disk that this machine runs on: the host attached nothing then.
fn check(device: &Device) -> io::Result<()> {
    let metadata = match std::fs::metadata(&device.path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(not_attached("there is no such device")),
        metadata => metadata?,
    };
    if !metadata.file_type().is_block_device() {
        return Err(not_attached("this is no block device"));
    }
    if metadata.rdev() == device.not {
        return Err(not_attached("this is the machine's own disk"));
    }
    Ok(())
}

fn not_attached(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::NotFound, format!("{why}; the host has not attached one"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_disk_of_the_host_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let say = |path: &Path, not: u64| check(&Device { path: path.into(), not }).unwrap_err().to_string();
        assert!(say(&dir.path().join("vdb"), 0).starts_with("there is no such device"));
        assert!(say("/dev/null".as_ref(), 0).starts_with("this is no block device"));
        assert!(is_mount_point("/proc".as_ref()).unwrap());
        assert!(!is_mount_point(dir.path()).unwrap());
        assert!(!is_mount_point(&dir.path().join("absent")).unwrap());
    }
}
