//! The child's side of a spawn, between fork and exec. It borrows the daemon's memory, as `vfork` does, and one thread of
//! the daemon waits until it lets go: copying the page tables of a daemon of 40 MiB costs 1.2 ms, this 0.1 ms. Other
//! threads run on, with locks that this one cannot know: nothing here allocates, locks or panics; it is a list of system
//! calls.
//!
//! Once it has changed its user, the kernel lets nobody without CAP_SYS_PTRACE look into that memory (it marks it "not
//! dumpable", `commit_creds` in `kernel/cred.c`), so a captured VMM of the same user cannot either.

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
    /// The program, opened by the daemon: its directory may be one that the child's user cannot enter.
    pub program: RawFd,
    pub argv: &'a [CString],
    pub argv_pointers: Vec<*const c_char>,
    pub env_pointers: Vec<*const c_char>,
    /// The group to be born into.
    pub cgroup: Option<RawFd>,
    /// `cgroup.procs` of the group to go to once born: slow, see [`crate::cgroup::Entry`].
    pub cgroup_procs: Option<RawFd>,
    pub netns: Option<RawFd>,
    pub cwd: Option<RawFd>,
    pub user: Option<User>,
    pub rlimits: Rlimits,
    pub no_new_privs: bool,
    /// Which descriptor goes to which number.
    pub fds: Vec<(RawFd, RawFd)>,
    /// A test's wish: the daemon dies when the child is born. Never so in a server that is shipped.
    pub orphaned: bool,
    /// Set by the child as the first thing it does.
    pub born: bool,
    /// Written by the child when it cannot go on: the step and its errno.
    pub failed: Option<(Step, i32)>,
}

/// In the order in which they are done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    Session,
    Cgroup,
    Netns,
    Directory,
    Descriptors,
    Limits,
    Capabilities,
    User,
    NoNewPrivs,
    Exec,
}

