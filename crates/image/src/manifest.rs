//! What the image store's files say. Anything not understood is an error with the file's name, never a default.

use std::path::Path;

use clawpot_core::ports::{ImageConfig, ImageSource, MachineDefaults, Revision};
use clawpot_types::{Digest, Error, Kind, MiB, Result, Timestamp, Vcpus};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// The newest version that is understood, and the one that is written here. The scripts write 1, which has no entrypoint, no
/// command, no kernel, no machine and no source.
pub const VERSION: u32 = 2;

/// A file of the store: its content's digest, and its size in bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Blob {
    pub digest: Digest,
    pub size: u64,
}

/// How the root file system is to be mounted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
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

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rootfs {
    #[serde(flatten)]
    pub blob: Blob,
    pub format: Format,
}

/// `manifests/<name>.json`. Its own digest, the SHA-256 of its bytes, is the image's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    pub version: u32,
    pub rootfs: Rootfs,
    #[serde(default)]
    pub config: Config,
    #[serde(rename = "created_at_us")]
    pub created_at: Timestamp,
    /// Its own; without one, the host's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<Blob>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub machine: Option<Machine>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<Source>,
    /// How it was built of a flake.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision: Option<Revision>,
}

/// Of commands. The first manifests may lack it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Config {
    /// `NAME=value`.
    #[serde(default)]
    pub env: Vec<String>,
    #[serde(default)]
    pub entrypoint: Vec<String>,
    #[serde(default)]
    pub cmd: Vec<String>,
    #[serde(default)]
    pub cwd: String,
    #[serde(default)]
    pub user: String,
}

impl From<&Config> for ImageConfig {
    fn from(config: &Config) -> Self {
        let pair = |text: &String| {
            let (name, value) = text.split_once('=').unwrap_or((text, ""));
            (name.to_owned(), value.to_owned())
        };
        Self {
            // A variable without a name cannot be set in any process.
            env: config.env.iter().map(pair).filter(|(name, _)| !name.is_empty()).collect(),
            entrypoint: config.entrypoint.clone(),
            cmd: config.cmd.clone(),
            cwd: config.cwd.clone(),
            user: config.user.clone(),
        }
    }
}

/// What a machine gets that asks for nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vcpus: Option<Vcpus>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_mib: Option<MiB>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_mib: Option<MiB>,
}

impl From<&Machine> for MachineDefaults {
    fn from(machine: &Machine) -> Self {
        Self { vcpus: machine.vcpus, memory: machine.memory_mib, disk: machine.disk_mib }
    }
}

/// Where an image came from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Source {
    /// "registry" or "archive".
    pub kind: String,
    pub reference: String,
    /// Of the OCI manifest.
    pub digest: Digest,
    pub architecture: String,
    pub config: Blob,
    /// Lowest first, as they are kept in `oci/sha256/`.
    pub layers: Vec<Blob>,
}

impl From<&Source> for ImageSource {
    fn from(source: &Source) -> Self {
        Self {
            kind: source.kind.clone(),
            reference: source.reference.clone(),
            digest: source.digest.clone(),
            architecture: source.architecture.clone(),
            layers: source.layers.iter().map(|layer| (layer.digest.clone(), layer.size)).collect(),
        }
    }
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

impl Manifest {
    /// As it is written down; its digest is the image's.
    pub fn encode(&self) -> Result<Vec<u8>> {
        let mut bytes = serde_json::to_vec_pretty(self)
            .map_err(|error| Error::new(Kind::Internal, "encoding an image's manifest").because(error))?;
        bytes.push(b'\n');
        Ok(bytes)
    }
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
        assert_eq!(read(r#"{"version":3,"layers":[]}"#).unwrap_err().kind(), Kind::Unsupported);
        for bad in ["", "null", "{}", r#"{"version":1}"#, &good.replace("ext4", "ntfs"), &good.replace("sha256:a", "a")]
        {
            let error = read(bad).unwrap_err();
            assert_eq!(error.kind(), Kind::Corrupt, "{bad}");
            assert!(error.what().contains("m.json"), "{}", error.what());
        }
    }
}
