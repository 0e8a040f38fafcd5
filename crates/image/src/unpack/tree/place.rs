//! One entry into its directory: file, link or whatever it is, in the place of what was there, with its attributes.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, BorrowedFd};

use clawpot_types::{Error, Kind, Result};
use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, Timestamps, Uid, XattrFlags};
use rustix::io::Errno;

use super::hide::remove;
use super::{Tree, bad, clean, failed, join, split};
use crate::unpack::limits;
use crate::unpack::tar::{Entry, shown};

/// Owners of the user namespace: 0 to 65,535.
const OWNERS: u64 = 65_536;
/// Longest symbolic link, bytes (`PATH_MAX` without its NUL).
const LINK_MAX: usize = 4095;
/// Attributes that are taken over. Others are the host's (`trusted.*`) or of a security module that the guest does not have.
const XATTRS: [&[u8]; 3] = [b"user.", b"security.capability", b"system.posix_acl_"];

impl Tree {
    /// In the guest `/dev` is the kernel's own; a device anywhere else is nothing that an image needs.
    pub(super) fn device(&mut self, path: &[u8]) -> Result<()> {
        if path.starts_with(b"dev/") {
            self.notes.devices += 1;
            return Ok(());
        }
        Err(bad(format!("entry {}: a device node outside /dev", shown(path)))
            .hint("make the image without it; a guest's devices are in /dev, which its kernel fills"))
    }

    pub(super) fn attributes_of_root(&mut self, entry: &Entry) -> Result<()> {
        owners(entry)?;
        let mode = Mode::from_raw_mode(entry.mode);
        rustix::fs::chownat(&self.root, ".", Some(uid(entry)), Some(gid(entry)), AtFlags::empty())
            .and_then(|()| rustix::fs::fchmod(&self.root, mode))
            .map_err(|errno| failed("setting the attributes of", b"/", errno))
    }

    pub(super) fn directory(&mut self, entry: &Entry, name: &[u8], full: &[u8]) -> Result<()> {
        let dir = self.dir()?;
        match rustix::fs::mkdirat(&dir.fd, name, Mode::from_raw_mode(0o700)) {
            Ok(()) => {}
            Err(Errno::EXIST) => {
                let stat = rustix::fs::statat(&dir.fd, name, AtFlags::SYMLINK_NOFOLLOW)
                    .map_err(|errno| failed("looking at", full, errno))?;
                if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
                    self.away(name, full)?;
                    rustix::fs::mkdirat(&self.dir()?.fd, name, Mode::from_raw_mode(0o700))
                        .map_err(|errno| failed("making", full, errno))?;
                }
            }
            Err(errno) => return Err(failed("making the directory", full, errno)),
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(&self.dir()?.fd, name, flags, Mode::empty())
            .map_err(|errno| failed("opening", full, errno))?;
        self.attributes(fd.as_fd(), entry, full)?;
        self.remember(full, entry.mtime)
    }

