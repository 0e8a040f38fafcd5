//! The tree that layers are laid into. Every path is resolved by the kernel inside the tree (`openat2`, `RESOLVE_IN_ROOT`): a
//! symbolic link that says `/etc` means the tree's. What would climb out of the tree is an error, not clamped.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::hash::{BuildHasher, RandomState};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use clawpot_types::{Error, Kind, Result};
use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Timestamps, Uid, XattrFlags};
use rustix::io::Errno;

use super::tar::{Entry, What, shown};

/// Owners of the user namespace: 0 to 65,535.
const OWNERS: u64 = 65_536;
/// Longest symbolic link, bytes (`PATH_MAX` without its NUL).
const LINK_MAX: usize = 4095;
/// Names of directories kept for their times, bytes in all: a million of 60 bytes.
const DIRECTORY_NAMES: usize = 64 << 20;
/// As the kernel has it (`MAXSYMLINKS`).
const SYMLINKS: usize = 40;
/// Attributes that are taken over. Others are the host's (`trusted.*`) or of a security module that the guest does not have.
const XATTRS: [&[u8]; 3] = [b"user.", b"security.capability", b"system.posix_acl_"];

#[derive(Debug)]
pub struct Tree {
    root: OwnedFd,
    /// Of the root as the kernel names it, with a slash behind.
    prefix: Vec<u8>,
    depth: usize,
    /// The directory of the last entry: by the name it was asked by, with its true name.
    last: Option<(Vec<u8>, Dir)>,
    /// Whether it counts as this layer's.
    last_made: bool,
    /// Hashes of the paths that the current layer made: a whiteout hides what lower layers made, not these.
    made: HashSet<u64>,
    hash: RandomState,
    /// Times of directories, set when nothing is put into them any more.
    times: HashMap<Vec<u8>, i64>,
    names: usize,
    buffer: Vec<u8>,
    pub notes: Notes,
}

/// What was left out.
#[derive(Clone, Copy, Debug, Default)]
pub struct Notes {
    pub devices: u64,
    pub xattrs: u64,
}

#[derive(Debug)]
struct Dir {
    fd: OwnedFd,
    /// Without symbolic links, relative to the root; empty for the root itself.
    path: Vec<u8>,
}

fn bad(what: impl Into<String>) -> Error {
    Error::new(Kind::InvalidArgument, what)
}

fn failed(what: &str, path: &[u8], errno: Errno) -> Error {
    let what = format!("{what} {}", shown(path));
    match errno {
        Errno::DQUOT | Errno::FBIG => Error::new(Kind::Exhausted, what).because(io::Error::from(errno)),
        Errno::NAMETOOLONG | Errno::LOOP | Errno::NOTDIR | Errno::INVAL | Errno::ILSEQ => {
            bad(what).because(io::Error::from(errno))
        }
        _ => Error::io(what, errno.into()),
    }
}

/// A name inside the image, without `.` and slashes too many. Absolute names and `..` are refused.
pub fn clean(path: &[u8], depth: usize) -> Result<Vec<u8>> {
    let refuse = |why: &str| Err(bad(format!("entry {}: {why}", shown(path))));
    if path.starts_with(b"/") {
        return refuse("its name is absolute");
    }
    if path.contains(&0) {
        return refuse("its name has a NUL byte");
    }
    let mut clean = Vec::with_capacity(path.len());
    for (count, part) in path.split(|byte| *byte == b'/').filter(|part| !matches!(*part, b"" | b".")).enumerate() {
        match part {
            b".." => return refuse("its name has \"..\" in it"),
            _ if part.len() > 255 => return refuse("a part of its name is over 255 bytes"),
            _ if count >= depth => return refuse(&format!("it is over {depth} directories deep")),
            _ => {}
        }
        if !clean.is_empty() {
            clean.push(b'/');
        }
        clean.extend_from_slice(part);
    }
    Ok(clean)
}

fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|byte| *byte == b'/') {
        Some(at) => (&path[..at], &path[at + 1..]),
        None => (b"", path),
    }
}

fn join(dir: &[u8], name: &[u8]) -> Vec<u8> {
    if dir.is_empty() { name.to_owned() } else { [dir, b"/", name].concat() }
}

fn real_name(fd: BorrowedFd<'_>) -> Result<Vec<u8>> {
    let link = format!("/proc/self/fd/{}", fd.as_raw_fd());
    let name =
        rustix::fs::readlink(link.as_str(), Vec::new()).map_err(|errno| failed("finding", link.as_bytes(), errno))?;
    Ok(name.into_bytes())
}

impl Tree {
    /// `root`: an empty directory, opened for reading.
    pub fn new(root: OwnedFd, depth: usize) -> Result<Self> {
        let mut prefix = real_name(root.as_fd())?;
        prefix.push(b'/');
        Ok(Self {
            root,
            prefix,
            depth,
            last: None,
            last_made: false,
            made: HashSet::new(),
            hash: RandomState::new(),
            times: HashMap::new(),
            names: 0,
            buffer: vec![0; 256 << 10],
            notes: Notes::default(),
        })
    }

