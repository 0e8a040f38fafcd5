//! Mark and sweep. What cannot be read stops it: unreadable is not absent.

use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use clawpot_core::ports::{Collected, Garbage};
use clawpot_host::fs;
use clawpot_types::{Digest, Error, Kind, Result};

use crate::lock::Lock;
use crate::manifest::{self, Manifest};
use crate::refs::{all_leases, all_marks};
use crate::store::{Store, digest_of, read_small};

/// A download that was broken off is gone on with within this time, or not at all.
const PARTIAL: Duration = Duration::from_secs(24 * 3600);
/// Files with temporary names of processes that died.
const HALF_MADE: Duration = Duration::from_secs(3600);
/// How long a script that builds an image is waited for.
const SCRIPTS: Duration = Duration::from_secs(5);

/// What must stay.
#[derive(Debug, Default)]
struct Keep {
    blobs: BTreeSet<Digest>,
    oci: BTreeSet<Digest>,
    images: BTreeSet<Digest>,
}

impl Store {
    /// Removes what nothing uses; see `ImageLibrary::gc`. Blocks.
    pub fn collect(&self, dry_run: bool, all: bool) -> Result<Collected> {
        self.prepare()?;
        // Scripts put blobs in before they put the name in.
        let _scripts =
            Lock::public_within(&self.cache().join("lock"), SCRIPTS, "a script that changes the image store")?;
        let held = self.lock()?;
        let keep = self.keep(dry_run, all, &held)?;
        let mut sweep = Sweep { dry_run, collected: Collected::default() };
        sweep.blobs(&self.dir.join("blobs/sha256"), &keep.blobs, "image file")?;
        sweep.blobs(&self.dir.join("oci/sha256"), &keep.oci, "layer")?;
        self.sweep_links(&keep, &mut sweep)?;
        sweep.downloads(&self.dir.join("oci/partial"), if all { Duration::ZERO } else { PARTIAL })?;
        if !dry_run {
            crate::build::sweep(&self.cache())?;
        }
        Ok(sweep.collected)
    }

    /// Removes those of `blobs` that nothing uses: what came for an image that is none. Blocks.
    pub(crate) fn forget(&self, blobs: &BTreeSet<Digest>) -> Result<()> {
        let held = self.lock()?;
        let keep = self.keep(true, false, &held)?;
        for blob in blobs.iter().filter(|blob| !keep.oci.contains(blob)) {
            fs::remove_file_if_exists(&self.oci_path(blob))?;
        }
        Ok(())
    }

    /// What the store takes, bytes on disk.
    pub fn usage(&self) -> Result<u64> {
        let mut bytes = 0;
        for dir in ["blobs/sha256", "oci/sha256", "oci/partial"] {
            for (_, meta) in files(&self.dir.join(dir))? {
                bytes += meta.blocks() * 512;
            }
        }
        // What helpers are unpacking, and what scripts keep there.
        Ok(bytes + below(&self.cache())?)
    }

    fn keep(&self, dry_run: bool, all: bool, held: &Lock) -> Result<Keep> {
        let mut keep =
            Keep { oci: all_leases(self, held)?, images: all_marks(self, dry_run, held)?, ..Keep::default() };
        for (name, path) in self.names()? {
            let bytes = read_small(&path)?;
            let manifest: Manifest = manifest::parse(&path, &bytes).map_err(|error| {
                error.context(format!("collecting garbage: image {name} cannot be read, so nobody knows what it needs"))
            })?;
            keep.images.insert(digest_of(&bytes));
            keep.image(&manifest, all);
        }
        for digest in keep.images.clone() {
            match self.by_digest(&digest) {
                Ok(manifest) => keep.image(&manifest, all),
                // A VM's image that is gone: the VM is told so when it starts.
                Err(error) if error.kind() == Kind::NotFound => {}
                Err(error) => return Err(error.context("collecting garbage: a VM's image cannot be read")),
            }
        }
        keep.blobs.extend(keep.images.iter().cloned());
        match self.boot() {
            Ok(boot) => keep.blobs.extend([boot.kernel.digest, boot.initramfs.digest]),
            Err(error) if error.kind() == Kind::FailedPrecondition => {}
            Err(error) => return Err(error),
        }
        Ok(keep)
    }

