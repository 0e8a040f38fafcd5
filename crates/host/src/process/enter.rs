//! The child's side of a spawn, between fork and exec. The daemon has threads: after the fork another thread's locks are
//! held for ever, so nothing here allocates, locks or panics; it is a list of system calls.

use std::ffi::CString;
use std::io;
use std::os::fd::{OwnedFd, RawFd};

use libc::{c_char, c_int, c_long};
use rustix::process::Pid;

use super::spawn::owned;
use super::{Rlimits, User};

/// Descriptors are parked from here on while they are put at their numbers; below every limit on open files.
pub(super) const HIGH_FD: RawFd = 256;

/// All that the child needs, made before the fork.
pub(super) struct Plan<'a> {
    pub argv: &'a [CString],
    pub argv_pointers: Vec<*const c_char>,
    pub env_pointers: Vec<*const c_char>,
    pub cgroup: Option<RawFd>,
    pub v1_procs: Vec<RawFd>,
    pub netns: Option<RawFd>,
    pub cwd: Option<RawFd>,
    pub user: Option<User>,
    pub rlimits: Rlimits,
    pub no_new_privs: bool,
    /// Which descriptor goes to which number.
    pub fds: Vec<(RawFd, RawFd)>,
    pub report: RawFd,
}

/// In the order in which they are done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Step {
    Session = 1,
    Cgroup,
    Netns,
    Limits,
    Directory,
    Descriptors,
    Capabilities,
    User,
    NoNewPrivs,
    Exec,
}

impl Step {
    const ALL: [Self; 10] = [
        Self::Session,
        Self::Cgroup,
        Self::Netns,
        Self::Limits,
        Self::Directory,
        Self::Descriptors,
        Self::Capabilities,
        Self::User,
        Self::NoNewPrivs,
        Self::Exec,
    ];

    pub(super) const fn doing(self) -> &'static str {
        match self {
            Self::Session => "starting a session",
            Self::Cgroup => "entering its version 1 cgroups",
            Self::Netns => "entering its network namespace",
            Self::Limits => "setting its resource limits",
            Self::Directory => "entering its directory",
            Self::Descriptors => "passing its descriptors",
            Self::Capabilities => "dropping capabilities",
            Self::User => "becoming its user",
            Self::NoNewPrivs => "giving up new privileges",
            Self::Exec => "executing it",
        }
    }
}

/// What the child says when it cannot go on: one byte for the step, four for the errno.
pub(super) struct Report {
    pub step: Step,
    pub errno: i32,
}

impl Report {
    const SIZE: usize = 5;

    fn encode(step: Step, errno: i32) -> [u8; Self::SIZE] {
        let [a, b, c, d] = errno.to_ne_bytes();
        [step as u8, a, b, c, d]
    }

    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let [step, errno @ ..]: [u8; Self::SIZE] = bytes.try_into().ok()?;
        let step = Step::ALL.into_iter().find(|known| *known as u8 == step)?;
        Some(Self { step, errno: i32::from_ne_bytes(errno) })
    }
}

/// Forks straight into the plan's cgroup. The child never returns from here.
pub(super) fn fork(plan: &mut Plan<'_>) -> io::Result<(Pid, OwnedFd)> {
    let mut pidfd: c_int = -1;
    // SAFETY: all-zero is a valid `clone_args`.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = u64::from(libc::CLONE_PIDFD.cast_unsigned());
    args.pidfd = (&raw mut pidfd).addr() as u64;
    args.exit_signal = u64::from(libc::SIGCHLD.cast_unsigned());
    if let Some(dir) = plan.cgroup {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = u64::from(dir.cast_unsigned());
    }
    let before = block_signals()?;
    // SAFETY: without CLONE_VM this is a fork; the child gets its own copy of this very stack. It makes only system calls
    // and ends by exec or _exit.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw mut args, size_of::<libc::clone_args>()) };
    if pid == 0 {
        run(plan);
    }
    let forked = if pid < 0 { Err(io::Error::last_os_error()) } else { Ok(pid) };
    restore_signals(&before);
    let pid = i32::try_from(forked?).ok().and_then(Pid::from_raw);
    let pid = pid.ok_or_else(|| io::Error::other("the kernel gave no process id"))?;
    Ok((pid, owned(pidfd)))
}

/// Of `linux/sched.h`; too wide for the C library's constant.
const CLONE_INTO_CGROUP: u64 = 1 << 33;

/// A signal that came between fork and exec would run a handler of the daemon's in the child.
fn block_signals() -> io::Result<libc::sigset_t> {
    // SAFETY: both sets are ours; all-zero is a valid set.
    unsafe {
        let mut all: libc::sigset_t = std::mem::zeroed();
        let mut before: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&raw mut all);
        match libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut before) {
            0 => Ok(before),
            errno => Err(io::Error::from_raw_os_error(errno)),
        }
    }
}

fn restore_signals(before: &libc::sigset_t) {
    // SAFETY: a mask that the kernel gave us; setting it back cannot fail.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, before, std::ptr::null_mut()) };
}

/// The child, from here to its end.
fn run(plan: &mut Plan<'_>) -> ! {
    let (step, errno) = match become_program(plan) {
        Ok(never) => match never {},
        Err(failed) => failed,
    };
    let report = Report::encode(step, errno);
    // SAFETY: five bytes of our own stack to our own pipe; then the process ends without running anyone's clean-up.
    unsafe {
        libc::syscall(libc::SYS_write, plan.report, report.as_ptr(), report.len());
        libc::_exit(127)
    }
}

