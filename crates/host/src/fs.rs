//! Files that are whole or not there. Everything here blocks.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use clawpot_failpoint::{self as failpoint, Point};
use clawpot_types::{Error, Kind, Result};
use rustix::fs::SeekFrom;
use rustix::io::Errno;

mod tree;

/// Writes `bytes` to a temporary name beside `path`, syncs, renames over `path`, syncs the directory.
/// Readers see the old file or the new one, also after a crash; `mode` is set whatever the umask.
pub fn replace(path: &Path, bytes: &[u8], mode: u32) -> Result<()> {
    put(path, bytes, mode, true)?;
    sync_dir(parent(path)?)
}

/// [`replace`] for what need not survive a power failure: whole after a crash of this process, and nothing is waited for.
pub fn replace_unsynced(path: &Path, bytes: &[u8], mode: u32) -> Result<()> {
    put(path, bytes, mode, false)
}

fn put(path: &Path, bytes: &[u8], mode: u32, sync: bool) -> Result<()> {
    let temp = temp_name(path)?;
    let written = write_new(&temp, bytes, mode, sync).and_then(|()| {
        failpoint::reached(Point::FileWritten);
        std::fs::rename(&temp, path)
    });
    written.map_err(|error| with_removal(Error::io(format!("replacing {}", path.display()), error), &temp))?;
    failpoint::reached(Point::FileReplaced);
    Ok(())
}

fn write_new(path: &Path, bytes: &[u8], mode: u32, sync: bool) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(bytes)?;
    file.set_permissions(std::fs::Permissions::from_mode(mode))?;
    if sync { file.sync_all() } else { Ok(()) }
}

/// `.<name>.<pid>-<n>.tmp` beside `path`: never a name that a finished file bears, never the same twice in a process.
pub fn temp_name(path: &Path) -> Result<PathBuf> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let name = path
        .file_name()
        .ok_or_else(|| Error::new(Kind::InvalidArgument, format!("{}: not a file's path", path.display())))?;
    let mut temp = std::ffi::OsString::from(".");
    temp.push(name);
    temp.push(format!(".{}-{}.tmp", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed)));
    Ok(path.with_file_name(temp))
}

/// How [`clone_file`] made its copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cloned {
    /// Blocks are shared until written; cost does not grow with the file.
    Reflink,
    /// Data was copied, holes stayed holes.
    Sparse {
        /// Bytes that were data, not holes.
        copied: u64,
    },
}

/// Copies `from` to `to`, which must not exist (`AlreadyExists`); mode 0600. Not synced: whoever renames it into place
/// syncs it first. Nothing is left when it fails.
pub fn clone_file(from: &Path, to: &Path) -> Result<Cloned> {
    let what = || format!("cloning {} to {}", from.display(), to.display());
    let source = File::open(from).map_err(|error| Error::io(what(), error))?;
    let target = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(to)
        .map_err(|error| Error::io(what(), error))?;
    match rustix::fs::ioctl_ficlone(&target, &source) {
        Ok(()) => return Ok(Cloned::Reflink),
        // Another file system, one that cannot, or files it cannot do it for: each has its own errno.
        Err(Errno::OPNOTSUPP | Errno::XDEV | Errno::INVAL | Errno::NOTTY | Errno::NOSYS | Errno::PERM) => {}
        Err(errno) => return Err(with_removal(Error::io(what(), errno.into()), to)),
    }
    copy_sparse(&source, &target)
        .map(|copied| Cloned::Sparse { copied })
        .map_err(|error| with_removal(Error::io(what(), error), to))
}

fn copy_sparse(source: &File, target: &File) -> io::Result<u64> {
    let length = source.metadata()?.len();
    target.set_len(length)?;
    let (mut at, mut copied) = (0, 0);
    while at < length {
        let start = match rustix::fs::seek(source, SeekFrom::Data(at)) {
            Ok(start) => start,
            // No data after here.
            Err(Errno::NXIO) => break,
            Err(errno) => return Err(errno.into()),
        };
        let end = rustix::fs::seek(source, SeekFrom::Hole(start))?;
        copy_range(source, target, start, end)?;
        copied += end - start;
        at = end;
    }
    Ok(copied)
}

