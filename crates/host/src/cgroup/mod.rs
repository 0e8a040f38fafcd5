//! Control groups. A machine's handle is its version-2 group: named before the fork, entered by the fork itself, and
//! after a crash its `cgroup.procs` is the set of the machine's processes.
//!
//! - [`mounts`] where the hierarchies are: pure version 2, or hybrid (version 2 at `…/unified`, controllers in version 1)
//! - [`limits`] what a group may use; on hybrid hosts under the same name in each version-1 hierarchy
//! - [`Cgroup`] one group: create, members, confine, kill, wait until empty, remove

mod limits;
mod mounts;

use std::fs::File;
use std::io::{self, Read, Seek};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clawpot_failpoint::{self as failpoint, Point};
use clawpot_types::{Error, Kind, Result};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal};
use tokio::io::Interest;

pub use limits::{Limits, Missing};
pub use mounts::Cgroups;

/// One group, by name; it need not exist. Cheap to make and to clone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cgroup {
    name: String,
    /// In the version-2 hierarchy.
    path: PathBuf,
    /// The line of `/proc/PID/cgroup` that says who is in it, without `0::`.
    seen_as: String,
    hosts: Cgroups,
}

/// A living process of a group, proven: the pid may be used by another process as soon as this one ends, the descriptor not.
#[derive(Debug)]
pub struct Member {
    pub pid: u32,
    pub pidfd: OwnedFd,
}

/// The open door through which a child enters a group; see [`crate::process::Spawn::cgroup`].
#[derive(Debug)]
pub struct Entry {
    /// For `CLONE_INTO_CGROUP`: a write to `cgroup.procs` waits for an RCU grace period (8–27 ms measured), this does not.
    pub(crate) dir: OwnedFd,
}

impl Entry {
    /// The slow door, `cgroup.procs`.
    pub(crate) fn procs(&self) -> Result<OwnedFd> {
        let flags = OFlags::WRONLY | OFlags::CLOEXEC;
        rustix::fs::openat(&self.dir, "cgroup.procs", flags, Mode::empty())
            .map_err(|errno| crate::failed("opening its cgroup.procs", errno))
    }
}

impl Cgroup {
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its directory in the version-2 hierarchy.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes the group and those above it, and sets its limits. One that is there already is made anew unless processes
    /// live in it: after `cgroup.kill` Linux (6.18 seen) kills whatever is born into that group. Blocks about 0.5 ms.
    /// What is born into it is under its version-2 limits from birth, under those of version 1 after [`Self::confine`].
    /// `Unsupported`: a limit whose controller this host does not offer; see [`Cgroups::missing`].
    pub fn create(&self, limits: &Limits) -> Result<()> {
        // Someone may prune an empty parent between two of our calls.
        let mut tries = 0;
        loop {
            tries += 1;
            let made = self.make().map_err(|error| Error::io("making its directory", error));
            failpoint::reached(Point::CgroupMade);
            match made.and_then(|()| limits::apply(&self.hosts, &self.name, limits)) {
                Err(error) if error.kind() == Kind::NotFound && tries < 10 => {}
                made => {
                    failpoint::reached(Point::CgroupLimited);
                    return made.map_err(|error| error.context(format!("making the cgroup {}", self.name)));
                }
            }
        }
    }

