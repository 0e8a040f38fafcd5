//! Volumes' files: sparse ext4 files that guests write and the host only hands on. What reads a guest's file system, `e2fsck`,
//! runs confined ([`crate::unpack::program`]); what grows it is the next guest's kernel, whose journal keeps it whole meanwhile.

use std::fs::{File, Permissions};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use clawpot_core::ports::{Check, Copied, VolumeFile, Volumes};
use clawpot_failpoint::{self as failpoint, Point};
use clawpot_host::fs::{self, Cloned};
use clawpot_host::process::{Exit, Finished, Rlimits, Tool, find_program};
use clawpot_types::ext4::{self, Superblock};
use clawpot_types::{Error, Kind, MiB, Result, VolumeId};
use rustix::fs::FlockOperation;
use rustix::io::Errno;
use tokio::sync::Semaphore;
use tokio::time::Instant;

use crate::disks::{RemovedOnDrop, blocking, make_ext4, no_room, put_in_place, sweep};
use crate::owners::Owners;
use crate::unpack::program::{FILE, FILE_NAME, OWN, VERB};

/// How long a check may take: `e2fsck` reads every inode, some 4 GiB of them on the largest volume.
const LIMIT: Duration = Duration::from_secs(1800);
/// Between two looks whether a file is free, and a user.
const AGAIN: Duration = Duration::from_millis(10);
/// The fewest checks that run at once; on larger hosts one for each CPU. Each may come to take 4 GiB of memory, and what a guest wrote
/// may keep one busy until its time is over: the others are not to wait for that.
const AT_ONCE: usize = 4;
/// Kept of the beginning and of the end of what a check says, bytes: of a file system in shreds it is a line for each inode.
const SAID: usize = 64 << 10;

/// The [`Volumes`] port over `STATE/volumes`.
#[derive(Debug)]
pub struct LocalVolumes {
    dir: PathBuf,
    /// `clawpot-unpack`.
    helper: PathBuf,
    /// As many checks as may run at once.
    turns: Arc<Semaphore>,
}

impl LocalVolumes {
    /// `state` exists and belongs to this process alone. Blocks. Removes what a crash left half made.
    pub fn open(state: &Path, helper: &Path) -> Result<Self> {
        let state = std::path::absolute(state)
            .map_err(|error| Error::io(format!("finding the state directory {}", state.display()), error))?;
        let dir = state.join("volumes");
        fs::ensure_dir(&dir, 0o700)?;
        sweep(&dir)?;
        let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        Ok(Self { dir, helper: helper.to_owned(), turns: Arc::new(Semaphore::new(cpus.max(AT_ONCE))) })
    }

    /// Runs a program of e2fsprogs on the file, confined, as a user that nobody else has: what one might capture meets no other's file.
    async fn confined(&self, id: &VolumeId, program: &str, args: &[&str]) -> Result<Finished> {
        let path = self.path(id);
        let what = format!("running {program} on {}", path.display());
        let found = find_program(program, std::env::var_os("PATH").as_deref())
            .map_err(|error| error.hint("install the package e2fsprogs"))?;
        // Before its turn, so that whoever waits for a file keeps nobody from another.
        let file = alone(&path).await?;
        let turn = self.turns.acquire().await;
        let owners = owners().await.map_err(|error| error.context(what.clone()))?;
        lend(&file, owners.from).map_err(|error| Error::io(what.clone(), error))?;
        let size = file.metadata().map_err(|error| Error::io(what.clone(), error))?.len();
        let rlimits = Rlimits { fsize: Some(size), ..Rlimits::default() };
        let (user, own) = (owners.from.to_string(), owners.lock()?);
        let done = Tool::new(&self.helper)
            .args([VERB.as_ref(), user.as_ref(), found.as_os_str()])
            .args(args)
            .args([FILE_NAME])
            .timeout(LIMIT)
            .keep_ends(SAID)
            .with(|spawn| spawn.fd(file.into(), FILE).fd(own, OWN).rlimits(rlimits))
            .finish()
            .await;
        let back =
            chown(&path, Some(0), Some(0)).map_err(|error| Error::io(format!("taking {} back", path.display()), error));
        drop((owners, turn));
        let done = done.map_err(|error| error.context(what))?;
        back.map(|()| done)
    }

