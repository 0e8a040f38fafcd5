//! The tree that layers are laid into. Every path is resolved by the kernel inside the tree (`openat2`, `RESOLVE_IN_ROOT`): a
//! symbolic link that says `/etc` means the tree's. What would climb out of the tree is an error, not clamped.
//!
//! Here: names, and directories to put things into · [`place`] what is put there · [`hide`] what is taken away

mod hide;
mod place;

use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasher, RandomState};
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use clawpot_types::{Error, Kind, Result};
use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use super::tar::{Entry, What, shown};
use place::{owners, times};

/// Names of directories kept for their times, bytes in all: a million of 60 bytes.
const DIRECTORY_NAMES: usize = 64 << 20;
/// As the kernel has it (`MAXSYMLINKS`).
const SYMLINKS: usize = 40;

#[derive(Debug)]
pub struct Tree {
    root: OwnedFd,
    /// Of the root as the kernel names it, with a slash behind.
    prefix: Vec<u8>,
    depth: usize,
    /// Whether `.wh.NAME` is a file like any other.
    pub plain: bool,
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
            plain: false,
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
        if let Some(hidden) = name.strip_prefix(b".wh.").filter(|_| !self.plain) {
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
}
