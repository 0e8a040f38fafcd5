//! VMs' writable disks: sparse ext4 files, each the clone of a template that is formatted once per size.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use clawpot_failpoint::{self as failpoint, Point};
use clawpot_host::fs::{self, Cloned};
use clawpot_host::process::{Tool, find_program};
use clawpot_types::{Error, Kind, MiB, Result, VmId};
use tokio::sync::{Mutex, OwnedMutexGuard};

/// Changes with what a template contains: one made by an earlier version is not used.
const TEMPLATE_LAYOUT: u32 = 1;
/// Locks for all VMs together: two VMs that share one wait for each other a few milliseconds.
const LOCKS: usize = 64;

#[derive(Debug)]
pub struct Disks {
    disks: PathBuf,
    templates: PathBuf,
    /// By VM: a removal waits for a clone that nobody waits for any more, else the clone would outlive it.
    locks: Vec<Arc<Mutex<()>>>,
    formatting: Mutex<()>,
    /// Held by whoever makes a spare.
    sparing: Arc<Mutex<()>>,
}

/// A spare is made after the create that took the last one, not beside it.
const LATER: Duration = Duration::from_millis(300);

impl Disks {
    /// Below `state`, which exists and which no other process uses. Blocks. Removes what a crash left half made.
    pub fn open(state: &Path) -> Result<Self> {
        let state = std::path::absolute(state)
            .map_err(|error| Error::io(format!("finding the state directory {}", state.display()), error))?;
        let (disks, templates) = (state.join("disks"), state.join("templates"));
        for dir in [&disks, &templates] {
            fs::ensure_dir(dir, 0o700)?;
            sweep(dir)?;
        }
        let locks = std::iter::repeat_with(Arc::default).take(LOCKS).collect();
        Ok(Self { disks, templates, locks, formatting: Mutex::default(), sparing: Arc::default() })
    }

    #[must_use]
    pub fn path(&self, vm: &VmId) -> PathBuf {
        self.disks.join(format!("{vm}.ext4"))
    }

    pub async fn look(&self, vm: &VmId) -> Result<Option<()>> {
        let path = self.path(vm);
        match tokio::fs::symlink_metadata(&path).await {
            Ok(_) => Ok(Some(())),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::io(format!("looking at disk {}", path.display()), error)),
        }
    }

    /// See `Images::create_disk`. Some 2 MiB of a 4 GiB template are data: 2 ms to copy, less where the file system can
    /// share blocks, but 10 ms to sync. So one disk of each size that was asked for is kept ready.
    pub async fn create(&self, vm: &VmId, size: MiB) -> Result<PathBuf> {
        let path = self.path(vm);
        if self.look(vm).await?.is_some() {
            return Ok(path);
        }
        let what = format!("creating disk {} of {size}", path.display());
        let template = self.template(size).await.map_err(|error| no_room(error, &self.templates).context(&what))?;
        let guard = self.lock(vm).await;
        let (target, spare) = (path.clone(), spare_of(&template));
        let made = {
            let template = template.clone();
            blocking(guard, move || take_or_clone(&spare, &template, &target)).await
        };
        match made.map_err(|error| no_room(error, &self.disks).context(what))? {
            Some(how) => tracing::debug!(%vm, how, "disk made"),
            None => tracing::debug!(%vm, "disk was there already"),
        }
        self.keep_spare(template);
        Ok(path)
    }

    /// In the background: that it fails costs the next create some milliseconds, no more.
    fn keep_spare(&self, template: PathBuf) {
        let sparing = Arc::clone(&self.sparing);
        tokio::spawn(async move {
            let turn = sparing.lock_owned().await;
            tokio::time::sleep(LATER).await;
            let spare = spare_of(&template);
            if let Err(error) = blocking(turn, move || clone_into_place(&template, &spare)).await {
                tracing::debug!(error = error.chain(), "no spare disk was made");
            }
        });
    }

    /// Gone afterwards, also when it was before.
    pub async fn remove(&self, vm: &VmId) -> Result<()> {
        let guard = self.lock(vm).await;
        let path = self.path(vm);
        blocking(guard, move || fs::remove_file_if_exists(&path)).await?;
        failpoint::reached(Point::DiskRemoved);
        Ok(())
    }

    async fn lock(&self, vm: &VmId) -> OwnedMutexGuard<()> {
        let sum: usize = vm.as_str().bytes().map(usize::from).sum();
        Arc::clone(&self.locks[sum % LOCKS]).lock_owned().await
    }

    /// The template for this size, formatted now (12–19 ms for 4 GiB) if it is the first disk of its size.
    async fn template(&self, size: MiB) -> Result<PathBuf> {
        let path = self.templates.join(format!("upper-v{TEMPLATE_LAYOUT}-{}.ext4", size.0));
        let is_there = || std::fs::symlink_metadata(&path).is_ok();
        if is_there() {
            return Ok(path);
        }
        let _one_at_a_time = self.formatting.lock().await;
        if !is_there() {
            let half = RemovedOnDrop(fs::temp_name(&path)?);
            let tree = RemovedOnDrop(fs::temp_name(&self.templates.join("tree"))?);
            format(&half.0, &tree.0, size).await?;
            failpoint::reached(Point::TemplateFormatted);
            let (from, to) = (half.0.clone(), path.clone());
            blocking((half, tree), move || put_in_place(&from, &to)).await?;
        }
        Ok(path)
    }
}

