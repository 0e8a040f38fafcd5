//! From layers to a file system: the server's side of the helper that [`crate::unpack`] is.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use clawpot_failpoint::{self as failpoint, Point};
use clawpot_host::fs;
use clawpot_host::process::{Child, Exit, Output, Spawn, find_program};
use clawpot_types::{Digest, Error, Kind, Result};
use rustix::fs::{IFlags, MemfdFlags, Mode, OFlags, SealFlags};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;

use crate::lock::Lock;
use crate::owners::Owners;
use crate::unpack::limits::Limits;
use crate::unpack::wire::{self, Order, ROOTFS, Report};

/// What is kept of what the helper writes to stderr, bytes.
const STDERR: u64 = 16 << 10;

/// `SIGXFSZ`: it wrote further into a file than its limit lets it.
pub(crate) const TOO_LARGE: i32 = 25;

/// Where helpers work, and which program they are.
#[derive(Clone, Debug)]
pub struct Builder {
    /// `clawpot-unpack`.
    pub helper: PathBuf,
    /// On the store's file system.
    pub cache: PathBuf,
}

/// What the file system is to be.
#[derive(Clone, Debug)]
pub struct Recipe {
    pub limits: Limits,
    /// Layers are archives like any other, in which `.wh.NAME` is a file of that name and hides nothing.
    pub plain: bool,
    /// The same layers give the same identity.
    pub uuid: String,
    /// Seconds since the epoch, of what bears no time of its own.
    pub time: i64,
}

/// What the helper is fed with, lowest layer first.
#[derive(Debug)]
pub enum Feed {
    Layer { file: File, diff_id: Option<Digest> },
    End,
}

/// How far it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Told {
    /// Packed bytes of the current layer.
    Read(u64),
    LayerDone,
    /// Of the file system that is being made, bytes.
    Making(u64),
}

/// A file system, synced, verified and nobody's yet. Dropping it removes it.
#[derive(Debug)]
pub struct Made {
    pub path: PathBuf,
    pub digest: Digest,
    pub size: u64,
    /// Device nodes in `/dev` and attributes that were left out.
    pub devices: u64,
    pub xattrs: u64,
    _work: Work,
}

impl Builder {
    /// Unpacks what `feed` gives and makes a file system of it. Dropping the future ends the helper and removes its files.
    pub async fn build(
        &self,
        recipe: Recipe,
        feed: mpsc::Receiver<Feed>,
        told: impl Fn(Told) + Send + 'static,
    ) -> Result<Made> {
        let this = self.clone();
        let (helper, socket, stderr) = blocking(move || this.start()).await?;
        let maps = helper.owners.clone();
        let pid = helper.child()?.pid();
        let talk = blocking(move || dialog(&socket, pid, &maps, recipe, feed, told)).await;
        let exit = {
            // What it writes goes to the disk while it writes on, and not all at once behind it.
            let rootfs = helper.work.as_ref().map(|work| work.dir.join(ROOTFS)).unwrap_or_default();
            let _flushing = AbortOnDropHandle::new(tokio::spawn(flush_now_and_then(rootfs)));
            helper.child()?.wait().await?
        };
        let made = match talk {
            Ok(_) if !exit.is_success() => {
                Err(blame(Error::new(Kind::Internal, "making the file system"), exit, &stderr))
            }
            talk => talk.map_err(|error| blame(error, exit, &stderr)),
        };
        let (work, owners) = helper.done()?;
        // Also on failure nothing of it is left once that is told.
        blocking(move || {
            // Before the next helper can have the same owners: from here on they reach nothing of this one.
            let taken = take_back(&work.dir);
            drop(owners);
            taken.and_then(|()| finish(work, made?))
        })
        .await
    }

