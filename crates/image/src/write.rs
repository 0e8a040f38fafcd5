//! Changes to the store: blobs under their digest, names to manifests. Whatever others may come to rely on is put in place
//! under the store's lock, so that a collection sees all of it or nothing.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clawpot_host::fs;
use clawpot_types::{Digest, Error, ImageRef, Kind, Result};

use crate::lock::Lock;
use crate::manifest::{Blob, Manifest};
use crate::store::{Store, digest_of, read_small};

/// The lock is held for some renames, or for a collection of thousands of files.
const PATIENCE: Duration = Duration::from_secs(30);

impl Store {
    /// Makes the directories of the store that are missing.
    pub fn prepare(&self) -> Result<()> {
        std::fs::create_dir_all(&self.dir)
            .map_err(|error| Error::io(format!("making the image directory {}", self.dir.display()), error))?;
        for dir in
            ["blobs", "blobs/sha256", "manifests", "cache", "oci", "oci/sha256", "oci/partial", "oci/images", "refs"]
        {
            let path = self.dir.join(dir);
            match std::fs::create_dir(&path) {
                Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
                    return Err(Error::io(format!("making the directory {}", path.display()), error));
                }
                _ => {}
            }
        }
        Ok(())
    }

    #[must_use]
    pub fn cache(&self) -> PathBuf {
        self.dir.join("cache")
    }

    /// Layers, configurations and manifests as registries have them.
    #[must_use]
    pub fn oci_path(&self, digest: &Digest) -> PathBuf {
        self.dir.join("oci/sha256").join(digest.hex())
    }

    #[must_use]
    pub fn partial_path(&self, digest: &Digest) -> PathBuf {
        self.dir.join("oci/partial").join(digest.hex())
    }

    /// For changes of names and references. Blocks.
    pub(crate) fn lock(&self) -> Result<Lock> {
        Lock::exclusive_within(&self.dir.join("refs/lock"), PATIENCE, "another change of the image store")
    }

    /// Moves `from`, synced and verified, in under its digest, for good: root's, mode 0444.
    pub(crate) fn adopt(&self, from: &Path, digest: &Digest, _held: &Lock) -> Result<()> {
        let to = self.blob_path(digest);
        std::fs::rename(from, &to)
            .map_err(|error| Error::io(format!("moving {} to {}", from.display(), to.display()), error))?;
        to.parent().map_or(Ok(()), fs::sync_dir)
    }

    /// Writes the manifest down under its digest, which it gives.
    pub(crate) fn put_manifest(&self, manifest: &Manifest, _held: &Lock) -> Result<Digest> {
        let bytes = manifest.encode()?;
        let digest = digest_of(&bytes);
        fs::replace(&self.blob_path(&digest), &bytes, 0o444)?;
        Ok(digest)
    }

    /// Lets `name` mean the image `digest`, whose manifest is in the store.
    pub(crate) fn set_name(&self, name: &ImageRef, digest: &Digest, replace: bool, _held: &Lock) -> Result<()> {
        let name = plain_name(name)?;
        self.may_name(name, digest, replace)?;
        let bytes = self.manifest_bytes(digest)?;
        fs::replace(&self.name_path(name), &bytes, 0o444)
    }

    /// `AlreadyExists` where the name means another image and must not change.
    pub(crate) fn may_name(&self, name: &str, digest: &Digest, replace: bool) -> Result<()> {
        let path = self.name_path(name);
        match read_small(&path) {
            Ok(bytes) if digest_of(&bytes) == *digest || replace => Ok(()),
            Ok(bytes) => {
                let what = format!("image name {name}: it means {} already", digest_of(&bytes));
                Err(Error::new(Kind::AlreadyExists, what)
                    .hint("choose another name, or give --replace to let it mean the new image"))
            }
            Err(error) if error.kind() == Kind::NotFound => Ok(()),
            Err(error) => Err(error),
        }
    }

    pub fn tag(&self, image: &ImageRef, name: &ImageRef, replace: bool) -> Result<Digest> {
        self.prepare()?;
        let held = self.lock()?;
        let (digest, _) = self.resolve(image)?;
        self.set_name(name, &digest, replace, &held)?;
        Ok(digest)
    }

    pub fn untag(&self, name: &ImageRef) -> Result<Digest> {
        self.prepare()?;
        let _held = self.lock()?;
        let plain = plain_name(name)?;
        let path = self.name_path(plain);
        let digest = match read_small(&path) {
            Ok(bytes) => digest_of(&bytes),
            // Names the images there are.
            Err(error) if error.kind() == Kind::NotFound => return Err(self.resolve(name).err().unwrap_or(error)),
            Err(error) => return Err(error),
        };
        // A VM that is pinned to it finds the manifest under its digest.
        if !self.blob_path(&digest).exists() {
            let bytes = read_small(&path)?;
            fs::replace(&self.blob_path(&digest), &bytes, 0o444)?;
        }
        fs::remove_file_if_exists(&path)?;
        path.parent().map_or(Ok(()), fs::sync_dir)?;
        Ok(digest)
    }

    /// The image's bytes of manifest: under its digest, or still borne by a name.
    pub(crate) fn manifest_bytes(&self, digest: &Digest) -> Result<Vec<u8>> {
        if let Ok(bytes) = read_small(&self.blob_path(digest))
            && digest_of(&bytes) == *digest
        {
            return Ok(bytes);
        }
        for (_, path) in self.names()? {
            if let Ok(bytes) = read_small(&path)
                && digest_of(&bytes) == *digest
            {
                return Ok(bytes);
            }
        }
        Err(Error::new(Kind::NotFound, format!("image {digest}: its manifest is not there")))
    }

    /// Which image was made of the OCI manifest `source`, if it is still whole.
    pub(crate) fn made_of(&self, source: &Digest) -> Result<Option<(Digest, Manifest)>> {
        let bytes = match read_small(&self.made_of_path(source)) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == Kind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let Ok(digest) = String::from_utf8_lossy(&bytes).trim().parse::<Digest>() else { return Ok(None) };
        match self.by_digest(&digest) {
            Ok(manifest)
                if [Some(&manifest.rootfs.blob), manifest.kernel.as_ref()]
                    .into_iter()
                    .flatten()
                    .all(|blob| self.is_there(blob)) =>
            {
                Ok(Some((digest, manifest)))
            }
            Ok(_) => Ok(None),
            Err(error) if error.kind() == Kind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    pub(crate) fn made_of_path(&self, source: &Digest) -> PathBuf {
        self.dir.join("oci/images").join(source.hex())
    }

    fn is_there(&self, blob: &Blob) -> bool {
        std::fs::symlink_metadata(self.blob_path(&blob.digest))
            .is_ok_and(|meta| meta.is_file() && meta.len() == blob.size)
    }
}

/// A digest is no name to give.
pub(crate) fn plain_name(name: &ImageRef) -> Result<&str> {
    match name {
        ImageRef::Name(name) => Ok(name),
        ImageRef::Digest(digest) => {
            Err(Error::new(Kind::InvalidArgument, format!("image name {digest}: a digest is no name")))
        }
    }
}
