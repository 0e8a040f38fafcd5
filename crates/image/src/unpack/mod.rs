//! The helper that unpacks layers and makes a file system of them: `clawpot-unpack`, a process of its own for each image.
//!
//! - [`run`] its whole life: confine itself, take layers, become `mke2fs`; or take a disk and become `debugfs`
//! - [`sandbox`] what it gives up · [`wire`] what it and the server say to each other
//! - [`program`] its other life: `e2fsck` on a volume
//! - [`inflate`] decompress and hash, a thread of its own · [`layer`] read entries · [`mod@tar`] the archive
//! - [`tree`] entries into files · [`limits`] how much
//!
//! Everything here blocks. The server's side is [`crate::build`].

pub mod inflate;
pub mod layer;
pub mod limits;
pub mod program;
pub mod sandbox;
pub mod tar;
pub mod tree;
pub mod wire;

use std::ffi::CString;
use std::fs::File;
use std::io::Write as _;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::process::ExitCode;

use clawpot_types::{Error, Kind, Result};
use rustix::fs::{AtFlags, Mode, OFlags};

use inflate::Inflate;
use limits::{Budget, Limits};
use tree::Tree;
use wire::{COMMANDS, Order, ROOTFS, Report, SOCKET, TREE};

/// The binary's `main`. Does not return when all goes well: the process becomes `mke2fs`, or what it is told to become.
#[must_use]
pub fn run() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let Some((program::VERB, arguments)) = arguments.split_first().map(|(verb, rest)| (verb.as_str(), rest)) {
        return program::run(arguments);
    }
    // SAFETY: whoever starts the helper gives it this descriptor; nobody else in this process knows it.
    let socket = unsafe { OwnedFd::from_raw_fd(SOCKET) };
    // Its closing tells the server that this has become another program.
    if let Err(errno) = rustix::io::fcntl_setfd(&socket, rustix::io::FdFlags::CLOEXEC) {
        eprintln!("clawpot-unpack: descriptor {SOCKET}, which is to be the server's socket: {errno}");
        return ExitCode::FAILURE;
    }
    match work(socket.as_fd()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            if wire::send(socket.as_fd(), &Report::failed(&error), None).is_err() {
                eprintln!("clawpot-unpack: {}", error.chain());
            }
            ExitCode::FAILURE
        }
    }
}

fn work(socket: BorrowedFd<'_>) -> Result<()> {
    sandbox::unshare()?;
    wire::send(socket, &Report::Unshared, None)?;
    let Some((Order::Mapped { limits }, disk)) = wire::receive(socket)? else { return Err(unexpected()) };
    if let Some(disk) = disk {
        sandbox::enter(limits.bytes, Some(disk.as_fd()))?;
        return dump(socket, &disk);
    }
    let mut budget = Budget::new(limits);
    sandbox::enter(budget.most_of_a_file(), None)?;
    let inflate = Inflate::start()?;
    sandbox::alone()?;
    let root = make_root()?;
    let mut tree = Tree::new(root, limits.depth)?;
    let mut number = 0;
    loop {
        match wire::receive(socket)? {
            // The server is gone, or wants no more of it.
            None => return Ok(()),
            Some((Order::Layer { diff_id, plain }, Some(file))) => {
                number += 1;
                tree.plain = plain;
                let mut told = Ok(());
                let mut tell = |read| told = wire::send(socket, &Report::Progress { read }, None);
                layer::apply((File::from(file), diff_id.as_ref()), &inflate, &mut tree, &mut budget, &mut tell)
                    .map_err(|error| error.context(format!("layer {number}")))?;
                told?;
                wire::send(socket, &Report::LayerDone, None)?;
            }
            Some((Order::Make { uuid, time, mke2fs }, _)) => {
                return make(socket, (tree, &budget), &uuid, time, &mke2fs);
            }
            Some(_) => return Err(unexpected()),
        }
    }
}

/// Becomes `debugfs`, which reads a guest's file system without any kernel that would trust it.
fn dump(socket: BorrowedFd<'_>, disk: &OwnedFd) -> Result<()> {
    let Some((Order::Dump { files, debugfs }, _)) = wire::receive(socket)? else { return Err(unexpected()) };
    let plain = |name: &String| name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b".-_".contains(&byte));
    if !files.iter().all(plain) {
        return Err(unexpected());
    }
    let commands: String = files.iter().map(|name| format!("dump /{name} {name}\n")).collect();
    File::create_new(COMMANDS)
        .and_then(|mut file| file.write_all(commands.as_bytes()))
        .map_err(|error| Error::io("writing what debugfs is to do", error))?;
    rustix::io::fcntl_setfd(disk, rustix::io::FdFlags::empty())
        .map_err(|errno| Error::io("leaving the disk open", errno.into()))?;
    wire::send(socket, &Report::Making { bytes: 0, devices: 0, xattrs: 0 }, None)?;
    let path = format!("/proc/self/fd/{}", disk.as_raw_fd());
    Err(become_program(&[&debugfs, "-f", COMMANDS, &path], &QUIET))
}

