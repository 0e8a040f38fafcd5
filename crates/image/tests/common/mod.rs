//! Archives made by hand, good ones and bad ones, and a store to import them into.

#![allow(clippy::unwrap_used, dead_code, reason = "helpers of tests fail the test; each test file uses some")]

use std::io::Write as _;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use clawpot_core::ports::{ImageDetail, ImageLibrary, ImageProgress, Import};
use clawpot_host::process::{Tool, find_program};
use clawpot_image::{Library, LocalImages, Room};
use clawpot_types::{Digest, ImageRef, Result};
use futures_util::StreamExt as _;
use sha2::{Digest as _, Sha256};
use tempfile::TempDir;

pub fn digest(bytes: &[u8]) -> Digest {
    Digest::from_sha256(&Sha256::digest(bytes).into())
}

pub fn named(name: &str) -> ImageRef {
    name.parse().unwrap()
}

/// A tar, entry by entry; whatever is asked for is written, also what no tool would write.
#[derive(Default)]
pub struct Tar(pub Vec<u8>);

#[derive(Clone, Debug)]
pub struct Entry<'a> {
    pub kind: tar::EntryType,
    pub path: &'a str,
    pub link: &'a str,
    pub data: &'a [u8],
    pub mode: u32,
    pub owner: (u64, u64),
    pub xattrs: &'a [(&'a str, &'a [u8])],
}

pub const FILE: Entry<'static> =
    Entry { kind: tar::EntryType::Regular, path: "", link: "", data: b"", mode: 0o644, owner: (0, 0), xattrs: &[] };

impl Tar {
    pub fn add(mut self, entry: &Entry<'_>) -> Self {
        if !entry.xattrs.is_empty() {
            let records = entry.xattrs.iter().map(|(name, value)| (format!("SCHILY.xattr.{name}"), *value));
            self = self.pax(tar::EntryType::XHeader, records);
        }
        self.raw(entry);
        self
    }

    /// A header of records, `kind` of the next entry or of all.
    pub fn pax<'a>(mut self, kind: tar::EntryType, records: impl IntoIterator<Item = (String, &'a [u8])>) -> Self {
        let mut bytes = Vec::new();
        for (key, value) in records {
            let rest = [b" ", key.as_bytes(), b"=", value, b"\n"].concat();
            // The length counts its own digits.
            let length = (rest.len() + 1..).find(|length| length.to_string().len() + rest.len() == *length).unwrap();
            bytes.extend([length.to_string().as_bytes(), &rest].concat());
        }
        self.raw(&Entry { kind, path: "pax", data: &bytes, ..FILE });
        self
    }

    fn raw(&mut self, entry: &Entry<'_>) {
        let mut header = tar::Header::new_gnu();
        // Past the checks of the crate, which refuses to write what it should not.
        let name = entry.path.as_bytes();
        header.as_old_mut().name[..name.len()].copy_from_slice(name);
        header.as_old_mut().linkname[..entry.link.len()].copy_from_slice(entry.link.as_bytes());
        header.set_entry_type(entry.kind);
        header.set_size(entry.data.len() as u64);
        header.set_mode(entry.mode);
        header.set_uid(entry.owner.0);
        header.set_gid(entry.owner.1);
        header.set_mtime(1_700_000_000);
        header.set_cksum();
        self.0.extend(header.as_bytes());
        self.0.extend(entry.data);
        self.0.extend(vec![0; entry.data.len().wrapping_neg() % 512]);
    }

    pub fn file(self, path: &str, data: &[u8]) -> Self {
        self.add(&Entry { path, data, ..FILE })
    }

    pub fn dir(self, path: &str) -> Self {
        self.add(&Entry { kind: tar::EntryType::Directory, path, mode: 0o755, ..FILE })
    }

    pub fn symlink(self, path: &str, link: &str) -> Self {
        self.add(&Entry { kind: tar::EntryType::Symlink, path, link, mode: 0o777, ..FILE })
    }

    pub fn hard_link(self, path: &str, link: &str) -> Self {
        self.add(&Entry { kind: tar::EntryType::Link, path, link, ..FILE })
    }

    pub fn end(mut self) -> Vec<u8> {
        self.0.extend([0; 1024]);
        self.0
    }
}

pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// An OCI layout of one image as a tar. `layers`: packed and unpacked bytes.
pub struct Layout {
    pub layers: Vec<(Vec<u8>, Vec<u8>)>,
    pub config: serde_json::Value,
    pub architecture: &'static str,
    /// What the manifest says instead of a layer's true digest.
    pub lie: Option<Digest>,
    /// What the configuration says instead of the first unpacked layer's.
    pub diff_lie: Option<Digest>,
}

