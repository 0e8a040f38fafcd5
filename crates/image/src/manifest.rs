//! What the image store's files say. Anything not understood is an error with the file's name, never a default.

use std::path::Path;

use clawpot_types::{Digest, Error, Kind, Result, Timestamp};
use serde::Deserialize;
use serde::de::DeserializeOwned;

/// The newest version that is understood.
pub const VERSION: u32 = 1;

/// A file of the store: its content's digest, and its size in bytes.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Blob {
    pub digest: Digest,
    pub size: u64,
}

/// How the root file system is to be mounted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    Ext4,
    Erofs,
}

impl Format {
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Ext4 => "ext4",
            Self::Erofs => "erofs",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Rootfs {
    #[serde(flatten)]
    pub blob: Blob,
    pub format: Format,
}

/// `manifests/<name>.json`. Its own digest, the SHA-256 of its bytes, is the image's.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Manifest {
    pub rootfs: Rootfs,
    #[serde(rename = "created_at_us")]
    pub created_at: Timestamp,
}

/// `boot.json`: what every VM of this host boots, whatever its image.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Boot {
    pub kernel: Blob,
    pub initramfs: Blob,
}

/// Read before anything else of the file, as a newer version may have changed all the rest.
#[derive(Deserialize)]
struct Versioned {
    version: u32,
}

/// `Corrupt`: not what it should be; `Unsupported`: written by a newer version.
pub fn parse<T: DeserializeOwned>(path: &Path, bytes: &[u8]) -> Result<T> {
    let corrupt = |error: serde_json::Error| {
        Error::new(Kind::Corrupt, format!("reading {}", path.display())).because(error).hint(
            "make it anew with scripts/install-vm-assets.sh (boot.json) or scripts/setup-rootfs.sh NAME --upgrade",
        )
    };
    let Versioned { version } = serde_json::from_slice(bytes).map_err(corrupt)?;
    if version > VERSION || version == 0 {
        return Err(Error::new(
            Kind::Unsupported,
            format!("reading {}: its version is {version}, this program understands {VERSION}", path.display()),
        )
        .hint("use the clawpot version that wrote the image store, or a newer one"));
    }
    serde_json::from_slice(bytes).map_err(corrupt)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Manifest> {
        parse(Path::new("m.json"), text.as_bytes())
    }

    #[test]
    fn versions_and_nonsense_are_told_apart() {
        let digest = "a".repeat(64);
        let good = format!(
            r#"{{"version":1,"created_at_us":5,"config":{{}},"rootfs":{{"digest":"sha256:{digest}","size":7,"format":"ext4"}}}}"#
        );
        let manifest = read(&good).unwrap();
        assert_eq!((manifest.rootfs.blob.size, manifest.rootfs.format), (7, Format::Ext4));
        assert_eq!(read(r#"{"version":2,"layers":[]}"#).unwrap_err().kind(), Kind::Unsupported);
        for bad in ["", "null", "{}", r#"{"version":1}"#, &good.replace("ext4", "ntfs"), &good.replace("sha256:a", "a")]
        {
            let error = read(bad).unwrap_err();
            assert_eq!(error.kind(), Kind::Corrupt, "{bad}");
            assert!(error.what().contains("m.json"), "{}", error.what());
        }
    }
}
