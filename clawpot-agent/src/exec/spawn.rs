//! Fork and exec.
//!
//! The child shares our memory and we stand still until it has called `execve` or ended (`CLONE_VM | CLONE_VFORK`): no page
//! table is copied, and it reports the exact errno by writing to a field. It is born in its cgroup
//! (`CLONE_INTO_CGROUP`): moving it there afterwards would cost an RCU grace period, and something could escape first.
//! Between clone and execve it makes system calls and nothing else.

use std::ffi::{CStr, CString, OsStr, c_void};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::ptr;

use clawpot_common::v1::ExecFailed;
use clawpot_common::v1::exec_failed::Reason;
use libc::{c_char, c_int, c_long};
use rustix::process::{Pid, WaitOptions, waitpid};

use super::cgroup::Cgroup;
use super::request::{Plan, failed, shown};

/// Enough for a child that only makes system calls, bytes.
const STACK: usize = 64 << 10;

/// Soft and hard limit of open files. Soft: what programs that still use select() expect.
#[derive(Clone, Copy, Debug)]
pub struct FileLimit {
    pub soft: u64,
    pub hard: u64,
}

/// What the child's descriptors 0, 1 and 2 become.
#[derive(Debug)]
pub struct Stdio<'a> {
    pub fds: [BorrowedFd<'a>; 3],
    /// They are a terminal, which becomes the controlling one.
    pub tty: bool,
}

/// Starts what `plan` says in `cgroup`. On an error the child has been collected.
pub fn spawn(plan: &Plan, stdio: &Stdio<'_>, cgroup: &Cgroup, files: Option<FileLimit>) -> Result<Pid, ExecFailed> {
    let pointers = |strings: &[CString]| -> Vec<*const c_char> {
        strings.iter().map(|text| text.as_ptr()).chain([ptr::null()]).collect()
    };
    let (candidates, argv, env) = (pointers(&plan.candidates), pointers(&plan.argv), pointers(&plan.env));
    let mut child = Child {
        fds: stdio.fds.map(|fd| fd.as_raw_fd()),
        tty: stdio.tty,
        candidates: candidates.as_ptr(),
        argv: argv.as_ptr(),
        env: env.as_ptr(),
        cwd: plan.cwd.as_ptr(),
        cwd_is_default: plan.cwd_is_default,
        uid: plan.user.uid,
        gid: plan.user.gid,
        groups: plan.user.groups.as_ptr(),
        group_count: plan.user.groups.len(),
        files: files.map(|limit| libc::rlimit64 { rlim_cur: limit.soft, rlim_max: limit.hard }),
        report: Report { stage: Stage::Ran, errno: 0, candidate: ptr::null() },
    };
    let pid = clone_child(&mut child, cgroup).map_err(|error| {
        failed(Reason::Resources, format!("cannot start {:?}: clone: {error}", shown(plan.argv[0].as_bytes())))
    })?;
    // SAFETY: the child wrote it through the pointer it got, and is gone from our memory now.
    let report = unsafe { ptr::read_volatile(&raw const child.report) };
    if report.stage == Stage::Ran {
        return Ok(pid);
    }
    // It has called _exit: this does not block for longer than that takes.
    while matches!(waitpid(Some(pid), WaitOptions::empty()), Err(rustix::io::Errno::INTR)) {}
    Err(explain(plan, &report))
}

/// Where the child stood when it failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Stage {
    /// It did not: execve has replaced it.
    Ran,
    Session,
    Stdio,
    Files,
    Groups,
    User,
    Cwd,
    Exec,
}

#[derive(Clone, Copy)]
struct Report {
    stage: Stage,
    errno: c_int,
    /// For [`Stage::Exec`]: the file that the errno is about.
    candidate: *const c_char,
}