    pub(crate) fn start(&self) -> Result<(Helper, OwnedFd, File)> {
        let work = Work::make(&self.cache)?;
        let owners = Owners::claim()?;
        std::os::unix::fs::chown(&work.dir, Some(owners.from), Some(owners.from))
            .map_err(|error| Error::io(format!("giving away {}", work.dir.display()), error))?;
        let failed = |errno: rustix::io::Errno| Error::io("preparing the helper", errno.into());
        let flags = SocketFlags::CLOEXEC;
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).map_err(failed)?;
        let stderr = stderr().map_err(failed)?;
        let copy = stderr.try_clone().map_err(|error| Error::io("preparing the helper", error))?;
        let spawn = Spawn::new(&self.helper).cwd(&work.dir).stderr(Output::To(copy.into()));
        let child =
            spawn.fd(theirs, wire::SOCKET).fd(owners.lock()?, wire::OWN).spawn().map_err(|error| {
                error.hint("build it: cargo build -p clawpot-image; it stands beside clawpot-server")
            })?;
        Ok((Helper { child: Some(child), work: Some(work), owners }, ours, stderr))
    }
}

/// Between two looks at what could go to the disk.
const FLUSH: Duration = Duration::from_millis(250);

/// Until it is dropped. Whatever goes wrong here the syncing at the end will tell.
async fn flush_now_and_then(path: PathBuf) {
    loop {
        tokio::time::sleep(FLUSH).await;
        let path = path.clone();
        tokio::task::spawn_blocking(move || flush(&path)).await.unwrap_or_default();
    }
}

/// Begins to write what is in memory of the file that the helper is making; it may be none yet, or anything else.
fn flush(path: &Path) {
    let flags = i32::try_from((OFlags::NOFOLLOW | OFlags::NONBLOCK).bits()).unwrap_or_default();
    let Ok(file) = File::options().read(true).custom_flags(flags).open(path) else { return };
    if file.metadata().is_ok_and(|meta| meta.is_file()) {
        // SAFETY: a descriptor that lives, and no memory.
        let begun = unsafe { libc::sync_file_range(file.as_raw_fd(), 0, 0, libc::SYNC_FILE_RANGE_WRITE) };
        if begun != 0 {
            tracing::debug!(error = %std::io::Error::last_os_error(), "beginning to write {}", path.display());
        }
    }
}

/// Of a fixed size, so that it never takes more memory.
fn stderr() -> Result<File, rustix::io::Errno> {
    let file = rustix::fs::memfd_create("stderr", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    rustix::fs::ftruncate(&file, STDERR)?;
    rustix::fs::fcntl_add_seals(&file, SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL)?;
    Ok(file.into())
}

/// Runs `work` where it may block.
pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    let task = tokio::task::spawn_blocking(work);
    task.await.map_err(|error| Error::new(Kind::Internal, "an image task panicked").because(error))?
}

/// What the helper told before it became `mke2fs`.
#[derive(Debug)]
struct Making {
    devices: u64,
    xattrs: u64,
}

fn dialog(
    socket: &OwnedFd,
    pid: u32,
    owners: &Owners,
    recipe: Recipe,
    mut feed: mpsc::Receiver<Feed>,
    told: impl Fn(Told),
) -> Result<Making> {
    match report(socket)? {
        Report::Unshared => owners.map(pid)?,
        other => return Err(unexpected(&other)),
    }
    wire::send(socket.as_fd(), &Order::Mapped { limits: recipe.limits }, None)?;
    loop {
        match feed.blocking_recv() {
            None => return Err(Error::new(Kind::Cancelled, "unpacking: nobody wants it any more")),
            Some(Feed::Layer { file, diff_id }) => {
                wire::send(socket.as_fd(), &Order::Layer { diff_id, plain: recipe.plain }, Some(file.as_fd()))?;
                loop {
                    match report(socket)? {
                        Report::Progress { read } => told(Told::Read(read)),
                        Report::LayerDone => break told(Told::LayerDone),
                        other => return Err(unexpected(&other)),
                    }
                }
                failpoint::reached(Point::LayerUnpacked);
            }
            Some(Feed::End) => break,
        }
    }
    let mke2fs = find_program("mke2fs", std::env::var_os("PATH").as_deref())
        .map_err(|error| error.hint("install the package e2fsprogs"))?;
    let order = Order::Make { uuid: recipe.uuid, time: recipe.time, mke2fs: mke2fs.to_string_lossy().into_owned() };
    wire::send(socket.as_fd(), &order, None)?;
    match report(socket)? {
        Report::Making { bytes, devices, xattrs } => {
            told(Told::Making(bytes));
            until_it_becomes(socket)?;
            Ok(Making { devices, xattrs })
        }
        other => Err(unexpected(&other)),
    }
}

