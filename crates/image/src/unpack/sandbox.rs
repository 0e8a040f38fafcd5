//! What the helper gives up before it reads the first byte of an image.
//!
//! It is root of a user namespace over 65,536 owners that nobody else has, so that files get their true owners without any
//! privilege on the host; it has no network; it sees nothing of the file system but its directory and, to read, what
//! `mke2fs` is made of; once its second thread runs ([`super::inflate`]) it can start nothing; its
//! memory and the size of its files are limited. What becomes `debugfs` or `e2fsck` may start threads, which end with it, but no
//! process ([`only_threads`]).

use std::os::fd::{AsFd, BorrowedFd, RawFd};

use clawpot_types::{Error, Kind, Result};
use landlock::{
    ABI, Access, AccessFs, PathBeneath, PathFd, Ruleset, RulesetAttr, RulesetCreated, RulesetCreatedAttr, RulesetStatus,
};
use rustix::fs::{Mode, OFlags};
use rustix::process::{Gid, Resource, Rlimit, Uid};
use rustix::thread::UnshareFlags;

/// Address space, bytes: decoders take up to 128 MiB, what is kept of an image up to some 100 MiB.
const MEMORY: u64 = 1 << 30;
/// CPU time, seconds: a 64 GiB image takes some ten minutes.
const CPU: u64 = 3600;
/// Address space of a check, bytes: `e2fsck` keeps a few bits for each block and inode, some 1 GiB for the largest volume.
const CHECK_MEMORY: u64 = 4 << 30;
/// Of each thread of `debugfs` and `e2fsck`, bytes. The usual 8 MiB for each of a large host's CPUs would be most of their memory.
const STACK: u64 = 1 << 20;
const LANDLOCK: ABI = ABI::V5;
/// Written to stderr where it is so; everything else goes on.
pub const NO_LANDLOCK: &str = "clawpot-unpack: this kernel has no landlock; its user alone confines it";
/// What `mke2fs` and the loader read.
const READABLE: [&str; 7] = ["/usr", "/lib", "/lib64", "/bin", "/sbin", "/etc", "/nix/store"];

fn failed(what: &str, errno: rustix::io::Errno) -> Error {
    Error::io(format!("sandbox: {what}"), errno.into())
}

/// Into namespaces of its own, in which it has all capabilities and no owner yet. The process has one thread.
pub fn unshare() -> Result<()> {
    let flags = UnshareFlags::NEWUSER | UnshareFlags::NEWNET | UnshareFlags::NEWIPC | UnshareFlags::NEWUTS;
    // SAFETY: no descriptor table and no memory is unshared, and there is no other thread.
    unsafe { rustix::thread::unshare_unsafe(flags) }.map_err(|errno| {
        failed("making a user namespace", errno)
            .hint("images are unpacked in one: see /proc/sys/user/max_user_namespaces")
    })
}

/// Once the namespace has its owners: becomes their root, and gives up the rest. Of its own directory's outside it may read
/// `disk`.
pub fn enter(file_size: u64, disk: Option<BorrowedFd<'_>>) -> Result<()> {
    rustix::thread::set_thread_groups(&[]).map_err(|errno| failed("dropping groups", errno))?;
    rustix::thread::set_thread_res_gid(Gid::ROOT, Gid::ROOT, Gid::ROOT)
        .map_err(|errno| failed("becoming its group", errno))?;
    rustix::thread::set_thread_res_uid(Uid::ROOT, Uid::ROOT, Uid::ROOT)
        .map_err(|errno| failed("becoming its root", errno))?;
    rustix::process::umask(rustix::fs::Mode::empty());
    for (resource, most) in [
        (Resource::As, MEMORY),
        (Resource::Cpu, CPU),
        (Resource::Fsize, file_size),
        (Resource::Nofile, 256),
        // Of this owner: itself and its second thread, until `alone`; or what debugfs needs.
        (Resource::Nproc, if disk.is_some() { threads() } else { 2 }),
    ] {
        let limit = Rlimit { current: Some(most), maximum: Some(most) };
        rustix::process::setrlimit(resource, limit).map_err(|errno| failed("setting limits", errno))?;
    }
    rustix::thread::set_no_new_privs(true).map_err(|errno| failed("giving up new privileges", errno))?;
    landlock(disk)?;
    if disk.is_none() {
        return Ok(());
    }
    let limit = Rlimit { current: Some(STACK), maximum: Some(STACK) };
    rustix::process::setrlimit(Resource::Stack, limit).map_err(|errno| failed("setting limits", errno))?;
    only_threads()
}

/// `debugfs` and `e2fsck` read the bitmaps of all but the smallest file systems with a thread for each CPU, and give up where they
/// may not.
fn threads() -> u64 {
    // SAFETY: asks for a number.
    let cpus = unsafe { libc::sysconf(libc::_SC_NPROCESSORS_CONF) };
    u64::try_from(cpus).unwrap_or_default().max(1) + 1
}

