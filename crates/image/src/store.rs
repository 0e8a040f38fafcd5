//! The image store: one directory, files named by content, names that point to manifests.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use clawpot_core::ports::{ImageDetail, ImageInfo, UnreadableImage};
use clawpot_types::{Digest, Error, ImageRef, Kind, Result};
use sha2::{Digest as _, Sha256};

use crate::manifest::{self, Boot, Manifest};

/// A manifest is some hundred bytes; what is far more is none.
const MANIFEST_LIMIT: u64 = 1 << 20;

/// Everything here blocks, reads small files only and writes nothing; [`crate::write`] writes.
#[derive(Clone, Debug)]
pub struct Store {
    pub(crate) dir: PathBuf,
}

impl Store {
    /// `dir` needs not exist yet: an empty store has no images.
    pub fn new(dir: &Path) -> Result<Self> {
        let dir = std::path::absolute(dir)
            .map_err(|error| Error::io(format!("finding the image directory {}", dir.display()), error))?;
        Ok(Self { dir })
    }

    #[must_use]
    pub fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.dir.join("blobs/sha256").join(digest.hex())
    }

    /// What `image` means now, with the manifest's digest.
    /// `NotFound` names the images there are; `Corrupt`, `Unsupported`: see [`manifest::parse`].
    pub fn resolve(&self, image: &ImageRef) -> Result<(Digest, Manifest)> {
        match image {
            ImageRef::Digest(digest) => Ok((digest.clone(), self.by_digest(digest)?)),
            ImageRef::Name(name) => {
                let path = self.name_path(name);
                let bytes = read_small(&path).map_err(|error| match error.kind() {
                    Kind::NotFound => self.unknown(image),
                    _ => error,
                })?;
                Ok((digest_of(&bytes), manifest::parse(&path, &bytes)?))
            }
        }
    }

    /// The manifest with this digest: kept under it, or still borne by a name.
    pub fn by_digest(&self, digest: &Digest) -> Result<Manifest> {
        let path = self.blob_path(digest);
        match read_small(&path) {
            Ok(bytes) if digest_of(&bytes) == *digest => return manifest::parse(&path, &bytes),
            Ok(bytes) => {
                let what = format!("reading {}: its content has the digest {}", path.display(), digest_of(&bytes));
                return Err(Error::new(Kind::Corrupt, what).hint("remove it and build the image again"));
            }
            Err(error) if error.kind() == Kind::NotFound => {}
            Err(error) => return Err(error),
        }
        for (_, path) in self.names()? {
            match read_small(&path) {
                Ok(bytes) if digest_of(&bytes) == *digest => return manifest::parse(&path, &bytes),
                // Another image, or one that is no concern of this request.
                Ok(_) | Err(_) => {}
            }
        }
        Err(self.unknown(&ImageRef::Digest(digest.clone())))
    }

    /// `FailedPrecondition`: none installed.
    pub fn boot(&self) -> Result<Boot> {
        let path = self.dir.join("boot.json");
        let bytes = read_small(&path).map_err(|error| match error.kind() {
            Kind::NotFound => Error::new(
                Kind::FailedPrecondition,
                format!("no kernel and initramfs are installed: there is no {}", path.display()),
            )
            .hint("run scripts/install-vm-assets.sh, or name the right directory with --image-dir"),
            _ => error,
        })?;
        manifest::parse(&path, &bytes)
    }

    /// Good and bad, each sorted by name.
    pub fn list(&self) -> Result<(Vec<ImageInfo>, Vec<UnreadableImage>)> {
        let (mut good, mut bad) = (Vec::new(), Vec::new());
        for (name, path) in self.names()? {
            let read = read_small(&path).and_then(|bytes| Ok((digest_of(&bytes), manifest::parse(&path, &bytes)?)));
            match read {
                Ok((digest, manifest)) => good.push(info(name, digest, &manifest)),
                Err(error) => bad.push(UnreadableImage { name, error }),
            }
        }
        Ok((good, bad))
    }

    pub(crate) fn manifests(&self) -> PathBuf {
        self.dir.join("manifests")
    }

    /// The file that says what `name` means: `/` is written `%2F` there.
    pub(crate) fn name_path(&self, name: &str) -> PathBuf {
        self.manifests().join(format!("{}.json", name.replace('/', "%2F")))
    }

    /// All that the manifest of `image` says, and which names mean it.
    pub fn describe(&self, image: &ImageRef) -> Result<ImageDetail> {
        let (digest, manifest) = self.resolve(image)?;
        let mut names = Vec::new();
        for (name, path) in self.names()? {
            // One that cannot be read means no image that anybody could be told about.
            if read_small(&path).is_ok_and(|bytes| digest_of(&bytes) == digest) {
                names.push(name);
            }
        }
        let asked = match image {
            ImageRef::Name(name) => name.clone(),
            ImageRef::Digest(_) => String::new(),
        };
        Ok(detail(asked, names, digest, &manifest))
    }

    /// Names and their files, sorted; half-written files begin with a dot.
    pub(crate) fn names(&self) -> Result<Vec<(String, PathBuf)>> {
        let dir = self.manifests();
        let what = || format!("listing images in {}", dir.display());
        let entries = match std::fs::read_dir(&dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(Error::io(what(), error)),
        };
        let mut names = Vec::new();
        for entry in entries {
            let path = entry.map_err(|error| Error::io(what(), error))?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            match name.strip_suffix(".json") {
                Some(stem) if !stem.starts_with('.') => names.push((stem.replace("%2F", "/"), path)),
                _ => {}
            }
        }
        names.sort();
        Ok(names)
    }

    fn unknown(&self, image: &ImageRef) -> Error {
        let error = Error::new(Kind::NotFound, format!("image {image}: not in {}", self.dir.display()));
        match self.names() {
            Ok(names) if names.is_empty() => error.hint(
                "there are no images yet: get one with `clawpot image pull` or scripts/setup-rootfs.sh, or name the right --image-dir",
            ),
            Ok(names) => {
                // What a list shows of a digest is only its beginning.
                if let Some((name, digest)) = begun(image, &names) {
                    return error.hint(format!("a digest is written whole: {digest}; this one is called {name}"));
                }
                let names: Vec<_> = names.into_iter().map(|(name, _)| name).collect();
                error.hint(format!("there is {}; `clawpot image pull` or scripts/setup-rootfs.sh gets another", names.join(", ")))
            }
            Err(failed) => error.and_cleanup(failed),
        }
    }
}

