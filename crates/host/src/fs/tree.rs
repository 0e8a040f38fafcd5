//! Removing a tree that somebody else made. The standard library goes down into it by recursion, with a descriptor for each level: one
//! that is deep enough ends the whole process, and the next one that begins by removing it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags};
use rustix::io::Errno;

/// Directories above one another, and so descriptors open at once: images have 128. What lies deeper is put aside first.
const DEEPEST: usize = 200;

/// Removes the directory `path` with everything below. Follows no link.
pub(super) fn remove(path: &Path) -> io::Result<()> {
    let top = open(CWD, path)?;
    let mut removal = Removal { top: top.as_fd(), aside: 0 };
    loop {
        let before = removal.aside;
        removal.empty(top.as_fd(), 0)?;
        if removal.aside == before {
            break;
        }
    }
    Ok(rustix::fs::unlinkat(CWD, path, AtFlags::REMOVEDIR)?)
}

fn open(dir: BorrowedFd<'_>, name: impl rustix::path::Arg) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(dir, name, flags, Mode::empty())
}

struct Removal<'a> {
    top: BorrowedFd<'a>,
    /// How many directories were put aside, into the uppermost one.
    aside: u64,
}

impl Removal<'_> {
    fn empty(&mut self, dir: BorrowedFd<'_>, depth: usize) -> Result<(), Errno> {
        for entry in Dir::read_from(dir)? {
            let entry = entry?;
            let name = entry.file_name();
            if matches!(name.to_bytes(), b"." | b"..") {
                continue;
            }
            let is_dir = match entry.file_type() {
                FileType::Directory => true,
                FileType::Unknown => is_dir(dir, name)?,
                _ => false,
            };
            if !is_dir {
                gone_is_fine(rustix::fs::unlinkat(dir, name, AtFlags::empty()))?;
            } else if depth < DEEPEST {
                match open(dir, name) {
                    Ok(inner) => self.empty(inner.as_fd(), depth + 1)?,
                    Err(Errno::NOENT) => continue,
                    Err(errno) => return Err(errno),
                }
                gone_is_fine(rustix::fs::unlinkat(dir, name, AtFlags::REMOVEDIR))?;
            } else {
                self.put_aside(dir, name)?;
            }
        }
        Ok(())
    }

    /// Under a name that nothing in the uppermost directory has, to be removed from there.
    fn put_aside(&mut self, dir: BorrowedFd<'_>, name: &std::ffi::CStr) -> Result<(), Errno> {
        loop {
            self.aside += 1;
            match rustix::fs::renameat(dir, name, self.top, format!(".deep-{}", self.aside)) {
                Err(Errno::NOTEMPTY | Errno::EXIST | Errno::NOTDIR) => {}
                done => return gone_is_fine(done),
            }
        }
    }
}

fn is_dir(dir: BorrowedFd<'_>, name: &std::ffi::CStr) -> Result<bool, Errno> {
    match rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => Ok(FileType::from_raw_mode(stat.st_mode).is_dir()),
        Err(Errno::NOENT) => Ok(false),
        Err(errno) => Err(errno),
    }
}

fn gone_is_fine(done: Result<(), Errno>) -> Result<(), Errno> {
    match done {
        Err(Errno::NOENT) => Ok(()),
        done => done,
    }
}