fn unexpected() -> Error {
    Error::new(Kind::Internal, "the server said something unexpected")
}

fn make_root() -> Result<OwnedFd> {
    let made = rustix::fs::mkdir(TREE, Mode::from_raw_mode(0o755))
        .and_then(|()| rustix::fs::open(TREE, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()));
    made.map_err(|errno| Error::io("making the tree", errno.into()))
}

fn make(socket: BorrowedFd<'_>, (tree, budget): (Tree, &Budget), uuid: &str, time: i64, mke2fs: &str) -> Result<()> {
    let notes = tree.finish(time)?;
    let (blocks, inodes) = measure()?;
    let bytes = file_system_bytes(blocks, inodes);
    budget.file_system(bytes)?;
    wire::send(socket, &Report::Making { bytes, devices: notes.devices, xattrs: notes.xattrs }, None)?;
    let inodes = inodes + 64;
    let arguments = [
        mke2fs,
        "-q",
        "-F",
        "-t",
        "ext4",
        "-b",
        "4096",
        "-I",
        "256",
        "-m",
        "0",
        "-N",
        &inodes.to_string(),
        "-L",
        "rootfs",
        "-U",
        uuid,
        "-E",
        &format!("hash_seed={uuid},lazy_itable_init=0,assume_storage_prezeroed=1,root_owner=0:0"),
        // Never written to: it needs no journal, and never grows.
        "-O",
        "^has_journal,^resize_inode",
        "-d",
        TREE,
        ROOTFS,
        &format!("{}K", bytes >> 10),
    ];
    let (fake, epoch) = (format!("E2FSPROGS_FAKE_TIME={time}"), format!("SOURCE_DATE_EPOCH={time}"));
    Err(become_program(&arguments, &["LC_ALL=C", &fake, &epoch]))
}

/// Of the file system: what its files take, their inodes, and a fifth of a tenth for what keeps account of them.
fn file_system_bytes(blocks: u64, inodes: u64) -> u64 {
    const SLACK: u64 = 16 << 20;
    let bytes = blocks + inodes * (256 + 16) + blocks / 50 + SLACK;
    bytes.next_multiple_of(1 << 20)
}

/// Bytes in whole blocks and inodes of the tree. Files with several names count once; not so symbolic links, of which `mke2fs` makes
/// one for each name.
fn measure() -> Result<(u64, u64)> {
    let mut seen = std::collections::HashSet::new();
    let (mut bytes, mut inodes) = (0, 0_u64);
    let mut todo = vec![std::path::PathBuf::from(TREE)];
    let failed = |error| Error::io("measuring the tree", error);
    while let Some(dir) = todo.pop() {
        for entry in std::fs::read_dir(&dir).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let stat = rustix::fs::statat(rustix::fs::CWD, entry.path(), AtFlags::SYMLINK_NOFOLLOW)
                .map_err(|errno| failed(errno.into()))?;
            let kind = entry.file_type().map_err(failed)?;
            if stat.st_nlink > 1 && !kind.is_dir() && !kind.is_symlink() && !seen.insert(stat.st_ino) {
                continue;
            }
            inodes += 1;
            // Holes count as nothing; the least is a block, as a directory has one too.
            bytes +=
                u64::try_from(stat.st_blocks).unwrap_or_default().saturating_mul(512).next_multiple_of(4096).max(4096);
            if kind.is_dir() {
                todo.push(entry.path());
            }
        }
    }
    Ok((bytes, inodes))
}

/// Of `debugfs` and `e2fsck`: plain words, no pager, and no 64 MiB of address space for each thread that asks for memory.
const QUIET: [&str; 3] = ["LC_ALL=C", "DEBUGFS_PAGER=__none__", "MALLOC_ARENA_MAX=1"];

/// Returns only if it fails.
fn become_program(arguments: &[&str], environment: &[&str]) -> Error {
    let strings =
        |texts: Vec<&str>| -> Option<Vec<CString>> { texts.into_iter().map(|text| CString::new(text).ok()).collect() };
    let (Some(arguments), Some(environment)) = (strings(arguments.to_vec()), strings(environment.to_vec())) else {
        return Error::new(Kind::Internal, "an argument with a NUL byte");
    };
    let pointers =
        |texts: &[CString]| texts.iter().map(|text| text.as_ptr()).chain([std::ptr::null()]).collect::<Vec<_>>();
    let (argv, envp) = (pointers(&arguments), pointers(&environment));
    // SAFETY: two arrays of strings that end with a null pointer, which live until the program has replaced this one.
    unsafe { libc::execve(argv[0], argv.as_ptr(), envp.as_ptr()) };
    Error::io(format!("executing {}", arguments[0].to_string_lossy()), std::io::Error::last_os_error())
        .hint("install the package e2fsprogs")
}

/// For the server, which sets the limits by what disk and quota leave, and by its settings.
#[must_use]
pub fn within(bytes: u64, entries: u64) -> Limits {
    let usual = Limits::default();
    Limits { bytes: usual.bytes.min(bytes), entries, ..usual }
}
