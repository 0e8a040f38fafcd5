//! Who uses what, told to every process that shares the store.
//!
//! - `refs/lock` is held while references or names change, and during a collection.
//! - `refs/<state>.json` names the images that the VMs of one state directory are made of. It is written before the first VM of
//!   an image is, so a collection in another process sees it. Costs nothing for the second VM of an image.
//! - `refs/lease-<n>` is locked by a running pull or import and names the OCI blobs that it goes by.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Seek, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use clawpot_host::fs;
use clawpot_types::{Digest, Error, Kind, Result};
use serde::{Deserialize, Serialize};

use crate::lock::{Lease, Lock};
use crate::store::{Store, digest_of, read_small};

const VERSION: u32 = 1;
/// Between a VM's image being resolved and its record being committed lie milliseconds; a stalled host may make it more.
const RECENT: Duration = Duration::from_secs(600);

/// What one state directory's VMs use.
#[derive(Debug, Serialize, Deserialize)]
struct Marks {
    version: u32,
    state_dir: PathBuf,
    images: BTreeSet<Digest>,
}

/// What a running pull or import goes by.
#[derive(Debug, Serialize, Deserialize)]
struct Leased {
    version: u32,
    blobs: BTreeSet<Digest>,
}

/// The marks of this process's state directory.
#[derive(Debug)]
pub struct Refs {
    store: Store,
    state_dir: PathBuf,
    path: PathBuf,
    /// What is in the file, and when each was last asked for.
    marked: Mutex<BTreeMap<Digest, Instant>>,
}

impl Refs {
    /// Reads what an earlier process of this state directory held, if anything. Blocks.
    pub fn open(store: &Store, state_dir: &Path) -> Result<Self> {
        let state_dir = std::path::absolute(state_dir)
            .map_err(|error| Error::io(format!("finding the state directory {}", state_dir.display()), error))?;
        let name = digest_of(state_dir.as_os_str().as_encoded_bytes());
        let path = store.dir.join("refs").join(format!("{}.json", &name.hex()[..16]));
        let held = match read_small(&path) {
            Ok(bytes) => read_marks(&path, &bytes)?.images,
            Err(error) if error.kind() == Kind::NotFound => BTreeSet::new(),
            Err(error) => return Err(error),
        };
        let now = Instant::now();
        let marked = Mutex::new(held.into_iter().map(|digest| (digest, now)).collect());
        Ok(Self { store: store.clone(), state_dir, path, marked })
    }

    /// Before a VM of this image is written down. `NotFound`: it has just been collected.
    pub fn mark(&self, digest: &Digest) -> Result<()> {
        if let Some(asked) = self.marked().get_mut(digest) {
            *asked = Instant::now();
            return Ok(());
        }
        self.store.prepare()?;
        let held = self.store.lock()?;
        let mut marked = self.marked();
        marked.insert(digest.clone(), Instant::now());
        let written = self.write(&marked, &held).and_then(|()| self.store.by_digest(digest).map(drop));
        if written.is_err() {
            marked.remove(digest);
        }
        written
    }

    /// From now on exactly `live`, and what was asked for a moment ago. `None`: nothing, and the file goes.
    pub fn hold(&self, live: Option<&BTreeSet<Digest>>) -> Result<()> {
        self.store.prepare()?;
        let held = self.store.lock()?;
        let mut marked = self.marked();
        let now = Instant::now();
        match live {
            None => marked.clear(),
            Some(live) => {
                marked.retain(|digest, asked| live.contains(digest) || now.duration_since(*asked) < RECENT);
                for digest in live {
                    marked.entry(digest.clone()).or_insert(now);
                }
            }
        }
        self.write(&marked, &held)
    }

    fn write(&self, marked: &BTreeMap<Digest, Instant>, _held: &Lock) -> Result<()> {
        if marked.is_empty() {
            return fs::remove_file_if_exists(&self.path);
        }
        let marks =
            Marks { version: VERSION, state_dir: self.state_dir.clone(), images: marked.keys().cloned().collect() };
        let bytes = serde_json::to_vec(&marks)
            .map_err(|error| Error::new(Kind::Internal, "encoding references").because(error))?;
        fs::replace(&self.path, &bytes, 0o644)
    }

