//! What the helper gives up before it reads the first byte of an image.
//!
//! It is root of a user namespace over 65,536 owners that nobody else has, so that files get their true owners without any
//! privilege on the host; it has no network; it sees nothing of the file system but its directory and, to read, what
//! `mke2fs` is made of; once its second thread runs ([`super::inflate`]) it can start nothing; its
//! memory and the size of its files are limited.

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
/// Of `debugfs`, which reads a large file system's bitmaps with one for each CPU and gives up where it may not.
const THREADS: u64 = 512;
/// CPU time, seconds: a 64 GiB image takes some ten minutes.
const CPU: u64 = 3600;
/// Address space of a check, bytes: `e2fsck` keeps a few bits for each block and inode, some 1 GiB for the largest volume.
const CHECK_MEMORY: u64 = 4 << 30;
const LANDLOCK: ABI = ABI::V5;
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
        (Resource::Nproc, if disk.is_some() { THREADS } else { 2 }),
    ] {
        let limit = Rlimit { current: Some(most), maximum: Some(most) };
        rustix::process::setrlimit(resource, limit).map_err(|errno| failed("setting limits", errno))?;
    }
    rustix::thread::set_no_new_privs(true).map_err(|errno| failed("giving up new privileges", errno))?;
    landlock(disk)
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
    for (resource, most) in
        [(Resource::As, CHECK_MEMORY), (Resource::Cpu, CPU), (Resource::Nofile, 64), (Resource::Nproc, 1)]
    {
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
    Ok(())
}

/// From here on no process or thread can be started: of this owner there is the helper. Without it something that the image
/// captured could outlive the helper.
pub fn alone() -> Result<()> {
    let limit = Rlimit { current: Some(1), maximum: Some(1) };
    rustix::process::setrlimit(Resource::Nproc, limit).map_err(|errno| failed("setting limits", errno))
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
        eprintln!("clawpot-unpack: this kernel has no landlock; its user alone confines it");
    }
    Ok(())
}