pub(crate) fn report(socket: &OwnedFd) -> Result<Report> {
    match wire::receive(socket)? {
        Some((Report::Failed { kind, what, hint }, _)) => Err(failure(kind, what, hint)),
        Some((report, _)) => Ok(report),
        None => Err(Error::new(Kind::Internal, "unpacking: the helper ended")),
    }
}

/// The socket closes when the helper becomes a program, and only a failure says something before.
pub(crate) fn until_it_becomes(socket: &OwnedFd) -> Result<()> {
    match wire::receive::<Report>(socket)? {
        None => Ok(()),
        Some((Report::Failed { kind, what, hint }, _)) => Err(failure(kind, what, hint)),
        Some((other, _)) => Err(unexpected(&other)),
    }
}

fn failure(kind: Kind, what: String, hint: Option<String>) -> Error {
    let error = Error::new(kind, what);
    match hint {
        Some(hint) => error.hint(hint),
        None => error,
    }
}

pub(crate) fn unexpected(report: &Report) -> Error {
    Error::new(Kind::Internal, format!("unpacking: the helper said {report:?}"))
}

/// What the helper, or what it became, wrote to stderr.
pub(crate) fn lines(stderr: &File) -> Vec<String> {
    let mut bytes = vec![0; usize::try_from(STDERR).unwrap_or_default()];
    if stderr.read_at(&mut bytes, 0).is_err() {
        return Vec::new();
    }
    let text = String::from_utf8_lossy(&bytes);
    let lines = text.trim_end_matches('\0').lines();
    lines.filter(|line| !line.trim().is_empty()).map(str::to_owned).collect()
}

/// What the helper itself told is enough; else how it ended and what it wrote.
pub(crate) fn blame(error: Error, exit: Exit, stderr: &File) -> Error {
    if error.kind() != Kind::Internal {
        return error;
    }
    let said = lines(stderr).into_iter().take(5).collect::<Vec<_>>().join("; ");
    if said.contains("No space left") || said.contains("Could not allocate") {
        return Error::new(Kind::Exhausted, error.what().to_owned()).because(Error::new(Kind::Exhausted, said));
    }
    // Both are limits that the same layers meet again.
    if exit == Exit::Signal(TOO_LARGE) || said.contains("memory allocation of") {
        let how = match exit {
            Exit::Signal(TOO_LARGE) => "a file would be larger than what is left for it".to_owned(),
            _ => format!("the helper needs more memory than it may have; {said}"),
        };
        return Error::new(Kind::Exhausted, error.what().to_owned()).because(Error::new(Kind::Exhausted, how));
    }
    let how = match exit {
        Exit::Code(0) => said,
        // By the kernel: the host has no memory left, or the helper had its time.
        Exit::Signal(6 | 9 | 11) => format!("the helper was {exit}: over its memory or time, or a defect; {said}"),
        _ => format!("{exit}; {said}"),
    };
    let (kind, what) = (error.kind(), error.what().to_owned());
    Error::new(kind, what).because(Error::new(kind, how))
}

/// A helper that lives, or its files. Dropping it kills it and removes them.
#[derive(Debug)]
pub(crate) struct Helper {
    child: Option<Child>,
    work: Option<Work>,
    pub(crate) owners: Owners,
}

impl Helper {
    pub(crate) fn child(&self) -> Result<&Child> {
        self.child.as_ref().ok_or_else(|| Error::new(Kind::Internal, "the helper is gone"))
    }