/// Without a namespace of owners, for a program that needs none: an unprivileged user without network, who may open nothing but what
/// it is made of and the file at `fd`. The length of that file is limited by whoever started this process.
pub fn confine(user: u32, fd: RawFd) -> Result<()> {
    let flags = UnshareFlags::NEWNET | UnshareFlags::NEWIPC | UnshareFlags::NEWUTS;
    // SAFETY: no descriptor table and no memory is unshared, and there is no other thread.
    unsafe { rustix::thread::unshare_unsafe(flags) }.map_err(|errno| failed("leaving the network", errno))?;
    let (uid, gid) = (Uid::from_raw(user), Gid::from_raw(user));
    rustix::thread::set_thread_groups(&[]).map_err(|errno| failed("dropping groups", errno))?;
    rustix::thread::set_thread_res_gid(gid, gid, gid).map_err(|errno| failed("becoming its group", errno))?;
    rustix::thread::set_thread_res_uid(uid, uid, uid).map_err(|errno| failed("becoming its user", errno))?;
    for (resource, most) in [
        (Resource::As, CHECK_MEMORY),
        (Resource::Cpu, CPU),
        (Resource::Nofile, 64),
        (Resource::Nproc, threads()),
        (Resource::Stack, STACK),
    ] {
        let limit = Rlimit { current: Some(most), maximum: Some(most) };
        rustix::process::setrlimit(resource, limit).map_err(|errno| failed("setting limits", errno))?;
    }
    rustix::thread::set_no_new_privs(true).map_err(|errno| failed("giving up new privileges", errno))?;
    // SAFETY: whoever starts the helper so gives it this descriptor, and it stays open for the program.
    let file = unsafe { BorrowedFd::borrow_raw(fd) };
    let refused = |error: landlock::RulesetError| Error::new(Kind::Internal, "sandbox: landlock").because(error);
    let mut rules =
        Ruleset::default().handle_access(AccessFs::from_all(LANDLOCK)).map_err(refused)?.create().map_err(refused)?;
    let mine = AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::Truncate;
    rules = rules.add_rule(PathBeneath::new(file, mine)).map_err(refused)?;
    // They will not work without having seen that nobody has mounted it. Open until the program ends: procfs would else give the next
    // one to look another inode, of which the rule knows nothing.
    let mounts = rustix::fs::open("/proc/self/mounts", OFlags::PATH, Mode::empty())
        .map_err(|errno| failed("opening /proc/self/mounts", errno))?;
    rules = rules.add_rule(PathBeneath::new(mounts.as_fd(), AccessFs::ReadFile)).map_err(refused)?;
    restrict(readable(rules)?)?;
    std::mem::forget(mounts);
    only_threads()
}

/// From here on no process or thread can be started: of this owner there is the helper. Without it something that the image
/// captured could outlive the helper.
pub fn alone() -> Result<()> {
    let limit = Rlimit { current: Some(1), maximum: Some(1) };
    rustix::process::setrlimit(Resource::Nproc, limit).map_err(|errno| failed("setting limits", errno))
}

/// From here on this thread and what it becomes can start threads of the same process and nothing else: they end with the process, so
/// that nothing outlives it. Needs no-new-privileges.
fn only_threads() -> Result<()> {
    #[cfg(target_arch = "x86_64")]
    const NATIVE: u32 = 0xc000_003e;
    #[cfg(target_arch = "aarch64")]
    const NATIVE: u32 = 0xc000_00b7;
    /// From here up on x86-64: the same calls once more, by other numbers (x32).
    const OTHER_NUMBERS: u32 = 0x4000_0000;
    // The kernel gives a filter 32 bits of each at a time: of `seccomp_data`, the number, the architecture, the first argument.
    const NUMBER: u32 = 0;
    const ARCHITECTURE: u32 = 4;
    const FLAGS: u32 = 16;
    let number = |call: libc::c_long| u32::try_from(call).unwrap_or(u32::MAX);
    let fork: &[libc::c_long] = &[
        #[cfg(target_arch = "x86_64")]
        libc::SYS_fork,
        #[cfg(target_arch = "x86_64")]
        libc::SYS_vfork,
    ];
    let errno = |errno: i32| libc::SECCOMP_RET_ERRNO | u32::try_from(errno).unwrap_or_default();
    let mut filter = vec![
        load(ARCHITECTURE),
        when(libc::BPF_JEQ, NATIVE, 1, 0),
        answer(libc::SECCOMP_RET_KILL_PROCESS),
        load(NUMBER),
        when(libc::BPF_JGE, OTHER_NUMBERS, 0, 1),
        answer(libc::SECCOMP_RET_KILL_PROCESS),
        // Its flags are in memory, where no filter can look: the C library takes the older call where there is none.
        when(libc::BPF_JEQ, number(libc::SYS_clone3), 0, 1),
        answer(errno(libc::ENOSYS)),
    ];
    for call in fork {
        filter.extend([when(libc::BPF_JEQ, number(*call), 0, 1), answer(errno(libc::EPERM))]);
    }
    let thread = u32::try_from(libc::CLONE_THREAD).unwrap_or_default();
    filter.extend([
        when(libc::BPF_JEQ, number(libc::SYS_clone), 0, 3),
        load(FLAGS),
        when(libc::BPF_JSET, thread, 1, 0),
        answer(errno(libc::EPERM)),
        answer(libc::SECCOMP_RET_ALLOW),
    ]);
    let program =
        libc::sock_fprog { len: u16::try_from(filter.len()).unwrap_or_default(), filter: filter.as_mut_ptr() };
    // SAFETY: the program and what it points to live until the call has copied them.
    let done =
        unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, std::ptr::from_ref(&program)) };
    match done {
        0 => Ok(()),
        _ => Err(Error::io("sandbox: allowing no process but itself", std::io::Error::last_os_error())
            .hint("the kernel needs CONFIG_SECCOMP_FILTER")),
    }
}

