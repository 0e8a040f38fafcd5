//! The parent's side of a spawn: everything that allocates, opens or may fail in a telling way is done here.

use std::ffi::{CString, OsStr, OsString};
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use clawpot_failpoint::{self as failpoint, Point};
use clawpot_types::{Error, Kind, Result};
use rustix::fs::{Mode, OFlags};

use super::Child;
use super::enter::{self, Plan};
use crate::cgroup::{Cgroup, Entry};

/// What a child is to be. Whatever is not named is not there: no argument, no variable, no descriptor but 0–2, no
/// controlling terminal; standard streams are `/dev/null`; umask 077; signals at their defaults.
#[derive(Debug)]
pub struct Spawn {
    program: PathBuf,
    args: Vec<OsString>,
    env: Vec<(OsString, OsString)>,
    cwd: Option<PathBuf>,
    user: Option<User>,
    netns: Option<OwnedFd>,
    cgroup: Option<Entry>,
    fds: Vec<(OwnedFd, RawFd)>,
    stdin: Option<OwnedFd>,
    stdout: Output,
    stderr: Output,
    rlimits: Rlimits,
    no_new_privs: bool,
}

/// Supplementary groups are dropped, and with root all capabilities, from the bounding set too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct User {
    pub uid: u32,
    pub gid: u32,
}

#[derive(Debug, Default)]
pub enum Output {
    #[default]
    Null,
    To(OwnedFd),
}

/// Each sets soft and hard limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rlimits {
    /// Open descriptors.
    pub nofile: u64,
    /// Size of a core dump, bytes. 0: a guest's memory is never written to disk.
    pub core: u64,
    /// How far into a file it may write, bytes; one that is larger already is no exception. `None`: as its parent may.
    pub fsize: Option<u64>,
}

impl Default for Rlimits {
    /// 1024 is every distribution's default and far above what a VMM or a tool opens (QEMU: about 40).
    fn default() -> Self {
        Self { nofile: 1024, core: 0, fsize: None }
    }
}

impl Spawn {
    /// `program`: an absolute path, also the child's `argv[0]`.
    pub fn new(program: impl Into<PathBuf>) -> Self {
        Self {
            program: program.into(),
            args: Vec::new(),
            env: Vec::new(),
            cwd: None,
            user: None,
            netns: None,
            cgroup: None,
            fds: Vec::new(),
            stdin: None,
            stdout: Output::Null,
            stderr: Output::Null,
            rlimits: Rlimits::default(),
            no_new_privs: true,
        }
    }

    #[must_use]
    pub fn args<I: IntoIterator<Item = S>, S: AsRef<OsStr>>(mut self, args: I) -> Self {
        self.args.extend(args.into_iter().map(|arg| arg.as_ref().to_owned()));
        self
    }

    #[must_use]
    pub fn env(mut self, name: impl Into<OsString>, value: impl Into<OsString>) -> Self {
        self.env.push((name.into(), value.into()));
        self
    }

    #[must_use]
    pub fn cwd(mut self, dir: impl Into<PathBuf>) -> Self {
        self.cwd = Some(dir.into());
        self
    }

    #[must_use]
    pub fn user(mut self, user: User) -> Self {
        self.user = Some(user);
        self
    }

    /// As [`crate::netns::open`] gives it.
    #[must_use]
    pub fn netns(mut self, netns: OwnedFd) -> Self {
        self.netns = Some(netns);
        self
    }

    /// The child is born in it: there is no moment in which it is elsewhere. The group must exist.
    pub fn cgroup(mut self, group: &Cgroup) -> Result<Self> {
        self.cgroup = Some(group.entry()?);
        Ok(self)
    }

    /// The child finds `fd` at number `at` (3 or above).
    #[must_use]
    pub fn fd(mut self, fd: OwnedFd, at: RawFd) -> Self {
        self.fds.push((fd, at));
        self
    }

    #[must_use]
    pub fn stdin(mut self, from: OwnedFd) -> Self {
        self.stdin = Some(from);
        self
    }

    #[must_use]
    pub fn stdout(mut self, to: Output) -> Self {
        self.stdout = to;
        self
    }

    #[must_use]
    pub fn stderr(mut self, to: Output) -> Self {
        self.stderr = to;
        self
    }

    #[must_use]
    pub fn rlimits(mut self, rlimits: Rlimits) -> Self {
        self.rlimits = rlimits;
        self
    }

    /// On by default. Off only for a program that itself drops what it must not keep.
    #[must_use]
    pub fn no_new_privs(mut self, on: bool) -> Self {
        self.no_new_privs = on;
        self
    }

    /// Forks, and returns once the program runs or has failed to: an error names the step that failed. Blocks for the
    /// time of fork and exec, some tenths of a millisecond.
    pub fn spawn(self) -> Result<Child> {
        let what = format!("starting {}", self.program.display());
        self.start().map_err(|error| error.context(what))
    }

