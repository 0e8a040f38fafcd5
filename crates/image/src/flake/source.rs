//! A flake's directory as an archive: kept, looked through, and made into a disk by the confined helper.

use std::fs::File;
use std::io::{self, BufReader, Read as _};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use clawpot_core::ports::{BoxStream, LARGEST_SOURCE, Source};
use clawpot_types::{Digest, Error, Kind, Result, VmId};
use futures_util::StreamExt as _;
use sha2::{Digest as _, Sha256};
use tokio::io::AsyncWriteExt as _;
use tokio::sync::mpsc;

use super::{ARCHIVE, Bench, SOURCE};
use crate::build::{Feed, Recipe};
use crate::store::digest_of;
use crate::unpack::limits::Limits;
use crate::unpack::tar::{Archive, What, shown};
use crate::unpack::tree::clean;

/// Of the archive, bytes, and of entries in it.
const ARCHIVE_LIMIT: u64 = LARGEST_SOURCE.0 << 20;
const ENTRIES: u64 = 200_000;
/// What the last blocks of so many files take more than the archive has of them, bytes: the helper counts in blocks, and what was let
/// in by the size of its archive is not refused for that.
const BLOCKS: u64 = ENTRIES * 4096;
/// Directories above one another.
const DEPTH: usize = 64;
/// Of `flake.lock`, bytes: nixpkgs' largest users have some hundred kilobytes.
const LOCK_LIMIT: u64 = 16 << 20;
/// Nix gives everything in its store this time, seconds.
const TIME: i64 = 1;

pub async fn receive(bench: &Bench, build: &VmId, mut archive: BoxStream<Result<Bytes>>) -> Result<Source> {
    let (dir, path) = (bench.of(build), bench.of(build).join(ARCHIVE));
    bench.blocking(move |_| clawpot_host::fs::ensure_dir(&dir, 0o700)).await?;
    let failed = |error| Error::io(format!("writing {}", path.display()), error);
    let mut file = tokio::fs::File::create_new(&path).await.map_err(failed)?;
    let (mut hasher, mut bytes) = (Sha256::new(), 0_u64);
    let mut over = false;
    // To its end, also where it is too much: a client that still sends is not cut off before it hears why.
    while let Some(chunk) = archive.next().await {
        let chunk = chunk?;
        bytes = bytes.saturating_add(chunk.len() as u64);
        over |= bytes > ARCHIVE_LIMIT;
        if bytes > 4 * ARCHIVE_LIMIT {
            break;
        }
        if !over {
            hasher.update(&chunk);
            file.write_all(&chunk).await.map_err(failed)?;
        }
    }
    if over {
        let what = format!("the flake's directory is larger than {} MiB", ARCHIVE_LIMIT >> 20);
        return Err(Error::new(Kind::Exhausted, what).hint("keep what it does not need out of it, or out of git"));
    }
    file.flush().await.map_err(failed)?;
    drop(file);
    let digest = Digest::from_sha256(&hasher.finalize().into());
    let lock = bench.blocking(move |_| look_through(&path)).await?;
    Ok(Source { digest, lock })
}

/// Whether it is a flake, and its lock file's digest.
fn look_through(path: &Path) -> Result<Option<Digest>> {
    let file = File::open(path).map_err(|error| Error::io(format!("opening {}", path.display()), error))?;
    let mut archive = Archive::new(BufReader::with_capacity(128 << 10, file));
    let what = |error: Error| error.context("reading the archive of the flake's directory");
    let (mut entries, mut flake, mut lock) = (0_u64, false, None);
    while let Some(entry) = archive.next_entry().map_err(what)? {
        entries += 1;
        if entries > ENTRIES {
            return Err(Error::new(Kind::Exhausted, format!("the flake's directory has over {ENTRIES} entries")));
        }
        match clean(&entry.path, DEPTH).map_err(what)?.as_slice() {
            b"flake.nix" => flake = matches!(entry.what, What::File | What::Symlink),
            b"flake.lock" if entry.what == What::File => {
                if entry.size > LOCK_LIMIT {
                    let what = format!("{}: {} bytes, over {LOCK_LIMIT}", shown(&entry.path), entry.size);
                    return Err(Error::new(Kind::InvalidArgument, what));
                }
                let mut text = Vec::new();
                (&mut archive)
                    .take(entry.size)
                    .read_to_end(&mut text)
                    .map_err(|error| Error::io("reading flake.lock", error))?;
                lock = Some(digest_of(&text));
            }
            _ => {}
        }
    }
    if flake {
        return Ok(lock);
    }
    Err(Error::new(Kind::InvalidArgument, "the directory is no flake: there is no flake.nix in it")
        .hint("in a git repository only what git knows is taken: `git add flake.nix`"))
}

/// The disk of sources, where there is an archive, which goes. Nothing that is in the archive is a file of the host's at any
/// time but in the helper's own directory.
pub async fn disk(bench: &Bench, dir: &Path) -> Result<Option<PathBuf>> {
    let archive = dir.join(ARCHIVE);
    let file = match File::open(&archive) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::io(format!("opening {}", archive.display()), error)),
    };
    let limits = Limits { bytes: ARCHIVE_LIMIT + BLOCKS, entries: ENTRIES, depth: DEPTH, ..Limits::default() };
    // The same for all: nobody looks for it by its name.
    let uuid = "c1a3b07e-f1a6-4e00-8000-000000000001".to_owned();
    let (feed, fed) = mpsc::channel(2);
    for one in [Feed::Layer { file, diff_id: None }, Feed::End] {
        feed.try_send(one).map_err(|_| Error::new(Kind::Internal, "unpacking the flake: nobody takes it"))?;
    }
    let made = bench.builder.build(Recipe { limits, plain: true, uuid, time: TIME }, fed, |_| {}).await;
    // Until here: a helper that sees the end of it gives up.
    drop(feed);
    let made = made.map_err(|error| error.context("making a disk of the flake's directory"))?;
    let to = dir.join(SOURCE);
    let named = to.clone();
    bench
        .blocking(move |_| {
            std::fs::rename(&made.path, &named)
                .map_err(|error| Error::io(format!("moving {} to {}", made.path.display(), named.display()), error))?;
            clawpot_host::fs::remove_file_if_exists(&archive)
        })
        .await?;
    Ok(Some(to))
}