    fn make(&self) -> io::Result<()> {
        if let Some(parent) = self.path.parent() {
            std::fs::create_dir_all(parent)?;
        }
        match std::fs::create_dir(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            made => return made,
        }
        match std::fs::remove_dir(&self.path) {
            Ok(()) => std::fs::create_dir(&self.path),
            Err(error) if error.raw_os_error() == Some(Errno::BUSY.raw_os_error()) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// In any hierarchy.
    pub fn exists(&self) -> Result<bool> {
        let paths = self.hosts.v1_paths(&self.name).into_iter().chain([self.path.clone()]);
        for path in paths {
            let found = path.try_exists();
            if found.map_err(|error| Error::io(format!("looking for the cgroup {}", self.name), error))? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// `NotFound` when it does not exist.
    pub fn entry(&self) -> Result<Entry> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let dir = rustix::fs::open(&self.path, flags, Mode::empty());
        let dir = dir.map_err(|errno| crate::failed(format!("opening the cgroup {}", self.name), errno))?;
        Ok(Entry { dir })
    }

    /// Puts its processes under the limits that version-1 hierarchies hold; those that are stay. Nothing to do on a host
    /// without such. A child cannot be born into these groups, and to move is slow: the kernel waits for an RCU grace
    /// period, 8–17 ms measured for the first hierarchy and under 0.2 ms for those right after it. Blocks that long when
    /// a process moves, else about 0.1 ms.
    pub fn confine(&self) -> Result<()> {
        let what = || format!("limiting the processes of the cgroup {}", self.name);
        let mut members: Option<Vec<Member>> = None;
        for path in self.hosts.v1_paths(&self.name) {
            let procs = path.join("cgroup.procs");
            // Nothing is limited by this hierarchy.
            let Some(inside) = read_group_file(&procs).map_err(|error| Error::io(what(), error))? else { continue };
            if members.is_none() {
                members = Some(self.members()?);
            }
            for member in members.iter().flatten() {
                let pid = member.pid.to_string();
                if inside.lines().any(|line| line == pid) {
                    continue;
                }
                // Numbers are given out in a circle: this one does not come to mean another process within microseconds.
                match limits::put(&procs, &pid) {
                    Err(error) if is_gone(&error) || error.raw_os_error() == Some(Errno::SRCH.raw_os_error()) => {}
                    moved => moved.map_err(|error| Error::io(what(), error))?,
                }
                failpoint::reached(Point::CgroupConfined);
            }
        }
        Ok(())
    }

    /// Every living process in it and in groups below it; none when it does not exist. A zombie is not a member, nor is a
    /// thread of the kernel's.
    pub fn members(&self) -> Result<Vec<Member>> {
        let what = || format!("reading the processes of the cgroup {}", self.name);
        let mut members = Vec::new();
        for path in tree(&self.path).map_err(|error| Error::io(what(), error))? {
            let Some(text) = read_group_file(&path.join("cgroup.procs")).map_err(|error| Error::io(what(), error))?
            else {
                continue;
            };
            for pid in text.lines().filter_map(|line| line.parse().ok()) {
                members.extend(self.prove(pid)?);
            }
        }
        Ok(members)
    }

    /// Whether it lives in this group or below it.
    pub fn holds(&self, pid: u32) -> Result<bool> {
        Ok(self.prove(pid)?.is_some())
    }

    /// The number was read a moment ago: hold the process, look whether it is in the group, look whether it still lives.
    fn prove(&self, pid: u32) -> Result<Option<Member>> {
        let what = || format!("identifying process {pid} of the cgroup {}", self.name);
        let Some(raw) = i32::try_from(pid).ok().and_then(Pid::from_raw) else { return Ok(None) };
        let pidfd = match rustix::process::pidfd_open(raw, PidfdFlags::empty()) {
            Ok(pidfd) => pidfd,
            Err(Errno::SRCH) => return Ok(None),
            Err(errno) => return Err(crate::failed(what(), errno)),
        };
        let Some(seen) = crate::process::cgroup_of(pid)? else { return Ok(None) };
        if crate::process::is_kernel_thread(pid)? != Some(false) {
            return Ok(None);
        }
        let inside = seen.strip_prefix(&self.seen_as).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
        let alive = crate::process::is_alive(&pidfd).map_err(|errno| crate::failed(what(), errno))?;
        Ok((inside && alive).then_some(Member { pid, pidfd }))
    }

    /// Whether it has processes; `None`: there is no such group.
    pub fn populated(&self) -> Result<Option<bool>> {
        let text = read_group_file(&self.path.join("cgroup.events"))
            .map_err(|error| Error::io(format!("looking into the cgroup {}", self.name), error))?;
        Ok(text.map(|text| is_populated(&text)))
    }

    /// Kills everything in it, at once and without waiting. A group that does not exist is fine.
    pub fn kill(&self) -> Result<()> {
        match std::fs::OpenOptions::new().write(true).open(self.path.join("cgroup.kill")) {
            Ok(mut file) => {
                let killed = io::Write::write_all(&mut file, b"1");
                failpoint::reached(Point::CgroupKilled);
                killed.map_err(|error| Error::io(format!("killing the cgroup {}", self.name), error))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => self.kill_each(),
            Err(error) => Err(Error::io(format!("killing the cgroup {}", self.name), error)),
        }
    }

    /// Kernels before 5.14 have no `cgroup.kill`. A process that forks meanwhile is found by the next round.
    fn kill_each(&self) -> Result<()> {
        for _ in 0..100 {
            let members = self.members()?;
            if members.is_empty() {
                return Ok(());
            }
            for member in members {
                match rustix::process::pidfd_send_signal(&member.pidfd, Signal::KILL) {
                    Ok(()) | Err(Errno::SRCH) => {}
                    Err(errno) => return Err(crate::failed(format!("killing process {}", member.pid), errno)),
                }
            }
        }
        Err(Error::new(Kind::Unavailable, format!("killing the cgroup {}: it forks faster than it dies", self.name)))
    }

    /// Returns once it has no process or does not exist. Cancellation is harmless.
    pub async fn empty(&self) -> Result<()> {
        let what = || format!("waiting for the cgroup {} to be empty", self.name);
        let mut file = match File::open(self.path.join("cgroup.events")) {
            Ok(file) => file,
            Err(error) if is_gone(&error) => return Ok(()),
            Err(error) => return Err(Error::io(what(), error)),
        };
        let watched = file
            .try_clone()
            .and_then(|file| crate::watch(file.into(), Interest::PRIORITY))
            .map_err(|error| Error::io(what(), error))?;
        loop {
            let mut text = String::new();
            let read = file.rewind().and_then(|()| file.read_to_string(&mut text));
            match read {
                Ok(_) if is_populated(&text) => {}
                Ok(_) => return Ok(()),
                Err(error) if is_gone(&error) => return Ok(()),
                Err(error) => return Err(Error::io(what(), error)),
            }
            // The kernel tells of changes; the second's poll is a belt beside those braces.
            match tokio::time::timeout(Duration::from_secs(1), watched.ready(Interest::PRIORITY)).await {
                Ok(Ok(mut guard)) => guard.clear_ready(),
                Ok(Err(error)) => return Err(Error::io(what(), error)),
                Err(_) => {}
            }
        }
    }

    /// Removes it in every hierarchy, and the groups above it that are empty then. Gone already is fine.
    /// `FailedPrecondition`: processes live in it. What dies is waited for, at most a second.
    pub async fn remove(&self) -> Result<()> {
        for attempt in 0..100 {
            match self.try_remove() {
                Ok(()) => {
                    self.prune();
                    failpoint::reached(Point::CgroupPruned);
                    return Ok(());
                }
                Err(error) if error.raw_os_error() == Some(Errno::BUSY.raw_os_error()) => {
                    let living = self.members()?;
                    if attempt > 0 && !living.is_empty() {
                        let pids: Vec<_> = living.iter().map(|member| member.pid).collect();
                        let what = format!("removing the cgroup {}: processes {pids:?} live in it", self.name);
                        return Err(Error::new(Kind::FailedPrecondition, what));
                    }
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
                Err(error) => return Err(Error::io(format!("removing the cgroup {}", self.name), error)),
            }
        }
        Err(Error::new(Kind::Unavailable, format!("removing the cgroup {}: still busy after 1 s", self.name)))
    }

    /// The version-2 group goes last: as long as it is there, someone will find what is left.
    fn try_remove(&self) -> io::Result<()> {
        for path in self.hosts.v1_paths(&self.name).into_iter().chain([self.path.clone()]) {
            for group in tree(&path)?.iter().rev() {
                match std::fs::remove_dir(group) {
                    Err(error) if !is_gone(&error) => return Err(error),
                    _ => {}
                }
            }
            failpoint::reached(Point::CgroupRemoved);
        }
        Ok(())
    }

    /// Empty parents are of no use to anyone; those that are not empty refuse.
    fn prune(&self) {
        for root in self.hosts.roots() {
            let mut name = Path::new(&self.name);
            while let Some(parent) = name.parent().filter(|parent| !parent.as_os_str().is_empty()) {
                if std::fs::remove_dir(root.join(parent)).is_err() {
                    break;
                }
                name = parent;
            }
        }
    }
}

fn is_populated(events: &str) -> bool {
    events.lines().any(|line| line == "populated 1")
}

/// Also when it went while we held it open.
fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(Errno::NODEV.raw_os_error())
}

fn read_group_file(path: &Path) -> io::Result<Option<String>> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if is_gone(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

/// A group and all below it, each after its parent.
fn tree(path: &Path) -> io::Result<Vec<PathBuf>> {
    let mut found = vec![path.to_owned()];
    let mut next = 0;
    while let Some(dir) = found.get(next).cloned() {
        next += 1;
        let entries = match std::fs::read_dir(&dir) {
            Ok(entries) => entries,
            Err(error) if is_gone(&error) => continue,
            Err(error) => return Err(error),
        };
        for entry in entries {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                found.push(entry.path());
            }
        }
    }
    Ok(found)
}
