//! One blob of a registry into the store: verified as it comes, gone on with where it broke off, by one process at a time.

use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use clawpot_host::fs;
use clawpot_types::{Digest, Error, Kind, Result};
use futures_util::StreamExt as _;
use oci_client::client::BlobResponse;
use oci_client::{Client, Reference};
use sha2::{Digest as _, Sha256};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::Library;
use super::progress::Meter;
use super::pull::registry_error;
use crate::lock::Lock;
use crate::manifest::Blob;

/// Chunks of one download on their way to the disk. hyper makes them as large as 400 KiB where the network is fast, so few of them are
/// much: with sixteen, three downloads held 40 MiB.
const BACKLOG: usize = 2;
/// How long a registry that went away in the middle of a blob is looked for again, without a byte of it: 0.5, 1, 2, 4, 8 s.
const ATTEMPTS: u32 = 5;
const FIRST_PAUSE: Duration = Duration::from_millis(500);
/// Between looks whether another process has finished the same blob.
const POLL: Duration = Duration::from_millis(100);

/// Files that have come whole and are on their way to the disk, while what is in them is used already.
#[derive(Clone, Debug, Default)]
pub(super) struct Landing(Arc<Mutex<JoinSet<()>>>);

impl Landing {
    fn land(&self, download: Download, to: PathBuf) {
        let mut tasks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        tasks.spawn_blocking(move || {
            if let Err(error) = place(&download.file, &download.path, &to) {
                tracing::warn!(error = error.chain(), "a layer is not kept for the next version of its image");
            }
        });
    }

    /// Until each is under its name; those that failed are not.
    pub(super) async fn landed(&self) {
        let tasks = std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner));
        // They do not panic, and nobody else can end them.
        tasks.join_all().await;
    }
}

/// What is fetched, and how far it is.
struct Download {
    file: File,
    path: PathBuf,
    hasher: Sha256,
    bytes: u64,
    _lock: Lock,
}

impl Library {
    /// The blob's file, opened for reading. Its digest is right; `landing` tells when it is on the disk as well.
    pub(super) async fn fetch(
        &self,
        (client, from): (&Client, &Reference),
        blob: &Blob,
        meter: Meter,
        landing: &Landing,
    ) -> Result<File> {
        let what = || format!("layer {} of {from}", blob.digest);
        let mut download = loop {
            if let Some(file) = self.fetched(blob)? {
                meter.at("present", blob.size);
                return Ok(file);
            }
            let (path, digest) = (self.store.partial_path(&blob.digest), blob.clone());
            match self.blocking(move |_| Download::open(path, &digest)).await? {
                // Another may have finished it before this one had the lock.
                Some(download) if self.fetched(blob)?.is_none() => break download,
                Some(_) => {}
                None => {
                    meter.at("waiting for another pull", 0);
                    tokio::time::sleep(POLL).await;
                }
            }
        };
        // Whoever began it: another registry, a host whose power failed.
        let mut begun = download.bytes > 0;
        let file = loop {
            let doing = if begun { "resuming" } else { "downloading" };
            download =
                whole(client, from, blob, download, (&meter, doing)).await.map_err(|error| error.context(what()))?;
            match download.verified(&blob.digest) {
                // What was there may have been the beginning of something else.
                Err(error) if begun && error.kind() == Kind::Corrupt => {
                    tracing::info!(layer = %blob.digest, "what an earlier download left of it is not its beginning");
                    download.restart()?;
                    begun = false;
                }
                Err(error) => {
                    fs::remove_file_if_exists(&download.path)?;
                    return Err(error.context(what()));
                }
                Ok(file) => break file,
            }
        };
        landing.land(download, self.store.oci_path(&blob.digest));
        meter.at("downloaded", blob.size);
        Ok(file)
    }

    /// One small system call or two.
    pub(super) fn fetched(&self, blob: &Blob) -> Result<Option<File>> {
        let path = self.store.oci_path(&blob.digest);
        let what = || format!("opening {}", path.display());
        match File::open(&path) {
            Ok(file) => {
                let meta = file.metadata().map_err(|error| Error::io(what(), error))?;
                Ok((meta.is_file() && meta.len() == blob.size).then_some(file))
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::io(what(), error)),
        }
    }

    /// Removes those of `blobs` that are in the store and are not what their digest says, for they are believed by their size. Gives
    /// their number. Reads all of them.
    pub(super) fn remove_rotten(&self, blobs: &[Blob]) -> Result<usize> {
        let mut rotten = 0;
        for blob in blobs {
            let Some(file) = self.fetched(blob)? else { continue };
            // What cannot be read is of no use either.
            if crate::verify::hash(&file).is_ok_and(|found| found == blob.digest) {
                continue;
            }
            let path = self.store.oci_path(&blob.digest);
            tracing::warn!(path = %path.display(), "a layer is no longer what it was, and is fetched again: is the disk sound?");
            fs::remove_file_if_exists(&path)?;
            rotten += 1;
        }
        Ok(rotten)
    }
}