    /// It has ended: nothing is left but its files.
    pub(crate) fn done(mut self) -> Result<(Work, Owners)> {
        self.child = None;
        let work = self.work.take().ok_or_else(|| Error::new(Kind::Internal, "the helper's files are gone"))?;
        Ok((work, self.owners.clone()))
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        let (Some(child), work, owners) = (self.child.take(), self.work.take(), self.owners.clone()) else { return };
        if let Err(error) = child.kill_session() {
            tracing::warn!(error = error.chain(), "a helper could not be killed");
        }
        // Without a runtime the next start sweeps.
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        drop(runtime.spawn(async move {
            if let Err(error) = child.wait().await {
                tracing::warn!(error = error.chain(), "waiting for a helper");
            }
            drop(tokio::task::spawn_blocking(move || drop((work, owners))).await);
        }));
    }
}

/// A directory of its own below the store's cache, locked as long as somebody works in it.
#[derive(Debug)]
pub struct Work {
    pub dir: PathBuf,
    lock: PathBuf,
    _held: Lock,
}

/// Directories of helpers, each with a lock beside it.
const PREFIX: &str = "unpack-";

impl Work {
    pub fn make(cache: &Path) -> Result<Self> {
        spread(cache);
        for _ in 0..16 {
            let mut random = [0_u8; 8];
            rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())
                .map_err(|errno| Error::io("asking for randomness", errno.into()))?;
            let dir = cache.join(format!("{PREFIX}{:016x}", u64::from_ne_bytes(random)));
            let lock = dir.with_extension("lock");
            let Some(held) = Lock::try_exclusive(&lock)? else { continue };
            fs::ensure_dir(&dir, 0o700)?;
            return Ok(Self { dir, lock, _held: held });
        }
        Err(Error::new(Kind::Conflict, format!("making a directory in {}", cache.display())))
    }
}

/// Tells ext4 that what is made in `cache` has nothing to do with each other (`chattr +T`): each directory then gets its inodes in
/// another part of the disk. Else it would get those that the last one had, and an ext4 without a journal looks at every inode that
/// was freed in the last minutes before it takes one: half of the time of a pull that comes soon after another. No other file system
/// needs it, and none of them minds.
fn spread(cache: &Path) {
    let set = || {
        let dir = rustix::fs::open(cache, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        let flags = rustix::fs::ioctl_getflags(&dir)?;
        if flags.contains(IFlags::TOPDIR) { Ok(()) } else { rustix::fs::ioctl_setflags(&dir, flags | IFlags::TOPDIR) }
    };
    if let Err(errno) = set() {
        tracing::debug!(%errno, "{} is not marked as the top of unrelated directories", cache.display());
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        let removed = fs::remove_tree_if_exists(&self.dir).and_then(|()| fs::remove_file_if_exists(&self.lock));
        if let Err(error) = removed {
            tracing::warn!(error = error.chain(), "what a helper made stays until the next start");
        }
    }
}

/// Removes what helpers of servers that are gone have left in `cache`. Blocks. Gives the number of directories.
pub fn sweep(cache: &Path) -> Result<usize> {
    let what = || format!("looking for half-made images in {}", cache.display());
    let entries = match std::fs::read_dir(cache) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(0),
        Err(error) => return Err(Error::io(what(), error)),
    };
    let mut swept = 0;
    for entry in entries {
        let path = entry.map_err(|error| Error::io(what(), error))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if !name.starts_with(PREFIX) || !name.ends_with(".lock") {
            continue;
        }
        if let Some(_held) = Lock::try_exclusive(&path)? {
            fs::remove_tree_if_exists(&path.with_extension(""))?;
            fs::remove_file_if_exists(&path)?;
            swept += 1;
        }
    }
    Ok(swept)
}

/// The directory is root's again, and nobody else's to enter.
pub(crate) fn take_back(dir: &Path) -> Result<()> {
    std::os::unix::fs::chown(dir, Some(0), Some(0))
        .and_then(|()| std::fs::set_permissions(dir, std::os::unix::fs::PermissionsExt::from_mode(0o700)))
        .map_err(|error| Error::io(format!("taking over {}", dir.display()), error))
}

