//! Volumes' files: sparse ext4 files that guests write and the host only hands on. What reads a guest's file system, `e2fsck` and
//! `resize2fs`, runs confined ([`crate::unpack::program`]).

use std::fs::{File, Permissions};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use clawpot_core::ports::{Copied, VolumeFile, Volumes};
use clawpot_failpoint::{self as failpoint, Point};
use clawpot_host::fs::{self, Cloned};
use clawpot_host::process::{Exit, Finished, Rlimits, Tool, find_program};
use clawpot_types::{Error, Kind, MiB, Result, VolumeId};
use rustix::fs::FlockOperation;
use rustix::io::Errno;
use tokio::sync::{Mutex, OwnedMutexGuard};

use crate::disks::{RemovedOnDrop, blocking, make_ext4, no_room, put_in_place, sweep};
use crate::unpack::program::{FILE, FILE_NAME, USER, VERB};

/// How long a check or a resize may take: `e2fsck` reads every inode, some 4 GiB of them on the largest volume.
const LIMIT: Duration = Duration::from_secs(1800);
/// Between two looks whether a file is free.
const AGAIN: Duration = Duration::from_millis(10);

/// The [`Volumes`] port over `STATE/volumes`.
#[derive(Debug)]
pub struct LocalVolumes {
    dir: PathBuf,
    /// `clawpot-unpack`.
    helper: PathBuf,
    /// One at a time: they all become the same user, and what one might capture must not meet another's file.
    working: Arc<Mutex<()>>,
}

impl LocalVolumes {
    /// `state` exists and belongs to this process alone. Blocks. Removes what a crash left half made.
    pub fn open(state: &Path, helper: &Path) -> Result<Self> {
        let state = std::path::absolute(state)
            .map_err(|error| Error::io(format!("finding the state directory {}", state.display()), error))?;
        let dir = state.join("volumes");
        fs::ensure_dir(&dir, 0o700)?;
        sweep(&dir)?;
        Ok(Self { dir, helper: helper.to_owned(), working: Arc::default() })
    }

    async fn turn(&self) -> OwnedMutexGuard<()> {
        Arc::clone(&self.working).lock_owned().await
    }

    /// Runs a program of e2fsprogs on the file, confined.
    async fn confined(&self, id: &VolumeId, program: &str, args: &[&str]) -> Result<Finished> {
        let turn = self.turn().await;
        let path = self.path(id);
        let what = format!("running {program} on {}", path.display());
        let found = find_program(program, std::env::var_os("PATH").as_deref())
            .map_err(|error| error.hint("install the package e2fsprogs"))?;
        let file = lend(&path).await?;
        let size = file.metadata().map_err(|error| Error::io(what.clone(), error))?.len();
        let rlimits = Rlimits { fsize: Some(size), ..Rlimits::default() };
        let done = Tool::new(&self.helper)
            .args([VERB.as_ref(), found.as_os_str()])
            .args(args)
            .args([FILE_NAME])
            .timeout(LIMIT)
            .with(|spawn| spawn.fd(file.into(), FILE).rlimits(rlimits))
            .finish()
            .await;
        let back =
            chown(&path, Some(0), Some(0)).map_err(|error| Error::io(format!("taking {} back", path.display()), error));
        drop(turn);
        let done = done.map_err(|error| error.context(what))?;
        back.map(|()| done)
    }

    async fn fsck(&self, id: &VolumeId, args: &[&str]) -> Result<String> {
        let done = self.confined(id, "e2fsck", args).await?;
        match done.exit {
            Exit::Code(0) => Ok("nothing was wrong".to_owned()),
            // 1: corrected; 2: corrected, and a mounted one would need a reboot.
            Exit::Code(1 | 2) => Ok(format!("corrected: {}", said(&done))),
            // 4: left uncorrected; 8: it saw no file system that it could begin with.
            Exit::Code(4 | 8 | 12) => {
                let what = format!("its file system needs more repair than is done unasked: {}", said(&done));
                Err(Error::new(Kind::Corrupt, what).hint(format!(
                    "no VM gets it until it is repaired: as a user who may do nothing else, run `e2fsck -y` on a copy of {}, and put \
                     that in its place",
                    self.path(id).display()
                )))
            }
            exit => Err(Error::new(Kind::Internal, format!("e2fsck: {exit}: {}", said(&done)))),
        }
    }
}

/// Opened to read and write, and the confined user's from here on. Locked for as long as anybody has it open: what a server that
/// was killed had started is still at work on it, and would be beside the next.
async fn lend(path: &Path) -> Result<File> {
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
    file.set_permissions(Permissions::from_mode(0o600))
        .and_then(|()| std::os::unix::fs::fchown(&file, Some(USER), Some(USER)))
        .map_err(|error| Error::io(what(), error))?;
    Ok(file)
}

/// The last lines of what it wrote, in one.
fn said(done: &Finished) -> String {
    let text = [&done.stdout[..], &done.stderr[..]].concat();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let last = lines[lines.len().saturating_sub(3)..].join("; ").replace(FILE_NAME, "volume");
    last.chars().map(|c| if c.is_control() { '?' } else { c }).take(500).collect()
}

/// Whether an ext4 says that it was unmounted in order: `s_state` is "clean" without errors, and its journal needs no recovery.
fn is_clean(file: &File) -> std::io::Result<bool> {
    let mut superblock = [0; 1024];
    file.read_exact_at(&mut superblock, 1024)?;
    let short = |at: usize| u16::from_le_bytes([superblock[at], superblock[at + 1]]);
    let (magic, state, incompatible) = (short(0x38), short(0x3a), short(0x60));
    Ok(magic == 0xEF53 && state & 0b11 == 0b01 && incompatible & 0x4 == 0)
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
            let looked = file.metadata().and_then(|found| Ok((found.blocks().saturating_mul(512), is_clean(&file)?)));
            let (used_bytes, clean) =
                looked.map_err(|error| Error::io(format!("looking at {}", path.display()), error))?;
            Ok(Some(VolumeFile { used_bytes, clean }))
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

    async fn check(&self, id: &VolumeId) -> Result<String> {
        self.fsck(id, &["-p"]).await
    }

    async fn grow(&self, id: &VolumeId, size: MiB) -> Result<()> {
        let path = self.path(id);
        let too_much = || Error::new(Kind::InvalidArgument, format!("{size}: more than a file can have"));
        let bytes = size.bytes().ok_or_else(too_much)?;
        let larger = {
            let path = path.clone();
            move || {
                let what = || format!("growing {} to {size}", path.display());
                let file = File::options().write(true).open(&path).map_err(|error| Error::io(what(), error))?;
                let now = file.metadata().map_err(|error| Error::io(what(), error))?.len();
                if now < bytes {
                    file.set_len(bytes).and_then(|()| file.sync_all()).map_err(|error| Error::io(what(), error))?;
                }
                Ok(())
            }
        };
        blocking((), larger).await?;
        failpoint::reached(Point::VolumeLengthened);
        // Without it resize2fs refuses; what it would correct is corrected.
        self.fsck(id, &["-f", "-p"]).await?;
        let done = self.confined(id, "resize2fs", &[]).await?;
        match done.exit {
            Exit::Code(0) => Ok(()),
            exit => Err(Error::new(Kind::Internal, format!("resize2fs: {exit}: {}", said(&done)))),
        }
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