/// Everything the child needs, as plain values and pointers that outlive it.
struct Child {
    fds: [RawFd; 3],
    tty: bool,
    /// Null-terminated, as are the next two.
    candidates: *const *const c_char,
    argv: *const *const c_char,
    env: *const *const c_char,
    cwd: *const c_char,
    cwd_is_default: bool,
    uid: u32,
    gid: u32,
    groups: *const u32,
    group_count: usize,
    files: Option<libc::rlimit64>,
    report: Report,
}

/// `struct clone_args` of linux/sched.h, as of Linux 5.7.
#[derive(Default)]
#[repr(C, align(8))]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

const CLONE_VM: u64 = 0x100;
const CLONE_VFORK: u64 = 0x4000;
const CLONE_CLEAR_SIGHAND: u64 = 0x1_0000_0000;
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
const SIGCHLD: u64 = 17;

/// Typed, since a bare 0 given to a variadic function is 32 bits wide.
const NULL: *const c_void = ptr::null();
/// Of the kernel's sigset_t, bytes.
const SIGSET_SIZE: usize = 8;

/// Aligned as the ABI wants a stack.
type Stack = [u128; STACK / 16];

fn clone_child(child: &mut Child, cgroup: &Cgroup) -> io::Result<Pid> {
    let mut stack = Box::<Stack>::new_uninit();
    let args = CloneArgs {
        flags: CLONE_VM | CLONE_VFORK | CLONE_CLEAR_SIGHAND | CLONE_INTO_CGROUP,
        exit_signal: SIGCHLD,
        stack: address(stack.as_mut_ptr().cast()),
        stack_size: u64::try_from(STACK).map_err(io::Error::other)?,
        // Descriptors are not negative.
        cgroup: u64::try_from(cgroup.as_fd().as_raw_fd()).map_err(io::Error::other)?,
        ..CloneArgs::default()
    };
    // SAFETY: `args` describes a stack of our own that outlives the child's use of it, since CLONE_VFORK returns only
    // after the child's execve or exit; so does `child`.
    let result = unsafe { clone3(&raw const args, (&raw mut *child).cast()) };
    drop(stack);
    match i32::try_from(result) {
        Ok(pid) if pid > 0 => Pid::from_raw(pid).ok_or_else(|| io::Error::other("clone3 returned no pid")),
        Ok(errno) => Err(io::Error::from_raw_os_error(-errno)),
        Err(error) => Err(io::Error::other(error)),
    }
}

fn address(pointer: *mut c_void) -> u64 {
    u64::try_from(pointer.addr()).unwrap_or(u64::MAX)
}

/// The pid of the child, or a negated errno. The child runs [`child_main`] on its new stack.
///
/// # Safety
/// `args` is valid, asks for CLONE_VM and CLONE_VFORK and has a 16-byte aligned stack; `child` points to a [`Child`].
#[cfg(target_arch = "x86_64")]
unsafe fn clone3(args: *const CloneArgs, child: *mut c_void) -> c_long {
    let result: c_long;
    // SAFETY: in the parent an ordinary system call. The child starts with our registers and an empty stack, calls a
    // function that does not return, and so never sees what follows.
    unsafe {
        std::arch::asm!(
            "syscall",
            "test rax, rax",
            "jnz 2f",
            "xor ebp, ebp",
            "mov rdi, r12",
            "call r13",
            "ud2",
            "2:",
            inlateout("rax") libc::SYS_clone3 => result,
            in("rdi") args,
            in("rsi") size_of::<CloneArgs>(),
            in("r12") child,
            in("r13") child_main as extern "C" fn(*mut c_void) -> !,
            out("rcx") _,
            out("r11") _,
        );
    }
    result
}

/// Runs in the child, in our memory.
extern "C" fn child_main(child: *mut c_void) -> ! {
    let child = child.cast::<Child>();
    // SAFETY: the parent stands still and keeps `child` alive; only this thread uses it now.
    let report = match unsafe { become_program(&*child) } {
        Ok(never) => match never {},
        Err(report) => report,
    };
    // SAFETY: as above; the parent reads it after we are gone.
    unsafe { ptr::write_volatile(&raw mut (*child).report, report) };
    loop {
        // SAFETY: ends this process and runs nothing of ours.
        unsafe { libc::syscall(libc::SYS_exit_group, 127) };
    }
}