fn copy_range(source: &File, target: &File, start: u64, end: u64) -> io::Result<()> {
    use std::os::unix::fs::FileExt;
    let (mut read_at, mut write_at) = (start, start);
    let mut in_kernel = true;
    let mut buffer = Vec::new();
    while read_at < end {
        let left = usize::try_from(end - read_at).unwrap_or(usize::MAX);
        if in_kernel {
            match rustix::fs::copy_file_range(source, Some(&mut read_at), target, Some(&mut write_at), left) {
                Ok(0) => return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the source became shorter")),
                Ok(_) => continue,
                Err(Errno::INTR) => continue,
                Err(Errno::XDEV | Errno::INVAL | Errno::OPNOTSUPP | Errno::NOSYS) => in_kernel = false,
                Err(errno) => return Err(errno.into()),
            }
        }
        // 256 KiB: constant memory whatever the file's size.
        buffer.resize(left.min(256 << 10), 0);
        source.read_exact_at(&mut buffer, read_at)?;
        target.write_all_at(&buffer, read_at)?;
        read_at += buffer.len() as u64;
        write_at = read_at;
    }
    Ok(())
}

/// Gives `from` the second name `to`. When `to` already is that file, nothing happens; another file there is
/// `AlreadyExists`. Two file systems are a `FailedPrecondition` that says so.
pub fn hard_link(from: &Path, to: &Path) -> Result<()> {
    let what = || format!("linking {} to {}", from.display(), to.display());
    match std::fs::hard_link(from, to) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            let (a, b) = (std::fs::symlink_metadata(from), std::fs::symlink_metadata(to));
            match (a, b) {
                (Ok(a), Ok(b)) if (a.dev(), a.ino()) == (b.dev(), b.ino()) => Ok(()),
                _ => Err(Error::io(what(), error)),
            }
        }
        Err(error) if error.kind() == io::ErrorKind::CrossesDevices => {
            Err(Error::new(Kind::FailedPrecondition, what()).because(error).hint(format!(
                "put {} and {} on one file system: images and machines share files by hard links",
                parent(from)?.display(),
                parent(to)?.display()
            )))
        }
        Err(error) => Err(Error::io(what(), error)),
    }
}

/// Removes what `path` names, with everything below; symbolic links are removed, not followed. Gone already is fine.
pub fn remove_tree_if_exists(path: &Path) -> Result<()> {
    let what = || format!("removing {}", path.display());
    let result = match std::fs::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => tree::remove(path),
        Ok(_) => std::fs::remove_file(path),
        Err(error) => Err(error),
    };
    gone_is_fine(result).map_err(|error| Error::io(what(), error))
}

/// Removes one file. Gone already is fine.
pub fn remove_file_if_exists(path: &Path) -> Result<()> {
    gone_is_fine(std::fs::remove_file(path)).map_err(|error| Error::io(format!("removing {}", path.display()), error))
}

fn gone_is_fine(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Makes one directory of exactly this mode, owned by the caller; one that exists is given the mode.
pub fn ensure_dir(path: &Path, mode: u32) -> Result<()> {
    let made = match std::fs::DirBuilder::new().mode(mode).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => Ok(()),
        other => other,
    };
    made.and_then(|()| std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)))
        .map_err(|error| Error::io(format!("making the directory {}", path.display()), error))
}

/// Makes a rename, a new file or a removal in `dir` survive a power failure.
pub fn sync_dir(dir: &Path) -> Result<()> {
    File::open(dir)
        .and_then(|dir| dir.sync_all())
        .map_err(|error| Error::io(format!("syncing the directory {}", dir.display()), error))
}

/// What a file system has left for a process without privileges.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Space {
    pub free_bytes: u64,
    pub total_bytes: u64,
    /// 0 of 0 where the file system does not count inodes (btrfs).
    pub free_inodes: u64,
    pub total_inodes: u64,
}

/// Of the file system that holds `path`.
pub fn space(path: &Path) -> Result<Space> {
    let stat = rustix::fs::statvfs(path)
        .map_err(|errno| crate::failed(format!("asking for free space at {}", path.display()), errno))?;
    Ok(Space {
        free_bytes: stat.f_bavail.saturating_mul(stat.f_frsize),
        total_bytes: stat.f_blocks.saturating_mul(stat.f_frsize),
        free_inodes: stat.f_favail,
        total_inodes: stat.f_files,
    })
}

/// Whether both paths are on one file system.
pub fn same_filesystem(a: &Path, b: &Path) -> Result<bool> {
    let device = |path: &Path| {
        std::fs::metadata(path)
            .map(|meta| meta.dev())
            .map_err(|error| Error::io(format!("looking at {}", path.display()), error))
    };
    Ok(device(a)? == device(b)?)
}

fn parent(path: &Path) -> Result<&Path> {
    match path.parent() {
        Some(parent) if parent.as_os_str().is_empty() => Ok(Path::new(".")),
        Some(parent) => Ok(parent),
        None => Err(Error::new(Kind::InvalidArgument, format!("{}: has no directory above it", path.display()))),
    }
}