fn step(code: u32, k: u32, jt: u8, jf: u8) -> libc::sock_filter {
    libc::sock_filter { code: u16::try_from(code).unwrap_or_default(), jt, jf, k }
}

fn load(at: u32) -> libc::sock_filter {
    step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, at, 0, 0)
}

/// `yes` and `no`: how many steps to leave out.
fn when(how: u32, value: u32, yes: u8, no: u8) -> libc::sock_filter {
    step(libc::BPF_JMP | how | libc::BPF_K, value, yes, no)
}

fn answer(what: u32) -> libc::sock_filter {
    step(libc::BPF_RET | libc::BPF_K, what, 0, 0)
}

/// Where the kernel has landlock; from Linux 5.19 on, as without its `REFER` there could be no hard links.
fn landlock(disk: Option<BorrowedFd<'_>>) -> Result<()> {
    let refused = |error: landlock::RulesetError| Error::new(Kind::Internal, "sandbox: landlock").because(error);
    let abi = LANDLOCK;
    // Devices of every kind are among what nobody is allowed.
    let mine = AccessFs::from_all(abi)
        & !(AccessFs::MakeChar | AccessFs::MakeBlock | AccessFs::MakeSock | AccessFs::Execute | AccessFs::IoctlDev);
    let mut rules =
        Ruleset::default().handle_access(AccessFs::from_all(abi)).map_err(refused)?.create().map_err(refused)?;
    let here = PathFd::new(".").map_err(|error| Error::new(Kind::Internal, "sandbox: landlock").because(error))?;
    rules = rules.add_rule(PathBeneath::new(here, mine)).map_err(refused)?;
    if let Some(disk) = disk {
        rules = rules.add_rule(PathBeneath::new(disk, AccessFs::ReadFile)).map_err(refused)?;
    }
    restrict(readable(rules)?)
}

/// What programs and the loader are made of.
fn readable(mut rules: RulesetCreated) -> Result<RulesetCreated> {
    let refused = |error: landlock::RulesetError| Error::new(Kind::Internal, "sandbox: landlock").because(error);
    for path in READABLE {
        // Not every distribution has all of them.
        if let Ok(path) = PathFd::new(path) {
            rules = rules
                .add_rule(PathBeneath::new(path, AccessFs::Execute | AccessFs::ReadFile | AccessFs::ReadDir))
                .map_err(refused)?;
        }
    }
    if let Ok(null) = PathFd::new("/dev/null") {
        rules = rules.add_rule(PathBeneath::new(null, AccessFs::ReadFile | AccessFs::WriteFile)).map_err(refused)?;
    }
    Ok(rules)
}

fn restrict(rules: RulesetCreated) -> Result<()> {
    let refused = |error: landlock::RulesetError| Error::new(Kind::Internal, "sandbox: landlock").because(error);
    let status = rules.restrict_self().map_err(refused)?;
    if status.ruleset == RulesetStatus::NotEnforced {
        eprintln!("{NO_LANDLOCK}");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    /// A filter is a thread's own: this one's goes with it.
    #[test]
    fn a_process_that_may_have_threads_starts_no_other_process() {
        let tried = std::thread::spawn(|| {
            rustix::thread::set_no_new_privs(true).unwrap();
            only_threads().unwrap();
            let thread = std::thread::spawn(|| 7).join().unwrap();
            #[expect(clippy::disallowed_methods, reason = "this is what must fail")]
            let started = std::process::Command::new("true").spawn();
            // SAFETY: a child, if there is one, only ends. Its flags say that it is no thread.
            let cloned = unsafe { libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) };
            if cloned == 0 {
                // SAFETY: ends the child, which shares nothing with us.
                unsafe { libc::_exit(0) };
            }
            (thread, started.map(|child| child.id()), cloned)
        });
        let (thread, started, cloned) = tried.join().unwrap();
        assert_eq!(thread, 7);
        assert_eq!(started.unwrap_err().raw_os_error(), Some(libc::EPERM));
        assert_eq!(cloned, -1);
    }
}
