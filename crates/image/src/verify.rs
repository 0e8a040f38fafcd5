//! Files are what their digest says. A verdict is kept, also over restarts, until the file is another or was written to.

use std::collections::BTreeMap;
use std::fs::{File, Metadata, OpenOptions};
use std::io::Read;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use clawpot_types::{Digest, Error, Kind, Result};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::manifest::Blob;

const VERSION: u32 = 1;

/// The file as it was when it was read. Not ctime: every hard link to the file, hence every VM, changes that. So whoever is
/// root and sets mtime back after writing is not noticed; disk errors and half-done copies are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Seen {
    dev: u64,
    ino: u64,
    size: u64,
    mtime_s: i64,
    mtime_ns: i64,
}

impl Seen {
    fn of(meta: &Metadata) -> Self {
        Self { dev: meta.dev(), ino: meta.ino(), size: meta.size(), mtime_s: meta.mtime(), mtime_ns: meta.mtime_nsec() }
    }
}

/// Of one state directory: host paths and inodes mean nothing elsewhere.
#[derive(Serialize, Deserialize)]
struct Verdicts {
    version: u32,
    /// By digest.
    files: BTreeMap<Digest, Seen>,
}

/// Checks files against their digests. Everything here blocks.
#[derive(Debug)]
pub struct Verifier {
    /// Where verdicts are kept. It is a cache: lost or unreadable, files are read once more.
    cache: PathBuf,
    good: Mutex<BTreeMap<Digest, Seen>>,
    /// Held while a file is read, so that VMs created together do not each read it.
    reading: Mutex<()>,
}

impl Verifier {
    #[must_use]
    pub fn open(cache: &Path) -> Self {
        Self { cache: cache.to_owned(), good: Mutex::new(load(cache)), reading: Mutex::new(()) }
    }

    /// Whether the file is there and known to be what it should; reads nothing of it.
    #[must_use]
    pub fn is_known(&self, path: &Path, blob: &Blob) -> bool {
        std::fs::symlink_metadata(path).is_ok_and(|meta| self.is_good(&blob.digest, &Seen::of(&meta)))
    }

    /// `role` ("kernel", …) and path are in every error. Size and mode first, then, unless known, the whole content.
    /// `NotFound`, `Corrupt`; `FailedPrecondition`: someone besides root could change it.
    pub fn verify(&self, role: &str, path: &Path, blob: &Blob) -> Result<()> {
        let what = || format!("{role} {}", path.display());
        let open = || {
            let flags = rustix::fs::OFlags::NOFOLLOW.bits();
            OpenOptions::new().read(true).custom_flags(i32::try_from(flags).unwrap_or_default()).open(path)
        };
        let file = open().map_err(|error| Error::io(format!("opening {}", what()), error).hint(remedy(role)))?;
        let seen = checked(&what(), role, &file, blob)?;
        if self.is_good(&blob.digest, &seen) {
            return Ok(());
        }
        let _one_reader = hold(&self.reading);
        if self.is_good(&blob.digest, &seen) {
            return Ok(());
        }
        let found = hash(&file).map_err(|error| Error::io(format!("reading {}", what()), error))?;
        if found != blob.digest {
            let what = format!("{}: its content has the digest {found}, where {} is expected", what(), blob.digest);
            return Err(Error::new(Kind::Corrupt, what).hint(remedy(role)));
        }
        // Written to while it was read?
        if checked(&what(), role, &file, blob)? != seen {
            return Err(Error::new(Kind::Conflict, format!("{}: was changed while it was read", what())));
        }
        self.remember(&blob.digest, seen);
        Ok(())
    }

    /// Takes the caller's word for it, who has just read all of the file: the first VM need not read it again.
    pub fn vouch(&self, path: &Path, digest: &Digest) {
        if let Ok(meta) = std::fs::symlink_metadata(path) {
            self.remember(digest, Seen::of(&meta));
        }
    }

    fn is_good(&self, digest: &Digest, seen: &Seen) -> bool {
        hold(&self.good).get(digest) == Some(seen)
    }

    fn remember(&self, digest: &Digest, seen: Seen) {
        let files = {
            let mut good = hold(&self.good);
            good.insert(digest.clone(), seen);
            good.clone()
        };
        let saved = serde_json::to_vec(&Verdicts { version: VERSION, files })
            .map_err(|error| Error::new(Kind::Internal, "encoding verdicts").because(error))
            .and_then(|bytes| clawpot_host::fs::replace(&self.cache, &bytes, 0o600));
        if let Err(error) = saved {
            tracing::warn!(error = error.chain(), "verified files are not remembered over a restart");
        }
    }
}

/// Cheap checks first: of the open file, so that nobody can exchange it in between.
fn checked(what: &str, role: &str, file: &File, blob: &Blob) -> Result<Seen> {
    let meta = file.metadata().map_err(|error| Error::io(format!("looking at {what}"), error))?;
    if !meta.is_file() {
        return Err(Error::new(Kind::Corrupt, format!("{what}: not a regular file")).hint(remedy(role)));
    }
    if meta.len() != blob.size {
        let how = if meta.len() < blob.size { "truncated" } else { "too long" };
        let what = format!("{what}: {how}, {} bytes where {} are expected", meta.len(), blob.size);
        return Err(Error::new(Kind::Corrupt, what).hint(remedy(role)));
    }
    // VMs get hard links to it: a VMM that could open it for writing would change it for all.
    if meta.mode() & 0o222 != 0 || (meta.uid() != 0 && meta.uid() != rustix::process::geteuid().as_raw()) {
        let what = format!("{what}: mode {:04o}, owner {}: others could change it", meta.mode() & 0o7777, meta.uid());
        return Err(Error::new(Kind::FailedPrecondition, what).hint("chown root:root and chmod 0444 it"));
    }
    Ok(Seen::of(&meta))
}

fn remedy(role: &str) -> &'static str {
    match role {
        "kernel" | "initramfs" => "run scripts/install-vm-assets.sh: it replaces what is missing or broken",
        _ => "build the image again: scripts/setup-rootfs.sh NAME --upgrade",
    }
}

/// Of everything from where `file` stands.
pub(crate) fn hash(file: &File) -> std::io::Result<Digest> {
    let mut hasher = Sha256::new();
    hash_into(file, &mut hasher)?;
    Ok(Digest::from_sha256(&hasher.finalize().into()))
}

/// The same into a hash that has begun; gives the number of bytes.
pub(crate) fn hash_into(mut file: &File, hasher: &mut Sha256) -> std::io::Result<u64> {
    // 256 KiB: constant memory whatever the file's size.
    let mut buffer = vec![0; 256 << 10];
    let mut bytes = 0;
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok(bytes),
            Ok(read) => {
                hasher.update(&buffer[..read]);
                bytes += read as u64;
            }
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

fn load(cache: &Path) -> BTreeMap<Digest, Seen> {
    let read = match std::fs::read(cache) {
        Ok(bytes) => serde_json::from_slice::<Verdicts>(&bytes).map_err(|error| error.to_string()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return BTreeMap::new(),
        Err(error) => Err(error.to_string()),
    };
    match read {
        Ok(Verdicts { version: VERSION, files }) => files,
        Ok(Verdicts { version, .. }) => {
            tracing::info!(version, "verified files are read again: the list is of another version");
            BTreeMap::new()
        }
        Err(error) => {
            tracing::warn!(path = %cache.display(), error, "verified files are read again: the list cannot be read");
            BTreeMap::new()
        }
    }
}

/// What a lock protects here is whole between any two statements, so a panic elsewhere spoils nothing.
fn hold<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