/// Takes the file over from the helper, which has ended and had nobody to leave it open to.
fn finish(work: Work, making: Making) -> Result<Made> {
    let path = work.dir.join(ROOTFS);
    let (digest, size) = std::thread::scope(|scope| {
        // Nobody needs it any more; whatever cannot be removed now is told of with the rest of the directory.
        scope.spawn(|| fs::remove_tree_if_exists(&work.dir.join(wire::TREE)).unwrap_or_default());
        take_over(&path)
    })?;
    let Making { devices, xattrs } = making;
    Ok(Made { path, digest, size, devices, xattrs, _work: work })
}

/// Makes root's what a helper that has ended left at `path`: its digest and size. Synced.
pub(crate) fn take_over(path: &Path) -> Result<(Digest, u64)> {
    let what = || format!("taking over {}", path.display());
    let flags = i32::try_from(OFlags::NOFOLLOW.bits()).unwrap_or_default();
    let file = std::fs::OpenOptions::new().read(true).write(true).custom_flags(flags).open(path);
    let file = file.map_err(|error| Error::io(what(), error))?;
    let meta = file.metadata().map_err(|error| Error::io(what(), error))?;
    if !meta.is_file() || meta.nlink() != 1 {
        return Err(Error::new(Kind::Corrupt, format!("{}: not a file of its own", what())));
    }
    let owned = rustix::fs::fchown(&file, Some(rustix::fs::Uid::ROOT), Some(rustix::fs::Gid::ROOT));
    owned
        .and_then(|()| rustix::fs::fchmod(&file, rustix::fs::Mode::from_raw_mode(0o444)))
        .map_err(|errno| Error::io(what(), errno.into()))?;
    let (hashed, synced) = std::thread::scope(|scope| {
        let synced = scope.spawn(|| file.sync_all());
        (crate::verify::hash(&file), synced.join())
    });
    let digest = hashed.map_err(|error| Error::io(what(), error))?;
    match synced {
        Ok(synced) => synced.map_err(|error| Error::io(format!("syncing {}", path.display()), error))?,
        Err(_) => return Err(Error::new(Kind::Internal, "a syncing thread panicked")),
    }
    Ok((digest, meta.len()))
}

/// The beginning of an ext4 or erofs, told apart by their magic numbers.
pub fn format_of(file: &mut impl Read) -> Result<crate::manifest::Format> {
    let mut head = vec![0; 2048];
    file.read_exact(&mut head).map_err(|error| Error::io("reading the file system", error))?;
    // Superblocks begin at byte 1024; ext4's magic is 56 bytes in.
    match (&head[1024..1028], &head[1080..1082]) {
        ([0xe2, 0xe1, 0xf5, 0xe0], _) => Ok(crate::manifest::Format::Erofs),
        (_, [0x53, 0xef]) => Ok(crate::manifest::Format::Ext4),
        _ => Err(Error::new(Kind::InvalidArgument, "neither ext4 nor erofs")),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[test]
    fn only_what_the_same_layers_meet_again_is_over_a_limit() {
        let kind = |exit, said: &str| {
            let mut stderr = tempfile::tempfile().unwrap();
            stderr.write_all(said.as_bytes()).unwrap();
            blame(Error::new(Kind::Internal, "unpacking"), exit, &stderr).kind()
        };
        assert_eq!(kind(Exit::Signal(TOO_LARGE), ""), Kind::Exhausted);
        assert_eq!(kind(Exit::Signal(6), "memory allocation of 4096 bytes failed"), Kind::Exhausted);
        assert_eq!(kind(Exit::Code(1), "mke2fs: No space left on device"), Kind::Exhausted);
        // The host's memory, or its operator: another time it may go well.
        assert_eq!(kind(Exit::Signal(9), ""), Kind::Internal);
        assert_eq!(kind(Exit::Signal(11), ""), Kind::Internal);
    }
}