    pub fn next_layer(&mut self) {
        self.made.clear();
        self.last = None;
    }

    /// Lays one entry into the tree; `data` is what the archive has of it.
    pub fn put(&mut self, entry: &Entry, data: &mut impl Read) -> Result<()> {
        let path = clean(&entry.path, self.depth)?;
        if path.is_empty() {
            return match entry.what {
                What::Directory => self.attributes_of_root(entry),
                _ => Err(bad(format!("entry {}: only a directory can be the root", shown(&entry.path)))),
            };
        }
        let (parent, name) = split(&path);
        if let Some(hidden) = name.strip_prefix(b".wh.") {
            return self.whiteout(parent, hidden, &path);
        }
        if entry.what == What::Device {
            return self.device(&path);
        }
        owners(entry)?;
        self.enter(parent, true)?;
        let full = join(&self.dir()?.path, name);
        if full.split(|byte| *byte == b'/').count() > self.depth {
            return Err(bad(format!("entry {}: it is over {} directories deep", shown(&path), self.depth)));
        }
        match entry.what {
            What::Directory => self.directory(entry, name, &full)?,
            What::File => self.file(entry, name, &full, data)?,
            What::HardLink => self.hard_link(entry, name, &full)?,
            What::Symlink => self.symlink(entry, name, &full)?,
            What::Fifo => self.fifo(entry, name, &full)?,
            What::Device => {}
        }
        self.made.insert(self.hash.hash_one(full.as_slice()));
        Ok(())
    }

    /// The last step: the times of directories, which every new file in them changed. `time`: of those nobody spoke of.
    pub fn finish(mut self, time: i64) -> Result<Notes> {
        self.last = None;
        for (path, seconds) in std::mem::take(&mut self.times) {
            let fd = match self.open(&path) {
                Ok(fd) => fd,
                // Hidden by a later layer, or replaced.
                Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => continue,
                Err(errno) => return Err(failed("opening", &path, errno)),
            };
            rustix::fs::utimensat(fd, ".", &times(seconds), AtFlags::empty())
                .map_err(|errno| failed("setting the time of", &path, errno))?;
        }
        rustix::fs::utimensat(&self.root, ".", &times(time), AtFlags::empty())
            .map_err(|errno| failed("setting the time of", b"/", errno))?;
        Ok(self.notes)
    }

    fn dir(&self) -> Result<&Dir> {
        self.last.as_ref().map(|(_, dir)| dir).ok_or_else(|| Error::new(Kind::Internal, "no directory is open"))
    }

    fn open(&self, path: &[u8]) -> Result<OwnedFd, Errno> {
        self.openat2(path, ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_SYMLINKS)
    }

    fn openat2(&self, path: &[u8], resolve: ResolveFlags) -> Result<OwnedFd, Errno> {
        let path = if path.is_empty() { b".".as_slice() } else { path };
        loop {
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            match rustix::fs::openat2(&self.root, path, flags, Mode::empty(), resolve) {
                Err(Errno::AGAIN | Errno::INTR) => {}
                done => return done,
            }
        }
    }

    /// Opens the directory `path`. With `make`, what is missing of it is made, and it counts as this layer's.
    fn enter(&mut self, path: &[u8], make: bool) -> Result<()> {
        if self.last.as_ref().is_none_or(|(name, _)| name != path) {
            let dir = match self.open(path) {
                Ok(fd) => Dir { fd, path: path.to_owned() },
                Err(Errno::LOOP) => self.through_links(path, make)?,
                Err(Errno::NOENT) if make => self.make(path)?,
                Err(errno) => return Err(failed("opening the directory", path, errno)),
            };
            self.last = Some((path.to_owned(), dir));
            self.last_made = false;
        }
        if make && !self.last_made {
            let full = self.dir()?.path.clone();
            let ends = full.iter().enumerate().filter(|(_, byte)| **byte == b'/').map(|(at, _)| at);
            for end in ends.chain([full.len()]) {
                self.made.insert(self.hash.hash_one(&full[..end]));
            }
            self.last_made = true;
        }
        Ok(())
    }

    /// A path with symbolic links in it, none of which leaves the tree.
    fn through_links(&mut self, path: &[u8], make: bool) -> Result<Dir> {
        self.climbs(path)?;
        let fd = match self.openat2(path, ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS) {
            Ok(fd) => fd,
            Err(Errno::NOENT) if make => return self.make(path),
            Err(errno) => return Err(failed("opening the directory", path, errno)),
        };
        let name = real_name(fd.as_fd())?;
        let inside = name.strip_prefix(self.prefix.as_slice()).unwrap_or_default();
        Ok(Dir { fd, path: inside.to_owned() })
    }