/// As many bytes as there are to be, in as many stretches as that takes.
async fn whole(
    client: &Client,
    from: &Reference,
    blob: &Blob,
    mut download: Download,
    (meter, doing): (&Meter, &'static str),
) -> Result<Download> {
    let mut failures = 0;
    // The most there ever was: where a registry knows no ranges each attempt begins anew, and that it came further than the last one
    // may be true for ever.
    let mut furthest = download.bytes;
    while download.bytes < blob.size {
        let error;
        (download, error) = stretch(client, from, blob, download, (meter, doing)).await?;
        let Some(error) = error else { continue };
        failures = if download.bytes > furthest { 1 } else { failures + 1 };
        furthest = furthest.max(download.bytes);
        if error.kind() != Kind::Unavailable || failures > ATTEMPTS {
            let kept = format!(
                "{} of {} MiB are kept; the same pull goes on from there",
                download.bytes >> 20,
                blob.size >> 20
            );
            return Err(error.hint(kept));
        }
        meter.at("waiting for the registry", download.bytes);
        tokio::time::sleep(FIRST_PAUSE * 2_u32.pow(failures - 1)).await;
    }
    Ok(download)
}

/// From where the download stands to its end, or to where it breaks: then with the error.
async fn stretch(
    client: &Client,
    from: &Reference,
    blob: &Blob,
    mut download: Download,
    (meter, doing): (&Meter, &'static str),
) -> Result<(Download, Option<Error>)> {
    let asked = client.pull_blob_stream_partial(from, blob.digest.as_str(), download.bytes, None).await;
    let mut chunks = match asked {
        Ok(BlobResponse::Partial(part)) => part.stream,
        Ok(BlobResponse::Full(whole)) => {
            // A registry that knows no ranges: from the start.
            download.restart()?;
            whole.stream
        }
        Err(error) => return Ok((download, Some(registry_error(from, error)))),
    };
    let (send, receive) = mpsc::channel(BACKLOG);
    let size = blob.size;
    // Of the whole: what came earlier is not fetched again, and counts.
    let mut at = download.bytes;
    let writer = tokio::task::spawn_blocking(move || download.write(receive, size));
    let mut broken = None;
    while let Some(chunk) = chunks.next().await {
        match chunk {
            Ok(chunk) => {
                at += chunk.len() as u64;
                // A writer that takes no more tells why below.
                if send.send(chunk).await.is_err() {
                    break;
                }
                meter.at(doing, at);
            }
            Err(error) => {
                broken = Some(
                    Error::new(Kind::Unavailable, format!("registry {}: the connection broke", from.registry()))
                        .because(error),
                );
                break;
            }
        }
    }
    drop(send);
    let download =
        writer.await.map_err(|error| Error::new(Kind::Internal, "a download's writer panicked").because(error))??;
    if broken.is_none() && download.bytes < size {
        broken = Some(Error::new(Kind::Unavailable, format!("registry {}: the answer ended early", from.registry())));
    }
    Ok((download, broken))
}

impl Download {
    /// What there is of it already is read once more. `None`: another process has it.
    fn open(path: PathBuf, blob: &Blob) -> Result<Option<Self>> {
        let Some(lock) = Lock::try_exclusive(&path)? else { return Ok(None) };
        let what = || format!("opening {}", path.display());
        let mut file = File::options().read(true).write(true).open(&path).map_err(|error| Error::io(what(), error))?;
        let mut hasher = Sha256::new();
        let mut bytes = crate::verify::hash_into(&file, &mut hasher).map_err(|error| Error::io(what(), error))?;
        if bytes > blob.size {
            file.set_len(0).and_then(|()| file.rewind()).map_err(|error| Error::io(what(), error))?;
            (hasher, bytes) = (Sha256::new(), 0);
        }
        Ok(Some(Self { file, path, hasher, bytes, _lock: lock }))
    }

    fn restart(&mut self) -> Result<()> {
        let emptied = self.file.set_len(0).and_then(|()| self.file.rewind());
        emptied.map_err(|error| Error::io(format!("emptying {}", self.path.display()), error))?;
        (self.hasher, self.bytes) = (Sha256::new(), 0);
        Ok(())
    }

    fn write(mut self, mut chunks: mpsc::Receiver<Bytes>, size: u64) -> Result<Self> {
        let what = format!("writing {}", self.path.display());
        self.file.seek(SeekFrom::Start(self.bytes)).map_err(|error| Error::io(what.as_str(), error))?;
        while let Some(chunk) = chunks.blocking_recv() {
            if self.bytes + chunk.len() as u64 > size {
                self.restart()?;
                return Err(Error::new(
                    Kind::Corrupt,
                    format!("it is longer than the {size} bytes that its manifest says"),
                ));
            }
            self.file.write_all(&chunk).map_err(|error| Error::io(what.as_str(), error))?;
            self.hasher.update(&chunk);
            self.bytes += chunk.len() as u64;
        }
        Ok(self)
    }

    /// Opened once more from its beginning, if it has its digest. A small system call.
    fn verified(&mut self, digest: &Digest) -> Result<File> {
        let found = Digest::from_sha256(&self.hasher.finalize_reset().into());
        if found != *digest {
            return Err(Error::new(Kind::Corrupt, format!("what came has the digest {found}"))
                .hint("the registry has it wrong, or somebody between it and here changed it; nothing was kept"));
        }
        File::open(&self.path).map_err(|error| Error::io(format!("opening {}", self.path.display()), error))
    }
}

/// Synced before it bears the name, and nobody's to change.
pub(super) fn place(file: &File, from: &std::path::Path, to: &std::path::Path) -> Result<()> {
    let mode = rustix::fs::Mode::from_raw_mode(0o444);
    rustix::fs::fchmod(file, mode)
        .map_err(std::io::Error::from)
        .and_then(|()| file.sync_all())
        .and_then(|()| std::fs::rename(from, to))
        .map_err(|error| Error::io(format!("moving {} to {}", from.display(), to.display()), error))?;
    to.parent().map_or(Ok(()), fs::sync_dir)
}