    fn marked(&self) -> MutexGuard<'_, BTreeMap<Digest, Instant>> {
        // Whole between any two statements.
        self.marked.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn read_marks(path: &Path, bytes: &[u8]) -> Result<Marks> {
    let corrupt = |why: String| {
        Error::new(Kind::Corrupt, format!("reading {}: {why}", path.display()))
            .hint("it names the images that a server's VMs use; start that server, or remove the file if there is none any more")
    };
    let marks: Marks = serde_json::from_slice(bytes).map_err(|error| corrupt(error.to_string()))?;
    match marks.version {
        VERSION => Ok(marks),
        newer => Err(corrupt(format!("its version is {newer}, this program understands {VERSION}"))),
    }
}

/// The images that VMs of any state directory use. A state directory that is gone (it was on this file system) uses none, and
/// its file is removed. One that cannot be read is an error: who knows what it says.
pub(crate) fn all_marks(store: &Store, dry_run: bool, _held: &Lock) -> Result<BTreeSet<Digest>> {
    let mut images = BTreeSet::new();
    for path in files(store)? {
        if path.extension().is_none_or(|extension| extension != "json") {
            continue;
        }
        let marks = read_marks(&path, &read_small(&path)?)?;
        if marks.state_dir.try_exists().unwrap_or(true) {
            images.extend(marks.images);
        } else if !dry_run {
            fs::remove_file_if_exists(&path)?;
        }
    }
    Ok(images)
}

/// The OCI blobs that running pulls and imports go by; leases of the dead are removed.
pub(crate) fn all_leases(store: &Store, _held: &Lock) -> Result<BTreeSet<Digest>> {
    let mut blobs = BTreeSet::new();
    for path in files(store)? {
        if !path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"lease-")) {
            continue;
        }
        match Lock::try_exclusive(&path)? {
            Some(dead) => drop(Lease::new(path, dead)),
            None => {
                // It locked the file before it wrote to it, and writes under the store's lock.
                let bytes = read_small(&path)?;
                if !bytes.is_empty() {
                    let leased: Leased = serde_json::from_slice(&bytes).map_err(|error| {
                        Error::new(Kind::Corrupt, format!("reading {}", path.display())).because(error)
                    })?;
                    blobs.extend(leased.blobs);
                }
            }
        }
    }
    Ok(blobs)
}

fn files(store: &Store) -> Result<Vec<PathBuf>> {
    let dir = store.dir.join("refs");
    let what = || format!("listing {}", dir.display());
    let mut files = Vec::new();
    for entry in std::fs::read_dir(&dir).map_err(|error| Error::io(what(), error))? {
        let path = entry.map_err(|error| Error::io(what(), error))?.path();
        if !path.file_name().unwrap_or_default().as_encoded_bytes().starts_with(b".") {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

/// Held by a pull or an import as long as it runs: the blobs that it names are not collected.
#[derive(Debug)]
pub struct Hold {
    store: Store,
    lease: Lease,
    blobs: BTreeSet<Digest>,
}

impl Hold {
    pub fn new(store: &Store) -> Result<Self> {
        let _held = store.lock()?;
        for number in 0_u32.. {
            let path = store.dir.join("refs").join(format!("lease-{}-{number}", std::process::id()));
            // Ours that still lives, or one of another process namespace.
            if let Some(lock) = Lock::try_exclusive(&path)? {
                return Ok(Self { store: store.clone(), lease: Lease::new(path, lock), blobs: BTreeSet::new() });
            }
        }
        Err(Error::new(Kind::Exhausted, "leases of images: none is left"))
    }

    /// The work has failed: what came for it goes, unless somebody else uses it, where a repetition would fail as well.
    pub fn failed(self, error: &Error) -> Result<()> {
        let (store, blobs) = (self.store.clone(), self.blobs.clone());
        drop(self);
        match error.kind() {
            Kind::InvalidArgument | Kind::Corrupt | Kind::Exhausted | Kind::Unsupported => store.forget(&blobs),
            _ => Ok(()),
        }
    }

    /// Before it is looked whether they are there.
    pub fn add(&mut self, blobs: impl IntoIterator<Item = Digest>) -> Result<()> {
        let _held = self.store.lock()?;
        self.blobs.extend(blobs);
        let leased = Leased { version: VERSION, blobs: self.blobs.clone() };
        let bytes = serde_json::to_vec(&leased)
            .map_err(|error| Error::new(Kind::Internal, "encoding a lease").because(error))?;
        let mut file = self.lease.file();
        file.rewind()
            .and_then(|()| file.set_len(0))
            .and_then(|()| file.write_all(&bytes))
            .map_err(|error| Error::io("writing a lease", error))
    }
}