    fn start(&self) -> Result<Child> {
        let null = open_null()?;
        let argv = strings(std::iter::once(self.program.as_os_str()).chain(self.args.iter().map(OsString::as_os_str)))?;
        let env: Vec<OsString> = self.env.iter().map(|(name, value)| variable(name, value)).collect();
        let env = strings(env.iter().map(OsString::as_os_str))?;
        let program = rustix::fs::open(&self.program, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
            .map_err(|errno| crate::failed("executing it", errno))?;
        let cwd = self.cwd.as_deref().map(open_dir).transpose()?;
        let mut plan = Plan {
            program: program.as_raw_fd(),
            argv: &argv,
            argv_pointers: pointers(&argv),
            env_pointers: pointers(&env),
            cgroup: self.cgroup.as_ref().map(|entry| entry.dir.as_raw_fd()),
            cgroup_procs: None,
            netns: self.netns.as_ref().map(AsRawFd::as_raw_fd),
            cwd: cwd.as_ref().map(AsRawFd::as_raw_fd),
            user: self.user,
            rlimits: self.rlimits,
            no_new_privs: self.no_new_privs,
            fds: self.descriptors(&null)?,
            born: false,
            orphaned: failpoint::is_fatal(Point::ChildBorn),
            failed: None,
        };
        match fork(&mut plan)? {
            Some(child) => Ok(child),
            None => self.start_slowly(plan),
        }
    }

    /// The child was dead before its first instruction. So does Linux (6.18 seen) when either this process's group or the
    /// one to be born into was once killed by `cgroup.kill` and the other was not; going there after birth is no trouble.
    fn start_slowly(&self, mut plan: Plan<'_>) -> Result<Child> {
        let procs = self.cgroup.as_ref().map(Entry::procs).transpose()?;
        (plan.cgroup, plan.cgroup_procs) = (None, procs.as_ref().map(AsRawFd::as_raw_fd));
        let killed = || Error::new(Kind::Unavailable, "it was killed before its first instruction");
        fork(&mut plan)?.ok_or_else(killed)
    }

    /// Which descriptor goes to which number.
    fn descriptors(&self, null: &OwnedFd) -> Result<Vec<(RawFd, RawFd)>> {
        if let Some((_, at)) = self.fds.iter().find(|(_, at)| *at < 3 || *at >= enter::HIGH_FD) {
            return Err(Error::new(Kind::Internal, format!("descriptor number {at} cannot be asked for")));
        }
        let mut fds = vec![
            (self.stdin.as_ref().unwrap_or(null).as_raw_fd(), 0),
            (output_fd(&self.stdout, null), 1),
            (output_fd(&self.stderr, null), 2),
        ];
        fds.extend(self.fds.iter().map(|(fd, at)| (fd.as_raw_fd(), *at)));
        Ok(fds)
    }
}

/// `None`: it was killed before its first instruction.
fn fork(plan: &mut Plan<'_>) -> Result<Option<Child>> {
    let (pid, pidfd) = enter::fork(plan).map_err(|error| Error::io("forking", error))?;
    let child = Child::new(pid, pidfd);
    if plan.born && plan.failed.is_none() {
        failpoint::reached(Point::Spawned);
        return Ok(Some(child));
    }
    if let Err(error) = child.reap() {
        tracing::warn!(pid = child.pid(), error = error.chain(), "a child that failed to start is not reaped");
    }
    match plan.failed {
        Some((step, errno)) => Err(Error::io(step.doing(), std::io::Error::from_raw_os_error(errno))),
        None => Ok(None),
    }
}

fn output_fd(output: &Output, null: &OwnedFd) -> RawFd {
    match output {
        Output::Null => null.as_raw_fd(),
        Output::To(fd) => fd.as_raw_fd(),
    }
}

fn open_null() -> Result<OwnedFd> {
    File::options()
        .read(true)
        .write(true)
        .open("/dev/null")
        .map(OwnedFd::from)
        .map_err(|error| Error::io("opening /dev/null", error))
}

fn open_dir(path: &Path) -> Result<OwnedFd> {
    rustix::fs::open(path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .map_err(|errno| crate::failed(format!("opening its directory {}", path.display()), errno))
}

fn variable(name: &OsStr, value: &OsStr) -> OsString {
    let mut bytes = name.as_bytes().to_vec();
    bytes.push(b'=');
    bytes.extend_from_slice(value.as_bytes());
    OsString::from_vec(bytes)
}

fn strings<'a>(texts: impl Iterator<Item = &'a OsStr>) -> Result<Vec<CString>> {
    texts
        .map(|text| {
            CString::new(text.as_bytes()).map_err(|error| {
                Error::new(Kind::InvalidArgument, format!("{text:?} holds a zero byte")).because(error)
            })
        })
        .collect()
}

/// With the null pointer that ends the array. Good while `texts` lives.
fn pointers(texts: &[CString]) -> Vec<*const libc::c_char> {
    texts.iter().map(|text| text.as_ptr()).chain([std::ptr::null()]).collect()
}

/// A descriptor that the kernel has just given us.
pub(super) fn owned(raw: RawFd) -> OwnedFd {
    // SAFETY: the callers pass a descriptor that a system call returned to them and that nobody else knows.
    unsafe { OwnedFd::from_raw_fd(raw) }
}