/// `error`, and beside it the failure to remove what was half made.
fn with_removal(error: Error, half_made: &Path) -> Error {
    match remove_file_if_exists(half_made) {
        Ok(()) => error,
        Err(cleanup) => error.and_cleanup(cleanup),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn replacing_leaves_the_new_file_and_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("record");
        replace(&path, b"one", 0o600).unwrap();
        replace(&path, b"two", 0o640).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"two");
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o640);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
        // The target is a directory: an error, and nothing beside it.
        std::fs::create_dir(dir.path().join("d")).unwrap();
        assert!(replace(&dir.path().join("d"), b"", 0o600).is_err());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2);
    }

    #[test]
    fn a_clone_keeps_bytes_and_holes() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        let source = File::create(&from).unwrap();
        source.set_len(64 << 20).unwrap();
        source.write_all_at(b"head", 0).unwrap();
        source.write_all_at(&[7; 100_000], 32 << 20).unwrap();
        let how = clone_file(&from, &to).unwrap();
        assert_eq!(std::fs::read(&from).unwrap(), std::fs::read(&to).unwrap());
        if let Cloned::Sparse { copied } = how {
            assert!(copied < 1 << 20, "{copied} bytes of holes were copied");
            assert!(std::fs::metadata(&to).unwrap().blocks() * 512 < 1 << 20);
        }
        assert_eq!(clone_file(&from, &to).unwrap_err().kind(), Kind::AlreadyExists);
        assert_eq!(clone_file(&dir.path().join("none"), &dir.path().join("x")).unwrap_err().kind(), Kind::NotFound);
        assert!(!dir.path().join("x").exists());
    }

    #[test]
    fn links_are_idempotent_and_say_when_they_cross_file_systems() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        File::create(&a).unwrap();
        hard_link(&a, &b).unwrap();
        hard_link(&a, &b).unwrap();
        File::create(dir.path().join("c")).unwrap();
        assert_eq!(hard_link(&a, &dir.path().join("c")).unwrap_err().kind(), Kind::AlreadyExists);
        let shm = Path::new("/dev/shm");
        if shm.is_dir() && !same_filesystem(shm, dir.path()).unwrap() {
            let error = hard_link(&a, &shm.join("clawpot-test-never-made")).unwrap_err();
            assert_eq!(error.kind(), Kind::FailedPrecondition);
            assert!(error.next_step().unwrap().contains("one file system"));
        }
    }

    #[test]
    fn removal_follows_no_link_and_minds_no_absence() {
        let dir = tempfile::tempdir().unwrap();
        let tree = dir.path().join("tree");
        let kept = dir.path().join("kept");
        std::fs::create_dir_all(tree.join("a/b")).unwrap();
        std::fs::create_dir(&kept).unwrap();
        File::create(kept.join("file")).unwrap();
        std::os::unix::fs::symlink(&kept, tree.join("a/link")).unwrap();
        remove_tree_if_exists(&tree).unwrap();
        remove_tree_if_exists(&tree).unwrap();
        assert!(!tree.exists() && kept.join("file").exists());
        remove_file_if_exists(&tree).unwrap();
    }

    /// As a helper might leave it that an image captured.
    #[test]
    fn a_tree_of_any_depth_is_removed() {
        use rustix::fs::{AtFlags, Mode, OFlags};

        let dir = tempfile::tempdir().unwrap();
        let top = dir.path().join("tree");
        std::fs::create_dir(&top).unwrap();
        let open = |at: &std::os::fd::OwnedFd, name: &str| {
            rustix::fs::openat(at, name, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()).unwrap()
        };
        let mut at: std::os::fd::OwnedFd = File::open(&top).unwrap().into();
        // More than a thread's stack lasts for, or its descriptors. Names are as of those that are put aside.
        for depth in 0..12_000 {
            let name = if depth < 500 { ".deep-1" } else { "deep" };
            rustix::fs::mkdirat(&at, name, Mode::from_raw_mode(0o700)).unwrap();
            at = open(&at, name);
        }
        rustix::fs::symlinkat("/", &at, "link").unwrap();
        remove_tree_if_exists(&top).unwrap();
        assert!(rustix::fs::statat(rustix::fs::CWD, &top, AtFlags::SYMLINK_NOFOLLOW).is_err());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn space_is_told() {
        let space = space(Path::new("/")).unwrap();
        assert!(space.total_bytes >= space.free_bytes && space.total_bytes > 0);
    }
}