    fn sweep_links(&self, keep: &Keep, sweep: &mut Sweep) -> Result<()> {
        for (path, meta) in files(&self.dir.join("oci/images"))? {
            let digest =
                read_small(&path).ok().and_then(|bytes| String::from_utf8_lossy(&bytes).trim().parse::<Digest>().ok());
            if digest.is_none_or(|digest| !keep.images.contains(&digest)) {
                sweep.remove(&path, meta.blocks() * 512, "link")?;
            }
        }
        Ok(())
    }
}

impl Keep {
    fn image(&mut self, manifest: &Manifest, all: bool) {
        self.blobs.insert(manifest.rootfs.blob.digest.clone());
        self.blobs.extend(manifest.kernel.iter().map(|kernel| kernel.digest.clone()));
        if let Some(source) = manifest.source.as_ref().filter(|_| !all) {
            self.oci.extend([source.digest.clone(), source.config.digest.clone()]);
            self.oci.extend(source.layers.iter().map(|layer| layer.digest.clone()));
        }
    }
}

struct Sweep {
    dry_run: bool,
    collected: Collected,
}

impl Sweep {
    fn blobs(&mut self, dir: &Path, keep: &BTreeSet<Digest>, kind: &str) -> Result<()> {
        for (path, meta) in files(dir)? {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let bytes = meta.blocks() * 512;
            match format!("sha256:{name}").parse::<Digest>() {
                Ok(digest) if keep.contains(&digest) => self.collected.kept_bytes += bytes,
                Ok(_) => self.remove(&path, bytes, kind)?,
                Err(_) if name.ends_with(".tmp") && is_older(&meta, HALF_MADE) => {
                    self.remove(&path, bytes, "half-made file")?
                }
                // Nobody knows what it is, so nobody knows that it is not needed.
                Err(_) => {}
            }
        }
        Ok(())
    }

    fn downloads(&mut self, dir: &Path, age: Duration) -> Result<()> {
        for (path, meta) in files(dir)? {
            // One that is under way is locked.
            if is_older(&meta, age)
                && let Some(_held) = Lock::try_exclusive(&path)?
            {
                self.remove(&path, meta.blocks() * 512, "download")?;
            }
        }
        Ok(())
    }

    fn remove(&mut self, path: &Path, bytes: u64, kind: &str) -> Result<()> {
        if !self.dry_run {
            fs::remove_file_if_exists(path)?;
        }
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        self.collected.removed.push(Garbage { kind: kind.to_owned(), name, bytes });
        Ok(())
    }
}

fn is_older(meta: &std::fs::Metadata, age: Duration) -> bool {
    let modified = meta.modified().unwrap_or_else(|_| SystemTime::now());
    SystemTime::now().duration_since(modified).is_ok_and(|passed| passed >= age)
}

/// Bytes on disk of all files below `dir`, which others may be changing.
fn below(dir: &Path) -> Result<u64> {
    let (mut bytes, mut todo) = (0, vec![dir.to_owned()]);
    while let Some(dir) = todo.pop() {
        let failed = |error| Error::io(format!("measuring {}", dir.display()), error);
        let entries = match std::fs::read_dir(&dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            Err(error) => return Err(failed(error)),
        };
        for entry in entries {
            let entry = entry.map_err(failed)?;
            match entry.metadata() {
                Ok(meta) if meta.is_dir() => todo.push(entry.path()),
                Ok(meta) => bytes += meta.blocks() * 512 / meta.nlink().max(1),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) => return Err(failed(error)),
            }
        }
    }
    Ok(bytes)
}

fn files(dir: &Path) -> Result<Vec<(PathBuf, std::fs::Metadata)>> {
    let what = || format!("listing {}", dir.display());
    let mut files = Vec::new();
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(files),
        Err(error) => return Err(Error::io(what(), error)),
    };
    for entry in entries {
        let entry = entry.map_err(|error| Error::io(what(), error))?;
        match entry.metadata() {
            Ok(meta) if meta.is_file() => files.push((entry.path(), meta)),
            Ok(_) => {}
            // Renamed meanwhile.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(Error::io(what(), error)),
        }
    }
    files.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(files)
}