    async fn fsck(&self, id: &VolumeId, how: Check) -> Result<String> {
        let args: &[&str] = match how {
            Check::Quick => &["-p"],
            Check::Whole => &["-f", "-p"],
            Check::Repair => &["-f", "-y"],
        };
        let done = self.confined(id, "e2fsck", args).await?;
        match done.exit {
            // 1: corrected; 2: corrected, and a mounted one would need a reboot.
            Exit::Code(1 | 2) => Ok(format!("corrected: {}", mended(&done))),
            // Without a superblock a repair begins with a copy of it, and tells only that.
            Exit::Code(0) if written(&done).contains("? yes") => Ok(format!("corrected: {}", mended(&done))),
            Exit::Code(0) => Ok("nothing was wrong".to_owned()),
            // 4: left uncorrected; 8: it could not even begin, as without a superblock. With 12 both.
            Exit::Code(4 | 8 | 12) if !lacks_means(&done) => {
                let found = match how {
                    Check::Repair => "its file system is beyond repair",
                    _ => "its file system takes more repair than is done unasked",
                };
                let what = format!("{found}: {}", said(&done));
                Err(Error::new(Kind::Corrupt, what))
            }
            exit => Err(Error::new(Kind::Internal, format!("e2fsck: {exit}: {}", said(&done)))),
        }
    }
}

/// A user that nobody else on the host has. While all are somebody's one is waited for: a VM's start is not to fail for that.
async fn owners() -> Result<Owners> {
    let deadline = Instant::now() + LIMIT;
    loop {
        match blocking((), Owners::claim).await {
            Err(error) if error.kind() == Kind::Exhausted && Instant::now() < deadline => {
                tokio::time::sleep(AGAIN).await;
            }
            done => return done,
        }
    }
}

/// Opened to read and write. Locked for as long as anybody has it open: what a server that was killed had started is still at work
/// on it, and would be beside the next.
async fn alone(path: &Path) -> Result<File> {
    let what = || format!("opening {}", path.display());
    let file = File::options().read(true).write(true).open(path).map_err(|error| Error::io(what(), error))?;
    let alone = async {
        loop {
            match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Err(Errno::WOULDBLOCK) => tokio::time::sleep(AGAIN).await,
                done => return done.map_err(|errno| Error::io(what(), errno.into())),
            }
        }
    };
    tokio::time::timeout(LIMIT, alone).await.unwrap_or_else(|_| {
        let what = format!("{}: another program has worked on it for {} s", path.display(), LIMIT.as_secs());
        Err(Error::new(Kind::Timeout, what).hint(format!("see which with `fuser -v {}`, and end it", path.display())))
    })?;
    Ok(file)
}

/// The confined user's from here on.
fn lend(file: &File, user: u32) -> std::io::Result<()> {
    file.set_permissions(Permissions::from_mode(0o600))
        .and_then(|()| std::os::unix::fs::fchown(file, Some(user), Some(user)))
}

/// At least so long. Again is fine.
fn lengthen(path: &Path, bytes: u64) -> Result<()> {
    let what = || format!("making {} longer", path.display());
    let file = File::options().write(true).open(path).map_err(|error| Error::io(what(), error))?;
    let before = file.metadata().map_err(|error| Error::io(what(), error))?.len();
    if before < bytes {
        file.set_len(bytes).and_then(|()| file.sync_all()).map_err(|error| Error::io(what(), error))?;
    }
    Ok(())
}

/// What it says that tells something, in one line: its errors, else its last words.
fn said(done: &Finished) -> String {
    let text = written(done);
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !is_noise(line));
    let lines: Vec<&str> = lines.collect();
    let errors: Vec<&str> = lines.iter().copied().filter(|line| is_error(line)).collect();
    let told = if errors.is_empty() { lines } else { errors };
    one_line(&told[told.len().saturating_sub(3)..].join("; "))
}

/// What it did about each thing that it found, where it answered its own questions.
fn mended(done: &Finished) -> String {
    /// More are counted, not told.
    const TOLD: usize = 4;
    let text = written(done);
    let answers: Vec<&str> = text.lines().filter_map(|line| line.trim().strip_suffix("? yes")).collect();
    let mut told = answers.iter().take(TOLD).copied().collect::<Vec<_>>().join("; ");
    if text.contains("\n[…]\n") {
        told.push_str("; very many more");
    } else if answers.len() > TOLD {
        told.push_str(&format!("; {} more", answers.len() - TOLD));
    }
    if text.contains("Connect to /lost+found? yes") {
        told.push_str("; what lost its name is in lost+found");
    }
    if told.is_empty() { said(done) } else { one_line(&told) }
}

fn written(done: &Finished) -> String {
    String::from_utf8_lossy(&[&done.stdout[..], &done.stderr[..]].concat()).replace(FILE_NAME, "volume")
}

/// By whatever path it was started.
fn is_error(line: &str) -> bool {
    line.split_once("e2fsck: ").is_some_and(|(path, _)| path.is_empty() || path.starts_with('/') && path.ends_with('/'))
}

/// Versions, decoration, and what to type on a device.
fn is_noise(line: &str) -> bool {
    line.starts_with("e2fsck 1.") || line.contains("*****") || line.starts_with("(i.e.")
}