/// An ext4 with the two directories an overlay needs, `upper` and `work`.
async fn format(file: &Path, tree: &Path, size: MiB) -> Result<()> {
    for dir in [tree.to_owned(), tree.join("upper"), tree.join("work")] {
        fs::ensure_dir(&dir, 0o755)?;
    }
    make_ext4(file, size, "disk", &["-d".as_ref(), tree.as_os_str()]).await
}

/// An ext4 in a sparse file that is new. `more`: further options of mke2fs.
pub(crate) async fn make_ext4(file: &Path, size: MiB, label: &str, more: &[&OsStr]) -> Result<()> {
    let mke2fs = find_program("mke2fs", std::env::var_os("PATH").as_deref())
        .map_err(|error| error.hint("install the package e2fsprogs"))?;
    let size = format!("{}M", size.0);
    // All of it reads as zeros: with that said, mke2fs writes no inode table, and the guest's kernel does not set out to write
    // them either.
    let tool = Tool::new(mke2fs)
        .args(["-q", "-F", "-t", "ext4", "-b", "4096", "-m", "0", "-L", label])
        .args(["-E", "root_owner=0:0,lazy_itable_init=0,assume_storage_prezeroed=1"])
        .args(more)
        .args([file.as_os_str(), size.as_ref()]);
    tool.run().await.map(drop)
}

/// Beside its template.
fn spare_of(template: &Path) -> PathBuf {
    template.with_extension("spare.ext4")
}

/// How it was made, for the log; `None`: it was there.
fn take_or_clone(spare: &Path, template: &Path, path: &Path) -> Result<Option<String>> {
    let taken = match std::fs::symlink_metadata(path) {
        Ok(_) => return Ok(None),
        // It was synced before it got its name.
        Err(_) => std::fs::rename(spare, path),
    };
    match taken {
        Ok(()) => {
            failpoint::reached(Point::SpareTaken);
            path.parent().map_or(Ok(()), fs::sync_dir).map(|()| Some("spare".to_owned()))
        }
        Err(_) => Ok(clone_into_place(template, path)?.map(|how| format!("{how:?}"))),
    }
}

fn clone_into_place(template: &Path, path: &Path) -> Result<Option<Cloned>> {
    if std::fs::symlink_metadata(path).is_ok() {
        return Ok(None);
    }
    let half = RemovedOnDrop(fs::temp_name(path)?);
    let how = fs::clone_file(template, &half.0)?;
    failpoint::reached(Point::DiskCloned);
    put_in_place(&half.0, path)?;
    Ok(Some(how))
}

/// On the disk before it bears the name.
pub(crate) fn put_in_place(half: &Path, path: &Path) -> Result<()> {
    let what = || format!("finishing {}", path.display());
    std::fs::File::open(half)
        .and_then(|file| file.sync_all())
        .and_then(|()| std::fs::rename(half, path))
        .map_err(|error| Error::io(what(), error))?;
    failpoint::reached(Point::DiskNamed);
    path.parent().map_or(Ok(()), fs::sync_dir)
}

/// Half-made files bear names that begin with a dot.
pub(crate) fn sweep(dir: &Path) -> Result<()> {
    let what = || format!("looking for half-made files in {}", dir.display());
    for entry in std::fs::read_dir(dir).map_err(|error| Error::io(what(), error))? {
        let entry = entry.map_err(|error| Error::io(what(), error))?;
        let name = entry.file_name();
        if name.as_encoded_bytes().starts_with(b".") && name.as_encoded_bytes().ends_with(b".tmp") {
            fs::remove_tree_if_exists(&entry.path())?;
        }
    }
    Ok(())
}

/// A full disk is told as such, whether a system call or mke2fs met it.
pub(crate) fn no_room(error: Error, dir: &Path) -> Error {
    let chain = error.chain();
    if error.kind() != Kind::Exhausted && !chain.contains("No space left on device") {
        return error;
    }
    let hint = format!("free some space on the file system of {}; nothing was left behind", dir.display());
    // As root may use it, which the server is.
    let free = match rustix::fs::statvfs(dir) {
        Ok(found) => format!(": {} free", MiB::from_bytes(found.f_bfree.saturating_mul(found.f_frsize))),
        Err(_) => String::new(),
    };
    Error::new(Kind::Exhausted, format!("no room in {}{free}", dir.display())).because(error).hint(hint)
}

/// Runs `work` where it may block. `held` is let go when it ends, even if nobody waits for it any more.
pub(crate) async fn blocking<T: Send + 'static>(
    held: impl Send + 'static,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let task = tokio::task::spawn_blocking(move || {
        let result = work();
        drop(held);
        result
    });
    task.await.map_err(|error| Error::new(Kind::Internal, "a disk task panicked").because(error))?
}

/// Takes a half-made file or directory away when its making ends, however it ends.
pub(crate) struct RemovedOnDrop(pub(crate) PathBuf);

impl Drop for RemovedOnDrop {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_tree_if_exists(&self.0) {
            tracing::warn!(error = error.chain(), "a half-made file stays until the next start");
        }
    }
}
