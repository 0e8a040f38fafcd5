//! One cgroup per exec: its processes, also those that left its session, die with one write.

use std::fs::{DirBuilder, File};
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{Mode, OFlags};

use crate::lock;

/// Cgroups that the guest may nest in an exec's before we give up removing them.
const MAX_DEPTH: u32 = 16;

/// The cgroup2 directory that all execs' cgroups are in.
#[derive(Debug)]
pub struct Cgroups {
    root: PathBuf,
    /// Made while nobody waited: making one takes 0.4 ms under emulation, a sixth of what a warm exec costs besides its program.
    spare: Mutex<Option<Cgroup>>,
    /// Number of the next one. Names are not the execs' ids, which are not known when a spare is made.
    next: AtomicU64,
    /// Cgroups of ended execs in which processes live on.
    left: Mutex<Vec<PathBuf>>,
}

/// The cgroup of one exec.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
    dir: OwnedFd,
}

impl Cgroups {
    /// Makes `root` if it is not there; its parent must be in a cgroup2 file system.
    pub fn new(root: &Path) -> io::Result<Self> {
        make(root)?;
        Ok(Self { root: root.to_owned(), spare: Mutex::default(), next: AtomicU64::new(0), left: Mutex::default() })
    }

    /// A new cgroup, in which nobody was before.
    pub fn create(&self) -> io::Result<Cgroup> {
        match lock(&self.spare).take() {
            Some(spare) => Ok(spare),
            None => self.make(),
        }
    }

    /// Makes the next one ahead of time.
    pub fn prepare(&self) {
        let mut spare = lock(&self.spare);
        if spare.is_none() {
            // Whoever needs it tries again, and says why if that fails too.
            *spare = self.make().ok();
        }
    }

    fn make(&self) -> io::Result<Cgroup> {
        let path = self.root.join(format!("exec-{}", self.next.fetch_add(1, Ordering::Relaxed)));
        DirBuilder::new().mode(0o755).create(&path)?;
        let dir = rustix::fs::open(&path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        Ok(Cgroup { path, dir })
    }

    /// Removes it, or keeps it for [`Cgroups::sweep`] while there are processes.
    pub fn remove(&self, cgroup: &Cgroup) {
        if remove_tree(&cgroup.path, 0).is_err() {
            lock(&self.left).push(cgroup.path.clone());
        }
    }

    /// Removes what [`Cgroups::remove`] could not.
    pub fn sweep(&self) {
        lock(&self.left).retain(|path| remove_tree(path, 0).is_err());
    }

    /// Kills everyone in all of them.
    pub fn kill_all(&self) -> io::Result<()> {
        kill(&self.root)
    }

    /// Whether no process is left in any of them.
    pub fn is_empty(&self) -> io::Result<bool> {
        is_empty(&self.root)
    }
}

impl Cgroup {
    /// Kills everyone in it and below.
    pub fn kill(&self) -> io::Result<()> {
        kill(&self.path)
    }

    /// Whether no process is left in it or below.
    pub fn is_empty(&self) -> io::Result<bool> {
        is_empty(&self.path)
    }
}

impl AsFd for Cgroup {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.dir.as_fd()
    }
}

fn make(path: &Path) -> io::Result<()> {
    match DirBuilder::new().mode(0o755).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        result => result,
    }
}

fn is_empty(path: &Path) -> io::Result<bool> {
    let events = std::fs::read_to_string(path.join("cgroup.events"))?;
    Ok(events.lines().any(|line| line == "populated 0"))
}

fn kill(path: &Path) -> io::Result<()> {
    File::options().write(true).open(path.join("cgroup.kill"))?.write_all(b"1")
}

/// Children first: the guest may have made cgroups in the one it was given.
fn remove_tree(path: &Path, depth: u32) -> io::Result<()> {
    match std::fs::remove_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) if error.kind() == io::ErrorKind::ResourceBusy && depth < MAX_DEPTH => {}
        result => return result,
    }
    for entry in std::fs::read_dir(path)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path(), depth + 1)?;
        }
    }
    std::fs::remove_dir(path)
}