fn one_line(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '?' } else { c }).take(500).collect()
}

/// Whether it was the host that did not let it: the file system may be in the best of order.
fn lacks_means(done: &Finished) -> bool {
    let text = written(done);
    let lacks = ["Cannot allocate memory", "Memory allocation failed", "Resource temporarily unavailable"];
    let mut errors = text.lines().filter(|line| is_error(line));
    // A block that could not be written is told of in a question.
    text.contains("No space left on device") || errors.any(|line| lacks.iter().any(|lack| line.contains(lack)))
}

/// Whether it is an ext4 that says that it was unmounted in order.
fn is_clean(file: &File) -> std::io::Result<bool> {
    let mut superblock = [0; ext4::LEN];
    file.read_exact_at(&mut superblock, ext4::AT)?;
    Ok(Superblock::of(&superblock).is_some_and(Superblock::is_clean))
}

#[async_trait]
impl Volumes for LocalVolumes {
    fn path(&self, id: &VolumeId) -> PathBuf {
        self.dir.join(format!("{id}.ext4"))
    }

    async fn look(&self, id: &VolumeId) -> Result<Option<VolumeFile>> {
        let path = self.path(id);
        let look = move || {
            let file = match File::options().read(true).custom_flags(libc::O_NOFOLLOW).open(&path) {
                Ok(file) => file,
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
                Err(error) => return Err(Error::io(format!("looking at {}", path.display()), error)),
            };
            let looked = file.metadata().and_then(|found| Ok((found, is_clean(&file)?)));
            let (found, clean) = looked.map_err(|error| Error::io(format!("looking at {}", path.display()), error))?;
            let used_bytes = found.blocks().saturating_mul(512);
            Ok(Some(VolumeFile { size: MiB::from_bytes(found.len()), used_bytes, clean }))
        };
        blocking((), look).await
    }

    async fn create(&self, id: &VolumeId, size: MiB) -> Result<()> {
        let path = self.path(id);
        let what = format!("creating {} of {size}", path.display());
        let half = RemovedOnDrop(fs::temp_name(&path)?);
        let made = async {
            make_ext4(&half.0, size, "volume", &[]).await?;
            failpoint::reached(Point::VolumeFormatted);
            let (from, to) = (half.0.clone(), path);
            blocking(half, move || put_in_place(&from, &to)).await
        };
        made.await.map_err(|error| no_room(error, &self.dir).context(what))
    }

    async fn copy(&self, from: &VolumeId, to: &VolumeId) -> Result<Copied> {
        let (source, path) = (self.path(from), self.path(to));
        let what = format!("copying {} to {}", source.display(), path.display());
        let half = RemovedOnDrop(fs::temp_name(&path)?);
        let half_name = half.0.clone();
        let copied = blocking(half, move || {
            let how = fs::clone_file(&source, &half_name)?;
            put_in_place(&half_name, &path)?;
            Ok(match how {
                Cloned::Reflink => Copied::Reflink,
                Cloned::Sparse { copied } => Copied::Sparse { bytes: copied },
            })
        });
        copied.await.map_err(|error| no_room(error, &self.dir).context(what))
    }

    async fn check(&self, id: &VolumeId, how: Check) -> Result<String> {
        if how == Check::Quick && self.look(id).await?.is_some_and(|file| file.clean) {
            return Ok("nothing was wrong".to_owned());
        }
        self.fsck(id, how).await.map_err(|error| no_room(error, &self.dir))
    }

    async fn grow(&self, id: &VolumeId, size: MiB) -> Result<()> {
        let path = self.path(id);
        let what = format!("growing {} to {size}", path.display());
        let bytes = size.bytes().ok_or_else(|| Error::new(Kind::InvalidArgument, format!("{what}: too large")))?;
        let longer = blocking((), move || lengthen(&path, bytes)).await;
        failpoint::reached(Point::VolumeLengthened);
        longer.map_err(|error| no_room(error, &self.dir).context(what))
    }

    async fn remove(&self, id: &VolumeId) -> Result<()> {
        let path = self.path(id);
        blocking((), move || {
            fs::remove_file_if_exists(&path)?;
            path.parent().map_or(Ok(()), fs::sync_dir)
        })
        .await
    }

    async fn list(&self) -> Result<Vec<VolumeId>> {
        let dir = self.dir.clone();
        let list = move || {
            let what = || format!("listing {}", dir.display());
            let mut found = Vec::new();
            for entry in std::fs::read_dir(&dir).map_err(|error| Error::io(what(), error))? {
                let name = entry.map_err(|error| Error::io(what(), error))?.file_name();
                found.extend(name.to_str().and_then(|name| name.strip_suffix(".ext4")?.parse().ok()));
            }
            Ok(found)
        };
        blocking((), list).await
    }
}