enum Never {}
type Done<T = ()> = Result<T, (Step, i32)>;

fn become_program(plan: &mut Plan<'_>) -> Done<Never> {
    call(Step::Session, libc::SYS_setsid, [0; 5])?;
    call(Step::Session, libc::SYS_umask, [0o077, 0, 0, 0, 0])?;
    for procs in &plan.v1_procs {
        call(Step::Cgroup, libc::SYS_write, [long(*procs), pointer(b"0".as_ptr()), 1, 0, 0])?;
    }
    if let Some(netns) = plan.netns {
        call(Step::Netns, libc::SYS_setns, [long(netns), long(libc::CLONE_NEWNET), 0, 0, 0])?;
    }
    set_limits(plan)?;
    if let Some(cwd) = plan.cwd {
        call(Step::Directory, libc::SYS_fchdir, [long(cwd), 0, 0, 0, 0])?;
    }
    place_descriptors(plan)?;
    if let Some(user) = plan.user {
        become_user(user)?;
    }
    if plan.no_new_privs {
        call(Step::NoNewPrivs, libc::SYS_prctl, [long(libc::PR_SET_NO_NEW_PRIVS), 1, 0, 0, 0])?;
    }
    default_signals();
    let program = plan.argv.first().map_or(std::ptr::null(), |program| program.as_ptr());
    let pointers = [pointer(program), pointer(plan.argv_pointers.as_ptr()), pointer(plan.env_pointers.as_ptr()), 0, 0];
    call(Step::Exec, libc::SYS_execve, pointers)?;
    // execve does not return 0.
    Err((Step::Exec, libc::EINVAL))
}

fn set_limits(plan: &Plan<'_>) -> Done {
    for (resource, value) in [(libc::RLIMIT_NOFILE, plan.rlimits.nofile), (libc::RLIMIT_CORE, plan.rlimits.core)] {
        let limit = libc::rlimit64 { rlim_cur: value, rlim_max: value };
        call(Step::Limits, libc::SYS_prlimit64, [0, c_long::from(resource), pointer(&raw const limit), 0, 0])?;
    }
    Ok(())
}

/// Everything closes on exec except what is put at its number here. All are parked high first, so that none is
/// overwritten before its turn.
fn place_descriptors(plan: &mut Plan<'_>) -> Done {
    let park =
        |fd: RawFd| call(Step::Descriptors, libc::SYS_fcntl, [long(fd), long(libc::F_DUPFD), long(HIGH_FD), 0, 0]);
    let parked_report = park(plan.report)?;
    for (fd, _) in &mut plan.fds {
        *fd = RawFd::try_from(park(*fd)?).map_err(|_| (Step::Descriptors, libc::EBADF))?;
    }
    plan.report = RawFd::try_from(parked_report).map_err(|_| (Step::Descriptors, libc::EBADF))?;
    let cloexec = c_long::from(libc::CLOSE_RANGE_CLOEXEC);
    call(Step::Descriptors, libc::SYS_close_range, [3, c_long::from(u32::MAX), cloexec, 0, 0])?;
    for (fd, at) in &plan.fds {
        call(Step::Descriptors, libc::SYS_dup3, [long(*fd), long(*at), 0, 0, 0])?;
    }
    Ok(())
}

/// From root to nobody special: what a program with file capabilities or a set-uid bit could regain goes first.
fn become_user(user: User) -> Done {
    for capability in 0..64 {
        match call(Step::Capabilities, libc::SYS_prctl, [long(libc::PR_CAPBSET_DROP), capability, 0, 0, 0]) {
            Ok(_) => {}
            // The kernel knows no capability of this number or above.
            Err((_, libc::EINVAL)) => break,
            Err(failed) => return Err(failed),
        }
    }
    let (uid, gid) = (c_long::from(user.uid), c_long::from(user.gid));
    call(Step::User, libc::SYS_setgroups, [0; 5])?;
    call(Step::User, libc::SYS_setresgid, [gid, gid, gid, 0, 0])?;
    call(Step::User, libc::SYS_setresuid, [uid, uid, uid, 0, 0]).map(drop)
}

/// Signals that the daemon ignores would stay ignored, and the mask stays through exec.
fn default_signals() {
    for number in 1..=64 {
        // SAFETY: resets one signal's action in this process alone; those that cannot be set keep their default.
        unsafe { libc::signal(number, libc::SIG_DFL) };
    }
    // SAFETY: all-zero is the empty set.
    unsafe {
        let none: libc::sigset_t = std::mem::zeroed();
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
    }
}

/// One raw system call: the C library's wrappers for users and groups signal every thread, which are not there any more.
fn call(step: Step, number: c_long, args: [c_long; 5]) -> Done<c_long> {
    let [a, b, c, d, e] = args;
    loop {
        // SAFETY: every caller passes what the call asks for: numbers, or pointers to memory that outlives it.
        let result = unsafe { libc::syscall(number, a, b, c, d, e) };
        if result >= 0 {
            return Ok(result);
        }
        // SAFETY: the address of this thread's errno.
        match unsafe { *libc::__errno_location() } {
            libc::EINTR => {}
            errno => return Err((step, errno)),
        }
    }
}

fn long(number: c_int) -> c_long {
    number.into()
}

fn pointer<T>(pointer: *const T) -> c_long {
    pointer.expose_provenance().cast_signed() as c_long
}