enum Never {}

/// A system call that failed leaves the child at `stage`.
fn check(stage: Stage, result: c_long) -> Result<(), Report> {
    if result >= 0 {
        return Ok(());
    }
    // SAFETY: errno of the thread whose memory we share; it stands still.
    let errno = unsafe { *libc::__errno_location() };
    Err(Report { stage, errno, candidate: ptr::null() })
}

/// # Safety
/// Only in the child of [`clone3`]: it changes the credentials and descriptors of the calling process. The libc wrappers of
/// the set*id calls would change all threads of the parent, hence the bare system calls.
unsafe fn become_program(child: &Child) -> Result<Never, Report> {
    // SAFETY: the pointers in `child` are valid, see there; every call is a plain system call.
    unsafe {
        check(Stage::Session, libc::syscall(libc::SYS_setsid))?;
        for (target, fd) in (0..).zip(child.fds) {
            // They are all above 2: the agent's own 0, 1 and 2 are open from the start.
            check(Stage::Stdio, libc::syscall(libc::SYS_dup3, fd, target, 0))?;
        }
        if child.tty {
            check(Stage::Stdio, libc::syscall(libc::SYS_ioctl, 0, libc::TIOCSCTTY, NULL))?;
        }
        if let Some(limit) = &child.files {
            let limit = ptr::from_ref(limit);
            check(Stage::Files, libc::syscall(libc::SYS_prlimit64, 0, libc::RLIMIT_NOFILE, limit, NULL))?;
        }
        // One that was named is entered as root: an image's own (/root, say) is no reason not to run as somebody else.
        let named = !child.cwd_is_default && libc::syscall(libc::SYS_chdir, child.cwd) >= 0;
        check(Stage::Groups, libc::syscall(libc::SYS_setgroups, child.group_count, child.groups))?;
        check(Stage::User, libc::syscall(libc::SYS_setresgid, child.gid, child.gid, child.gid))?;
        check(Stage::User, libc::syscall(libc::SYS_setresuid, child.uid, child.uid, child.uid))?;
        if !named {
            enter(child)?;
        }
        default_signals()?;
        Err(exec(child))
    }
}

/// Goes to the working directory as the user: to `/` where a home was only assumed and cannot be entered.
///
/// # Safety
/// Only in the child.
unsafe fn enter(child: &Child) -> Result<(), Report> {
    // SAFETY: the pointers in `child` are valid, see there; both are plain system calls.
    unsafe {
        let entered = check(Stage::Cwd, libc::syscall(libc::SYS_chdir, child.cwd));
        if !child.cwd_is_default || entered.is_ok() {
            return entered;
        }
        check(Stage::Cwd, libc::syscall(libc::SYS_chdir, c"/".as_ptr()))
    }
}

/// Handlers went with CLONE_CLEAR_SIGHAND; Rust ignores SIGPIPE, which would be inherited.
///
/// # Safety
/// Only in the child.
unsafe fn default_signals() -> Result<(), Report> {
    // `struct kernel_sigaction`: handler SIG_DFL, flags, restorer, mask, all 0; and an empty mask.
    let default = [0_u64; 4];
    // SAFETY: both pointers are to local arrays of the size that the kernel reads.
    unsafe {
        let (action, mask) = (default.as_ptr(), default.as_ptr());
        check(Stage::Session, libc::syscall(libc::SYS_rt_sigaction, libc::SIGPIPE, action, NULL, SIGSET_SIZE))?;
        check(Stage::Session, libc::syscall(libc::SYS_rt_sigprocmask, libc::SIG_SETMASK, mask, NULL, SIGSET_SIZE))
    }
}