/// The image whose digest begins with what was asked for as a name.
fn begun(image: &ImageRef, names: &[(String, PathBuf)]) -> Option<(String, Digest)> {
    let ImageRef::Name(hex) = image else { return None };
    if hex.len() < 6 || !hex.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    let whole = format!("sha256:{hex}");
    let digests = names.iter().filter_map(|(name, path)| Some((name, digest_of(&read_small(path).ok()?))));
    digests
        .into_iter()
        .find(|(_, digest)| digest.to_string().starts_with(&whole))
        .map(|(name, digest)| (name.clone(), digest))
}

fn info(name: String, digest: Digest, manifest: &Manifest) -> ImageInfo {
    ImageInfo {
        name,
        digest,
        size_bytes: manifest.rootfs.blob.size,
        created_at: manifest.created_at,
        format: manifest.rootfs.format.as_str().to_owned(),
    }
}

fn detail(name: String, names: Vec<String>, digest: Digest, manifest: &Manifest) -> ImageDetail {
    ImageDetail {
        info: info(name, digest, manifest),
        names,
        config: (&manifest.config).into(),
        machine: manifest.machine.as_ref().map(Into::into).unwrap_or_default(),
        kernel: manifest.kernel.as_ref().map(|kernel| kernel.digest.clone()),
        source: manifest.source.as_ref().map(Into::into),
        revision: manifest.revision.clone(),
    }
}

/// `NotFound` when there is none; never more than [`MANIFEST_LIMIT`].
pub(crate) fn read_small(path: &Path) -> Result<Vec<u8>> {
    let what = || format!("reading {}", path.display());
    let file = File::open(path).map_err(|error| Error::io(what(), error))?;
    let mut bytes = Vec::new();
    file.take(MANIFEST_LIMIT + 1).read_to_end(&mut bytes).map_err(|error| Error::io(what(), error))?;
    if u64::try_from(bytes.len()).is_ok_and(|length| length > MANIFEST_LIMIT) {
        return Err(Error::new(Kind::Corrupt, format!("{}: over {MANIFEST_LIMIT} bytes, so no manifest", what())));
    }
    Ok(bytes)
}

pub(crate) fn digest_of(bytes: &[u8]) -> Digest {
    Digest::from_sha256(&Sha256::digest(bytes).into())
}