impl Step {
    pub(super) const fn doing(self) -> &'static str {
        match self {
            Self::Session => "starting a session",
            Self::Cgroup => "entering its cgroup",
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

/// Stack of the child, bytes: its deepest call is three frames down.
const STACK: usize = 64 << 10;

/// Forks straight into the plan's cgroup. Returns when the child runs its program or has failed to: see [`Plan::failed`]
/// and [`Plan::born`].
pub(super) fn fork(plan: &mut Plan<'_>) -> io::Result<(Pid, OwnedFd)> {
    let mut pidfd: c_int = -1;
    let mut stack: Vec<u128> = vec![0; STACK / size_of::<u128>()];
    // SAFETY: all-zero is a valid `clone_args`.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = u64::from((libc::CLONE_VM | libc::CLONE_VFORK | libc::CLONE_PIDFD).cast_unsigned());
    args.pidfd = (&raw mut pidfd).expose_provenance() as u64;
    args.exit_signal = u64::from(libc::SIGCHLD.cast_unsigned());
    args.stack = stack.as_mut_ptr().expose_provenance() as u64;
    args.stack_size = STACK as u64;
    if let Some(dir) = plan.cgroup {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = u64::from(dir.cast_unsigned());
    }
    let before = block_signals()?;
    // SAFETY: the stack is the child's alone and, like the plan, lives until this thread goes on, which CLONE_VFORK
    // delays until the child has executed its program or ended.
    let pid = unsafe { clone_into(&mut args, run, plan) };
    restore_signals(&before);
    drop(stack);
    if pid < 0 {
        return Err(io::Error::from_raw_os_error(i32::try_from(-pid).unwrap_or(libc::EIO)));
    }
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    let pid = pid.ok_or_else(|| io::Error::other("the kernel gave no process id"))?;
    Ok((pid, owned(pidfd)))
}

#[cfg(not(target_arch = "x86_64"))]
compile_error!("a fork onto a stack of its own is written for x86_64 alone, as are the VMs that Clawpot runs");

/// `clone3`; the child calls `entry` with `plan` on the stack of `args`. Gives the child's id or a negative errno.
///
/// # Safety
/// `args` must ask for CLONE_VM and CLONE_VFORK and name a stack that nobody else uses.
unsafe fn clone_into(
    args: &mut libc::clone_args,
    entry: extern "C" fn(&mut Plan<'_>) -> !,
    plan: &mut Plan<'_>,
) -> i64 {
    let result: i64;
    // SAFETY: the kernel keeps the caller's registers and stack for the parent; the child starts behind `syscall` with the
    // new stack, aligned to 16 as a call wants it, and never comes back.
    unsafe {
        std::arch::asm!(
            "syscall",
            "test rax, rax",
            "jnz 2f",
            "xor ebp, ebp",
            "mov rdi, {plan}",
            "call {entry}",
            "ud2",
            "2:",
            plan = in(reg) &raw mut *plan,
            entry = in(reg) entry,
            inlateout("rax") libc::SYS_clone3 => result,
            in("rdi") &raw mut *args,
            in("rsi") size_of::<libc::clone_args>(),
            out("rcx") _,
            out("r11") _,
        );
    }
    result
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
extern "C" fn run(plan: &mut Plan<'_>) -> ! {
    plan.born = true;
    match become_program(plan) {
        Ok(never) => match never {},
        Err(failed) => plan.failed = Some(failed),
    }
    loop {
        // SAFETY: ends this process alone, and runs nobody's clean-up.
        unsafe { libc::syscall(libc::SYS_exit_group, 127) };
    }
}

enum Never {}
type Done<T = ()> = Result<T, (Step, i32)>;

fn become_program(plan: &mut Plan<'_>) -> Done<Never> {
    if plan.orphaned {
        let parent = call(Step::Session, libc::SYS_getppid, [0; 5])?;
        call(Step::Session, libc::SYS_kill, [parent, long(libc::SIGKILL), 0, 0, 0])?;
    }
    call(Step::Session, libc::SYS_setsid, [0; 5])?;
    call(Step::Session, libc::SYS_umask, [0o077, 0, 0, 0, 0])?;
    if let Some(procs) = plan.cgroup_procs {
        call(Step::Cgroup, libc::SYS_write, [long(procs), pointer(b"0".as_ptr()), 1, 0, 0])?;
    }
    if let Some(netns) = plan.netns {
        call(Step::Netns, libc::SYS_setns, [long(netns), long(libc::CLONE_NEWNET), 0, 0, 0])?;
    }
    if let Some(cwd) = plan.cwd {
        call(Step::Directory, libc::SYS_fchdir, [long(cwd), 0, 0, 0, 0])?;
    }
    place_descriptors(plan)?;
    // Not earlier: the daemon may have more open than the program may.
    set_limits(plan)?;
    if let Some(user) = plan.user {
        become_user(user)?;
    }
    if plan.no_new_privs {
        call(Step::NoNewPrivs, libc::SYS_prctl, [long(libc::PR_SET_NO_NEW_PRIVS), 1, 0, 0, 0])?;
    }
    default_signals()?;
    let program = plan.argv.first().map_or(std::ptr::null(), |program| program.as_ptr());
    let (argv, env) = (pointer(plan.argv_pointers.as_ptr()), pointer(plan.env_pointers.as_ptr()));
    match call(Step::Exec, libc::SYS_execve, [pointer(program), argv, env, 0, 0]) {
        // Only then, as a program that is executed by descriptor bears its number for a name in `ps`.
        Err((_, libc::EACCES)) => {}
        Err(failed) => return Err(failed),
        // execve does not return 0.
        Ok(_) => return Err((Step::Exec, libc::EINVAL)),
    }
    let by_descriptor = [long(plan.program), pointer(c"".as_ptr()), argv, env, long(libc::AT_EMPTY_PATH)];
    call(Step::Exec, libc::SYS_execveat, by_descriptor)?;
    Err((Step::Exec, libc::EINVAL))
}

fn set_limits(plan: &Plan<'_>) -> Done {
    let Rlimits { nofile, core, fsize } = plan.rlimits;
    let wanted = [(libc::RLIMIT_NOFILE, Some(nofile)), (libc::RLIMIT_CORE, Some(core)), (libc::RLIMIT_FSIZE, fsize)];
    for (resource, value) in wanted {
        let Some(value) = value else { continue };
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
    for fd in plan.fds.iter_mut().map(|(fd, _)| fd).chain([&mut plan.program]) {
        *fd = RawFd::try_from(park(*fd)?).map_err(|_| (Step::Descriptors, libc::EBADF))?;
    }
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

/// Signals that the daemon ignores would stay ignored, and the mask stays through exec. The table of handlers is a copy.
fn default_signals() -> Done {
    // The kernel's `sigaction` and its set of 64 signals: all zero is the default, and no signal.
    let zero = [0_u64; 4];
    let (default, size) = (pointer(zero.as_ptr()), long(8));
    for number in 1..=64 {
        // SIGKILL and SIGSTOP keep theirs in any case.
        if number != libc::SIGKILL && number != libc::SIGSTOP {
            call(Step::Exec, libc::SYS_rt_sigaction, [long(number), default, 0, size, 0])?;
        }
    }
    call(Step::Exec, libc::SYS_rt_sigprocmask, [long(libc::SIG_SETMASK), default, 0, size, 0]).map(drop)
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