    pub(super) fn file(&mut self, entry: &Entry, name: &[u8], full: &[u8], data: &mut impl Read) -> Result<()> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mode = Mode::from_raw_mode(0o600);
        let fd = self.replacing(name, full, |dir| rustix::fs::openat(dir, name, flags, mode))?;
        let mut file = File::from(fd);
        let whole = [(0, entry.size)];
        for (at, length) in entry.sparse.as_deref().unwrap_or(&whole) {
            file.seek(SeekFrom::Start(*at)).map_err(|error| written(error, full))?;
            self.copy(&mut file, *length, full, data)?;
        }
        file.set_len(entry.size).map_err(|error| written(error, full))?;
        self.attributes(file.as_fd(), entry, full)?;
        rustix::fs::futimens(&file, &times(entry.mtime)).map_err(|errno| failed("setting the time of", full, errno))
    }

    /// `length` bytes of `data` to where `file` stands. Blocks of zeros become holes.
    fn copy(&mut self, file: &mut File, mut length: u64, full: &[u8], data: &mut impl Read) -> Result<()> {
        while length > 0 {
            let most = usize::try_from(length).unwrap_or(usize::MAX).min(self.buffer.len());
            let mut have = 0;
            // Whole buffers, so that blocks of zeros are seen as such.
            while have < most {
                match data.read(&mut self.buffer[have..most]) {
                    Ok(0) => return Err(bad(format!("the archive ends in file {}", shown(full)))),
                    Ok(read) => have += read,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(limits::hit(error, "reading the archive")),
                }
            }
            write_sparse(file, &self.buffer[..have]).map_err(|error| written(error, full))?;
            length -= have as u64;
        }
        Ok(())
    }

    pub(super) fn hard_link(&mut self, entry: &Entry, name: &[u8], full: &[u8]) -> Result<()> {
        let target =
            clean(&entry.link, self.depth).map_err(|error| error.context(format!("hard link {}", shown(full))))?;
        if target.is_empty() {
            return Err(bad(format!("hard link {}: to nothing", shown(full))));
        }
        let here = rustix::io::dup(&self.dir()?.fd).map_err(|errno| failed("opening the directory of", full, errno))?;
        let (parent, target_name) = split(&target);
        let missing = || bad(format!("hard link {}: to {}, which is not there", shown(full), shown(&target)));
        self.enter(parent, false).map_err(|error| match error.kind() {
            Kind::NotFound => missing(),
            _ => error.context(format!("hard link {}", shown(full))),
        })?;
        let there = self.dir()?;
        if rustix::fs::statat(&there.fd, target_name, AtFlags::SYMLINK_NOFOLLOW).is_err() {
            return Err(missing());
        }
        let link = || rustix::fs::linkat(&there.fd, target_name, &here, name, AtFlags::empty());
        match link() {
            Err(Errno::EXIST) if join(&there.path, target_name) == full => Ok(()),
            Err(Errno::EXIST) => {
                remove(here.as_fd(), name).map_err(|errno| failed("replacing", full, errno))?;
                link()
            }
            done => done,
        }
        .map_err(|errno| match errno {
            Errno::PERM => bad(format!("hard link {}: to {}, a directory", shown(full), shown(&target))),
            errno => failed("linking", full, errno),
        })
    }

    pub(super) fn symlink(&mut self, entry: &Entry, name: &[u8], full: &[u8]) -> Result<()> {
        let target = entry.link.as_slice();
        if target.is_empty() || target.len() > LINK_MAX || target.contains(&0) {
            return Err(bad(format!("symbolic link {}: to {}", shown(full), shown(target))));
        }
        self.replacing(name, full, |dir| rustix::fs::symlinkat(target, dir, name))?;
        let dir = &self.dir()?.fd;
        let flags = AtFlags::SYMLINK_NOFOLLOW;
        rustix::fs::chownat(dir, name, Some(uid(entry)), Some(gid(entry)), flags)
            .and_then(|()| rustix::fs::utimensat(dir, name, &times(entry.mtime), flags))
            .map_err(|errno| failed("setting the attributes of", full, errno))
    }

    pub(super) fn fifo(&mut self, entry: &Entry, name: &[u8], full: &[u8]) -> Result<()> {
        let make =
            |dir: BorrowedFd<'_>| rustix::fs::mknodat(dir, name, FileType::Fifo, Mode::from_raw_mode(entry.mode), 0);
        self.replacing(name, full, make)?;
        let dir = &self.dir()?.fd;
        let flags = AtFlags::SYMLINK_NOFOLLOW;
        rustix::fs::chownat(dir, name, Some(uid(entry)), Some(gid(entry)), flags)
            .and_then(|()| rustix::fs::chmodat(dir, name, Mode::from_raw_mode(entry.mode), AtFlags::empty()))
            .and_then(|()| rustix::fs::utimensat(dir, name, &times(entry.mtime), flags))
            .map_err(|errno| failed("setting the attributes of", full, errno))
    }

    /// Makes something at `name`, in the place of what was there.
    fn replacing<T>(
        &mut self,
        name: &[u8],
        full: &[u8],
        make: impl Fn(BorrowedFd<'_>) -> Result<T, Errno>,
    ) -> Result<T> {
        match make(self.dir()?.fd.as_fd()) {
            Err(Errno::EXIST) => {
                self.away(name, full)?;
                make(self.dir()?.fd.as_fd())
            }
            done => done,
        }
        .map_err(|errno| failed("making", full, errno))
    }

    fn away(&mut self, name: &[u8], full: &[u8]) -> Result<()> {
        remove(self.dir()?.fd.as_fd(), name).map_err(|errno| failed("replacing", full, errno))
    }

    /// Owner first: a change of owner takes set-uid bits and capabilities away.
    fn attributes(&mut self, fd: BorrowedFd<'_>, entry: &Entry, full: &[u8]) -> Result<()> {
        rustix::fs::fchown(fd, Some(uid(entry)), Some(gid(entry)))
            .and_then(|()| rustix::fs::fchmod(fd, Mode::from_raw_mode(entry.mode)))
            .map_err(|errno| failed("setting the attributes of", full, errno))?;
        for (name, value) in &entry.xattrs {
            let wanted = XATTRS.iter().any(|prefix| name.starts_with(prefix)) && !name.contains(&0);
            let set = wanted && rustix::fs::fsetxattr(fd, name.as_slice(), value, XattrFlags::empty()).is_ok();
            self.notes.xattrs += u64::from(!set);
        }
        Ok(())
    }
}

fn written(error: io::Error, full: &[u8]) -> Error {
    Error::io(format!("writing {}", shown(full)), error)
}

fn write_sparse(file: &mut File, mut bytes: &[u8]) -> io::Result<()> {
    /// A page, and a block of every file system in use.
    const BLOCK: usize = 4096;
    const ZEROS: [u8; BLOCK] = [0; BLOCK];
    let is_hole = |block: &[u8]| block.len() == BLOCK && block == ZEROS;
    while !bytes.is_empty() {
        let hole: usize = bytes.chunks(BLOCK).take_while(|block| is_hole(block)).map(<[u8]>::len).sum();
        if hole > 0 {
            file.seek_relative(i64::try_from(hole).unwrap_or_default())?;
        }
        let rest = &bytes[hole..];
        let data: usize = rest.chunks(BLOCK).take_while(|block| !is_hole(block)).map(<[u8]>::len).sum();
        file.write_all(&rest[..data])?;
        bytes = &rest[data..];
    }
    Ok(())
}

pub(super) fn owners(entry: &Entry) -> Result<()> {
    if entry.uid < OWNERS && entry.gid < OWNERS {
        return Ok(());
    }
    Err(bad(format!("entry {}: owner {}:{} is outside 0 to 65535", shown(&entry.path), entry.uid, entry.gid))
        .hint("make the image with owners in that range"))
}

// In range: `owners` was asked first.
fn uid(entry: &Entry) -> Uid {
    Uid::from_raw(u32::try_from(entry.uid).unwrap_or(u32::MAX - 1))
}

fn gid(entry: &Entry) -> Gid {
    Gid::from_raw(u32::try_from(entry.gid).unwrap_or(u32::MAX - 1))
}

pub(super) fn times(seconds: i64) -> Timestamps {
    let time = rustix::fs::Timespec { tv_sec: seconds, tv_nsec: 0 };
    Timestamps { last_access: time, last_modification: time }
}
