//! The file systems: the kernel's own, and the image under the VM's disk as root.

use std::ffi::CStr;
use std::fs::{DirBuilder, File, Permissions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt, symlink};
use std::path::Path;

use clawpot_types::guest::IMAGE_DEVICE;
use rustix::fs::{Mode, OFlags};
use rustix::mount::{MountFlags, mount, mount_move};

use super::{BootError, Doing, identity, modules};

/// Where things are while the root is still the initramfs.
const IMAGE: &str = "/image";
const DISK: &str = "/disk";
const ROOT: &str = "/root";

/// Directory of the execs' cgroups.
pub const EXECS: &str = "/sys/fs/cgroup/clawpot";

const SAFE: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV).union(MountFlags::NOEXEC);

/// proc, sys and dev in the initramfs; they move with the root later.
pub fn kernel_file_systems() -> Result<(), BootError> {
    put("proc", "/proc", "proc", SAFE, c"")?;
    put("sysfs", "/sys", "sysfs", SAFE, c"")?;
    put("devtmpfs", "/dev", "devtmpfs", MountFlags::NOSUID, c"mode=755")
}

/// Files of [`identity::FILES`] that the VM's own disk has none of: they come from the image, or are not there.
pub type Fresh = Vec<&'static str>;

/// Mounts image and disk (`device`), one over the other, makes that the root and mounts the rest.
/// The disk's root directory is kept open: it has no path afterwards.
pub fn root_file_system(device: &str) -> Result<(OwnedFd, Fresh), BootError> {
    let format =
        format_of_device(IMAGE_DEVICE.as_ref()).doing(format_args!("recognising the file system of {IMAGE_DEVICE}"))?;
    if format == "erofs" {
        modules::load_late("erofs.ko");
    }
    modules::drop_files();
    put(IMAGE_DEVICE, IMAGE, format, MountFlags::RDONLY, c"")?;
    // Tables of a fresh disk are not written in the background: the host's file stays as small as what is in it.
    put(device, DISK, "ext4", MountFlags::empty(), c"noinit_itable")?;
    directory("/disk/upper", 0o755)?;
    directory("/disk/work", 0o755)?;
    let fresh = identity::FILES.into_iter().filter(|file| is_absent(&Path::new("/disk/upper").join(file))).collect();
    // redirect_dir: a directory of the image can be renamed, as on any disk. Nobody but this guest ever mounts this upper.
    let layers = c"lowerdir=/image,upperdir=/disk/upper,workdir=/disk/work,redirect_dir=on";
    put("overlay", ROOT, "overlay", MountFlags::empty(), layers)?;
    let disk = open_root(DISK)?;
    for file_system in ["/proc", "/sys", "/dev"] {
        let target = format!("{ROOT}{file_system}");
        directory(&target, 0o755)?;
        mount_move(file_system, &target).doing(format_args!("moving {file_system} to {target}"))?;
    }
    switch_root()?;
    runtime_file_systems()?;
    Ok((disk, fresh))
}

pub(super) fn open_root(path: &str) -> Result<OwnedFd, BootError> {
    rustix::fs::open(path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .doing(format_args!("opening {path}"))
}

/// pivot_root does not work on an initramfs: the new root is moved over it instead.
fn switch_root() -> Result<(), BootError> {
    let doing = "making the overlay the root";
    rustix::process::chdir(ROOT).doing(doing)?;
    mount_move(".", "/").doing(doing)?;
    rustix::process::chroot(".").doing(doing)?;
    rustix::process::chdir("/").doing(doing)
}

fn runtime_file_systems() -> Result<(), BootError> {
    let nosuid = MountFlags::NOSUID | MountFlags::NODEV;
    put("devpts", "/dev/pts", "devpts", MountFlags::NOSUID | MountFlags::NOEXEC, c"gid=5,mode=620,ptmxmode=666")?;
    put("tmpfs", "/dev/shm", "tmpfs", nosuid, c"mode=1777")?;
    put("tmpfs", "/run", "tmpfs", nosuid, c"mode=755")?;
    put("cgroup2", "/sys/fs/cgroup", "cgroup2", SAFE, c"nsdelegate")?;
    directory("/run/lock", 0o1777)?;
    // On the disk, as in Debian: memory is what a small VM has least of.
    directory("/tmp", 0o1777)?;
    for (link, target) in
        [("/dev/fd", "/proc/self/fd"), ("/dev/stdin", "fd/0"), ("/dev/stdout", "fd/1"), ("/dev/stderr", "fd/2")]
    {
        symlink(target, link).doing(format_args!("linking {link} to {target}"))?;
    }
    Ok(())
}

/// "ext4" or "erofs", by what is written where their superblocks are.
pub fn format_of_device(path: &Path) -> io::Result<&'static str> {
    let mut superblock = [0; 1024];
    let mut device = File::open(path)?;
    device.seek(SeekFrom::Start(1024))?;
    device.read_exact(&mut superblock)?;
    format_of(&superblock).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "neither ext4 nor erofs"))
}

fn format_of(superblock: &[u8; 1024]) -> Option<&'static str> {
    if superblock[0x38..0x3a] == 0xEF53_u16.to_le_bytes() {
        Some("ext4")
    } else if superblock[..4] == 0xE0F5_E1E2_u32.to_le_bytes() {
        Some("erofs")
    } else {
        None
    }
}

/// Mounts on `target`, which is made if it is not there.
fn put(source: &str, target: &str, format: &str, flags: MountFlags, options: &CStr) -> Result<(), BootError> {
    directory(target, 0o755)?;
    mount(source, target, format, flags, options).doing(format_args!("mounting {source} ({format}) on {target}"))
}

/// Makes it with exactly this mode unless something is there.
fn directory(path: &str, mode: u32) -> Result<(), BootError> {
    if !is_absent(Path::new(path)) {
        return Ok(());
    }
    let doing = format_args!("making directory {path}");
    DirBuilder::new().mode(mode).create(path).doing(doing)?;
    std::fs::set_permissions(path, Permissions::from_mode(mode)).doing(doing)
}

fn is_absent(path: &Path) -> bool {
    std::fs::symlink_metadata(path).is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_are_told_by_magic() {
        let mut block = [0; 1024];
        assert_eq!(format_of(&block), None);
        block[..4].copy_from_slice(&[0xe2, 0xe1, 0xf5, 0xe0]);
        assert_eq!(format_of(&block), Some("erofs"));
        block[0x38..0x3a].copy_from_slice(&[0x53, 0xef]);
        assert_eq!(format_of(&block), Some("ext4"));
    }
}