    /// Makes the last part of `path`, and what is above it.
    fn make(&mut self, path: &[u8]) -> Result<Dir> {
        let (parent, name) = split(path);
        self.enter(parent, true)?;
        let dir = self.dir()?;
        match rustix::fs::mkdirat(&dir.fd, name, Mode::from_raw_mode(0o755)) {
            Ok(()) => {}
            Err(Errno::EXIST) => return Err(bad(format!("entry in {}: this is a link to nothing", shown(path)))),
            Err(errno) => return Err(failed("making the directory", path, errno)),
        }
        let full = join(&dir.path, name);
        let fd = self.open(&full).map_err(|errno| failed("opening the directory", &full, errno))?;
        // An archive that does not speak of a directory does not tell its time either.
        self.remember(&full, 0)?;
        Ok(Dir { fd, path: full })
    }

    /// An error where a symbolic link on the way says `..` more often than there are directories above it.
    fn climbs(&self, path: &[u8]) -> Result<()> {
        let escapes = || bad(format!("entry in {}: a symbolic link on the way leads out of the image", shown(path)));
        let mut todo: Vec<Vec<u8>> = path.split(|byte| *byte == b'/').rev().map(<[u8]>::to_vec).collect();
        let mut at: Vec<Vec<u8>> = Vec::new();
        let mut links = 0;
        while let Some(part) = todo.pop() {
            match part.as_slice() {
                b"" | b"." => continue,
                b".." => drop(at.pop().ok_or_else(escapes)?),
                _ => {
                    at.push(part);
                    let here = at.join(b"/".as_slice());
                    let target = match rustix::fs::readlinkat(&self.root, here.as_slice(), Vec::new()) {
                        Ok(target) => target.into_bytes(),
                        // No link, or nothing there.
                        Err(Errno::INVAL | Errno::NOENT | Errno::NOTDIR) => continue,
                        Err(errno) => return Err(failed("reading the link", &here, errno)),
                    };
                    links += 1;
                    if links > SYMLINKS {
                        return Err(failed("opening the directory", path, Errno::LOOP));
                    }
                    at.pop();
                    if target.starts_with(b"/") {
                        at.clear();
                    }
                    todo.extend(target.split(|byte| *byte == b'/').rev().map(<[u8]>::to_vec));
                }
            }
        }
        Ok(())
    }

    fn remember(&mut self, full: &[u8], seconds: i64) -> Result<()> {
        if self.times.insert(full.to_owned(), seconds).is_none() {
            self.names += full.len();
        }
        if self.names <= DIRECTORY_NAMES {
            return Ok(());
        }
        Err(Error::new(Kind::Exhausted, format!("the names of its directories are over {} MiB", DIRECTORY_NAMES >> 20)))
    }

    /// In the guest `/dev` is the kernel's own; a device anywhere else is nothing that an image needs.
    fn device(&mut self, path: &[u8]) -> Result<()> {
        if path.starts_with(b"dev/") {
            self.notes.devices += 1;
            return Ok(());
        }
        Err(bad(format!("entry {}: a device node outside /dev", shown(path)))
            .hint("make the image without it; a guest's devices are in /dev, which its kernel fills"))
    }

    fn attributes_of_root(&mut self, entry: &Entry) -> Result<()> {
        owners(entry)?;
        let mode = Mode::from_raw_mode(entry.mode);
        rustix::fs::chownat(&self.root, ".", Some(uid(entry)), Some(gid(entry)), AtFlags::empty())
            .and_then(|()| rustix::fs::fchmod(&self.root, mode))
            .map_err(|errno| failed("setting the attributes of", b"/", errno))
    }

    fn directory(&mut self, entry: &Entry, name: &[u8], full: &[u8]) -> Result<()> {
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

    fn file(&mut self, entry: &Entry, name: &[u8], full: &[u8], data: &mut impl Read) -> Result<()> {
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
                    Err(error) => return Err(super::limits::hit(error, "reading the archive")),
                }
            }
            write_sparse(file, &self.buffer[..have]).map_err(|error| written(error, full))?;
            length -= have as u64;
        }
        Ok(())
    }

    fn hard_link(&mut self, entry: &Entry, name: &[u8], full: &[u8]) -> Result<()> {
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

    fn symlink(&mut self, entry: &Entry, name: &[u8], full: &[u8]) -> Result<()> {
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

    fn fifo(&mut self, entry: &Entry, name: &[u8], full: &[u8]) -> Result<()> {
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

    /// `.wh.NAME` hides what lower layers have under this name, `.wh..wh..opq` all that they have in this directory.
    fn whiteout(&mut self, parent: &[u8], hidden: &[u8], path: &[u8]) -> Result<()> {
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
fn remove(dir: BorrowedFd<'_>, name: &[u8]) -> Result<(), Errno> {
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

fn owners(entry: &Entry) -> Result<()> {
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

fn times(seconds: i64) -> Timestamps {
    let time = rustix::fs::Timespec { tv_sec: seconds, tv_nsec: 0 };
    Timestamps { last_access: time, last_modification: time }
}
