//! Marks that hide what lower layers have, and the removal of whole trees.

use std::hash::BuildHasher;
use std::os::fd::{AsFd, BorrowedFd};

use clawpot_types::{Kind, Result};
use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::Errno;

use super::{Tree, bad, failed, join};
use crate::unpack::tar::shown;

impl Tree {
    /// `.wh.NAME` hides what lower layers have under this name, `.wh..wh..opq` all that they have in this directory.
    pub(super) fn whiteout(&mut self, parent: &[u8], hidden: &[u8], path: &[u8]) -> Result<()> {
        let opaque = hidden == b".wh..opq";
        if hidden.starts_with(b".wh.") && !opaque {
            // Of aufs, whose own files these are.
            return Ok(());
        }
        if matches!(hidden, b"" | b"." | b"..") {
            return Err(bad(format!("whiteout {}: hides nothing", shown(path))));
        }
        match self.enter(parent, false) {
            Ok(()) => {}
            // Nothing there to hide.
            Err(error) if error.kind() == Kind::NotFound => return Ok(()),
            Err(error) => return Err(error),
        }
        let (dir, full) = (rustix::io::dup(&self.dir()?.fd), self.dir()?.path.clone());
        let dir = dir.map_err(|errno| failed("opening the directory of", path, errno))?;
        if opaque {
            self.prune_below(dir.as_fd(), &full).map_err(|errno| failed("hiding what is in", &full, errno))
        } else {
            self.prune(dir.as_fd(), hidden, &full).map_err(|errno| failed("hiding", path, errno))
        }
    }

    /// Removes what this layer did not make.
    fn prune(&self, dir: BorrowedFd<'_>, name: &[u8], above: &[u8]) -> Result<(), Errno> {
        let full = join(above, name);
        if !self.made.contains(&self.hash.hash_one(full.as_slice())) {
            return remove(dir, name);
        }
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match rustix::fs::openat(dir, name, flags, Mode::empty()) {
            Ok(inner) => self.prune_below(inner.as_fd(), &full),
            // No directory: this layer's own, whole.
            Err(Errno::NOTDIR | Errno::LOOP | Errno::NOENT) => Ok(()),
            Err(errno) => Err(errno),
        }
    }

    fn prune_below(&self, dir: BorrowedFd<'_>, full: &[u8]) -> Result<(), Errno> {
        for name in names(dir)? {
            self.prune(dir, &name, full)?;
        }
        Ok(())
    }
}

fn names(dir: BorrowedFd<'_>) -> Result<Vec<Vec<u8>>, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let list = rustix::fs::Dir::new(rustix::fs::openat(dir, ".", flags, Mode::empty())?)?;
    let mut names = Vec::new();
    for entry in list {
        let name = entry?.file_name().to_bytes().to_vec();
        if !matches!(name.as_slice(), b"." | b"..") {
            names.push(name);
        }
    }
    Ok(names)
}

/// With everything below; links are not followed. As deep as the tree may be.
pub(super) fn remove(dir: BorrowedFd<'_>, name: &[u8]) -> Result<(), Errno> {
    match rustix::fs::unlinkat(dir, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        Err(Errno::ISDIR | Errno::PERM) => {}
        Err(errno) => return Err(errno),
    }
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let inner = rustix::fs::openat(dir, name, flags, Mode::empty())?;
    for below in names(inner.as_fd())? {
        remove(inner.as_fd(), &below)?;
    }
    rustix::fs::unlinkat(dir, name, AtFlags::REMOVEDIR)
}