/// Tries each candidate as execvp does: the last errno counts, but EACCES outlives ENOENT.
///
/// # Safety
/// Only in the child.
unsafe fn exec(child: &Child) -> Report {
    let mut report = Report { stage: Stage::Exec, errno: libc::ENOENT, candidate: ptr::null() };
    let mut next = child.candidates;
    // SAFETY: null-terminated arrays of C strings, see `Child`.
    unsafe {
        while !(*next).is_null() {
            libc::syscall(libc::SYS_execve, *next, child.argv, child.env);
            let errno = *libc::__errno_location();
            let absent = matches!(errno, libc::ENOENT | libc::ENOTDIR);
            if !absent || report.candidate.is_null() {
                report.errno = errno;
                report.candidate = *next;
            }
            if !absent && errno != libc::EACCES {
                break;
            }
            next = next.add(1);
        }
    }
    report
}

/// The child's report in words. It knows only errnos; what they mean for a file is looked up here.
fn explain(plan: &Plan, report: &Report) -> ExecFailed {
    let error = io::Error::from_raw_os_error(report.errno);
    let program = shown(plan.argv[0].as_bytes());
    match report.stage {
        Stage::Exec => explain_exec(plan, report, &program),
        Stage::Cwd => failed(Reason::BadCwd, format!("working directory {:?}: {error}", shown(plan.cwd.as_bytes()))),
        Stage::Groups | Stage::User => {
            failed(Reason::BadUser, format!("becoming user {} (group {}): {error}", plan.user.uid, plan.user.gid))
        }
        stage => failed(Reason::Resources, format!("cannot start {program:?}: {stage:?}: {error}")),
    }
}

fn explain_exec(plan: &Plan, report: &Report, program: &str) -> ExecFailed {
    // SAFETY: for Stage::Exec null or one of `plan.candidates`.
    let file = (!report.candidate.is_null()).then(|| unsafe { CStr::from_ptr(report.candidate) });
    let shown_file = file.map_or_else(|| program.to_owned(), |file| shown(file.to_bytes()));
    match report.errno {
        libc::ENOENT | libc::ENOTDIR if plan.candidates.iter().any(|file| on_disk(plan, file).is_file()) => failed(
            Reason::NotExecutable,
            format!("{program:?} exists, but the interpreter or loader that it names does not"),
        ),
        libc::ENOENT | libc::ENOTDIR if program.contains('/') => {
            failed(Reason::NotFound, format!("{program:?}: no such file in the guest"))
        }
        libc::ENOENT | libc::ENOTDIR => {
            failed(Reason::NotFound, format!("{program:?}: not found in PATH of the guest"))
        }
        libc::E2BIG => failed(
            Reason::TooLong,
            format!(
                "arguments and environment are {} bytes in all; Linux takes at most a quarter of the stack limit (2 MiB by \
                 default, never over 6 MiB) with 8 bytes for each string: pass data on standard input or in a file",
                plan.string_bytes
            ),
        ),
        libc::EACCES if file.is_some_and(|file| on_disk(plan, file).is_dir()) => {
            failed(Reason::NotExecutable, format!("{shown_file:?} is a directory"))
        }
        libc::EACCES => failed(Reason::NotExecutable, format!("{shown_file:?}: permission denied (is it executable?)")),
        libc::ENOEXEC => failed(
            Reason::NotExecutable,
            format!("{shown_file:?}: not a program for this machine, nor a script that begins with #!"),
        ),
        libc::ENOMEM => failed(Reason::Resources, format!("{shown_file:?}: not enough memory in the guest")),
        errno => failed(Reason::NotExecutable, format!("{shown_file:?}: {}", io::Error::from_raw_os_error(errno))),
    }
}

/// A candidate as the child saw it: relative to its working directory.
fn on_disk(plan: &Plan, file: &CStr) -> PathBuf {
    Path::new(OsStr::from_bytes(plan.cwd.as_bytes())).join(OsStr::from_bytes(file.to_bytes()))
}