impl Layout {
    pub fn new(layers: impl IntoIterator<Item = Vec<u8>>) -> Self {
        let layers = layers.into_iter().map(|layer| (gzip(&layer), layer)).collect();
        Self { layers, config: serde_json::json!({}), architecture: "amd64", lie: None, diff_lie: None }
    }

    pub fn tar(&self) -> Vec<u8> {
        let mut diff_ids: Vec<_> = self.layers.iter().map(|(_, unpacked)| digest(unpacked)).collect();
        if let (Some(lie), Some(first)) = (&self.diff_lie, diff_ids.first_mut()) {
            *first = lie.clone();
        }
        let config = serde_json::json!({
            "architecture": self.architecture, "os": "linux", "config": self.config,
            "rootfs": { "type": "layers", "diff_ids": diff_ids },
        });
        let config = serde_json::to_vec(&config).unwrap();
        let layers: Vec<_> = self
            .layers
            .iter()
            .map(|(packed, _)| {
                let digest = self.lie.clone().unwrap_or_else(|| digest(packed));
                serde_json::json!({ "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", "digest": digest, "size": packed.len() })
            })
            .collect();
        let manifest = serde_json::json!({
            "schemaVersion": 2,
            "config": { "mediaType": "application/vnd.oci.image.config.v1+json", "digest": digest(&config), "size": config.len() },
            "layers": layers,
        });
        let manifest = serde_json::to_vec(&manifest).unwrap();
        let index = serde_json::json!({ "schemaVersion": 2, "manifests": [{
            "mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": digest(&manifest), "size": manifest.len(),
        }]});
        let blob = |bytes: &[u8]| format!("blobs/sha256/{}", digest(bytes).hex());
        let mut tar = Tar::default()
            .file("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)
            .file("index.json", &serde_json::to_vec(&index).unwrap())
            .file(&blob(&manifest), &manifest)
            .file(&blob(&config), &config);
        for (packed, _) in &self.layers {
            tar = tar.file(&blob(packed), packed);
        }
        tar.end()
    }
}

/// A store and a state directory.
pub struct Host {
    pub dir: TempDir,
}

impl Host {
    pub fn new() -> Self {
        // On a real file system, where attributes and holes are kept.
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        std::fs::create_dir(dir.path().join("state")).unwrap();
        Self { dir }
    }

    pub fn images(&self) -> PathBuf {
        self.dir.path().join("images")
    }

    pub fn local(&self, state: &str) -> LocalImages {
        LocalImages::open(&self.images(), &self.dir.path().join(state)).unwrap()
    }

    pub fn library(&self) -> Library {
        self.library_with(Room { reserve: 0, ..Room::default() })
    }

    pub fn library_with(&self, room: Room) -> Library {
        self.local("state").library(Path::new(env!("CARGO_BIN_EXE_clawpot-unpack")), room)
    }

    /// Everything in the store but locks and empty directories, sorted.
    pub fn files(&self) -> Vec<String> {
        let mut files = Vec::new();
        let mut todo = vec![self.images()];
        while let Some(dir) = todo.pop() {
            for entry in std::fs::read_dir(dir).unwrap() {
                let path = entry.unwrap().path();
                match path.is_dir() {
                    true => todo.push(path),
                    false => files.push(path.strip_prefix(self.images()).unwrap().display().to_string()),
                }
            }
        }
        files.retain(|name| name != "refs/lock" && name != "cache/lock");
        files.sort();
        files
    }
}

pub async fn import(library: &Library, archive: Vec<u8>, name: &str) -> Result<ImageDetail> {
    import_as(library, archive, Import { name: Some(named(name)), replace: false, select: String::new() }).await
}

pub async fn import_as(library: &Library, archive: Vec<u8>, import: Import) -> Result<ImageDetail> {
    let chunks: Vec<_> = archive.chunks(100_000).map(|chunk| Ok(Bytes::copy_from_slice(chunk))).collect();
    let mut steps = library.import(import, Box::pin(futures_util::stream::iter(chunks)));
    while let Some(step) = steps.next().await {
        if let ImageProgress::Done(detail) = step? {
            return Ok(*detail);
        }
    }
    panic!("the stream ended without an image")
}

/// What debugfs says of the image's file system.
pub async fn debugfs(host: &Host, image: &ImageDetail, request: &str) -> String {
    let manifest = clawpot_image::store::Store::new(&host.images()).unwrap().by_digest(&image.info.digest).unwrap();
    let rootfs = host.images().join("blobs/sha256").join(manifest.rootfs.blob.digest.hex());
    let debugfs = find_program("debugfs", None).unwrap();
    let tool = Tool::new(debugfs).args(["-R", request]).args([&rootfs]);
    String::from_utf8_lossy(&tool.run().await.unwrap()).into_owned()
}
