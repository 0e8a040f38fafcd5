//! What OCI and Docker write about images, as far as it matters here. Fields that are not named are not read.

use clawpot_types::{Digest, Error, Kind, Result, Timestamp};
use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::manifest::{Blob, Config};

/// Largest manifest, index or configuration, bytes: registries refuse larger ones (4 MiB in `distribution`).
pub const DOCUMENT_LIMIT: u64 = 4 << 20;
/// Layers of one image: Docker's own limit is 127.
const LAYERS: usize = 512;

pub const MANIFESTS: [&str; 4] = [
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
];

/// Our own kind of image in an OCI layout: its configuration is a manifest of the store, its layers are the store's files.
pub const OWN_CONFIG: &str = "application/vnd.clawpot.image.v1+json";
pub const OWN_ROOTFS: &str = "application/vnd.clawpot.rootfs.v1";
pub const OWN_KERNEL: &str = "application/vnd.clawpot.kernel.v1";

pub const NAME_ANNOTATION: &str = "io.containerd.image.name";
pub const REF_ANNOTATION: &str = "org.opencontainers.image.ref.name";

/// This host's, in Go's words.
pub const ARCHITECTURE: &str = "amd64";

#[derive(Clone, Debug, Deserialize)]
pub struct Descriptor {
    #[serde(rename = "mediaType", default)]
    pub media_type: String,
    pub digest: Digest,
    pub size: u64,
    #[serde(default)]
    pub platform: Option<Platform>,
    #[serde(default)]
    pub annotations: std::collections::BTreeMap<String, String>,
}

impl Descriptor {
    #[must_use]
    pub fn blob(&self) -> Blob {
        Blob { digest: self.digest.clone(), size: self.size }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Platform {
    #[serde(default)]
    pub architecture: String,
    #[serde(default)]
    pub os: String,
}

impl Platform {
    fn is_ours(&self) -> bool {
        self.os == "linux" && self.architecture == ARCHITECTURE
    }
}

impl std::fmt::Display for Platform {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)
    }
}

/// A manifest or an index: one of the two is there.
#[derive(Clone, Debug, Deserialize)]
pub struct Document {
    #[serde(default)]
    pub manifests: Option<Vec<Descriptor>>,
    #[serde(default)]
    pub config: Option<Descriptor>,
    #[serde(default)]
    pub layers: Option<Vec<Descriptor>>,
}

#[derive(Clone, Debug, Deserialize)]
struct ConfigFile {
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    os: String,
    #[serde(default)]
    config: Option<Process>,
    rootfs: RootFs,
}

#[derive(Clone, Debug, Deserialize)]
struct RootFs {
    #[serde(default)]
    diff_ids: Vec<Digest>,
}

/// Docker writes `null` where nothing is said.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Process {
    #[serde(default)]
    env: Option<Vec<String>>,
    #[serde(default)]
    entrypoint: Option<Vec<String>>,
    #[serde(default)]
    cmd: Option<Vec<String>>,
    #[serde(default)]
    working_dir: Option<String>,
    #[serde(default)]
    user: Option<String>,
}

/// Everything about an image but its layers' content.
#[derive(Clone, Debug)]
pub struct Image {
    /// Of the OCI manifest; of the configuration, where the archive has no manifest.
    pub digest: Digest,
    pub config_blob: Blob,
    pub config: Config,
    /// Lowest first.
    pub layers: Vec<Blob>,
    pub diff_ids: Vec<Digest>,
}

pub fn parse<T: DeserializeOwned>(what: &str, bytes: &[u8]) -> Result<T> {
    serde_json::from_slice(bytes)
        .map_err(|error| Error::new(Kind::InvalidArgument, format!("{what}: cannot be read")).because(error))
}

/// Of an index, the manifest for this host.
pub fn select<'a>(what: &str, manifests: &'a [Descriptor]) -> Result<&'a Descriptor> {
    if let Some(ours) = manifests.iter().find(|one| one.platform.as_ref().is_some_and(Platform::is_ours)) {
        return Ok(ours);
    }
    let there: Vec<_> = manifests.iter().filter_map(|one| one.platform.as_ref()).map(ToString::to_string).collect();
    match manifests {
        // An index of one that says nothing: its configuration will tell.
        [only] if only.platform.is_none() => Ok(only),
        _ => Err(other_architecture(what, &there.join(", "))),
    }
}

fn other_architecture(what: &str, there: &str) -> Error {
    let there = if there.is_empty() { "none that says for which machine it is" } else { there };
    Error::new(Kind::Unsupported, format!("{what}: no image for linux/{ARCHITECTURE}; there is {there}"))
        .hint("a microVM runs what its host's processor runs")
}

/// Brings manifest and configuration together. `config`: bytes of the configuration.
pub fn image(what: &str, digest: Digest, config_blob: Blob, layers: Vec<Blob>, config: &[u8]) -> Result<Image> {
    let file: ConfigFile = parse(&format!("{what}: its configuration"), config)?;
    let platform = Platform { architecture: file.architecture, os: file.os };
    if !platform.is_ours() {
        return Err(other_architecture(what, &platform.to_string()));
    }
    let diff_ids = file.rootfs.diff_ids;
    if layers.is_empty() || layers.len() > LAYERS || diff_ids.len() != layers.len() {
        let why = format!(
            "{} layers, and digests of {}: at least 1, at most {LAYERS}, as many of both",
            layers.len(),
            diff_ids.len()
        );
        return Err(Error::new(Kind::InvalidArgument, format!("{what}: {why}")));
    }
    let process = file.config.unwrap_or_default();
    let config = Config {
        env: process.env.unwrap_or_default(),
        entrypoint: process.entrypoint.unwrap_or_default(),
        cmd: process.cmd.unwrap_or_default(),
        // Docker's default.
        cwd: process.working_dir.filter(|dir| !dir.is_empty()).unwrap_or_else(|| "/".to_owned()),
        user: process.user.unwrap_or_default(),
    };
    check(what, &config)?;
    Ok(Image { digest, config_blob, config, layers, diff_ids })
}

/// What goes into every VM's record and every command's environment stays small.
fn check(what: &str, config: &Config) -> Result<()> {
    let words = config.env.iter().chain(&config.entrypoint).chain(&config.cmd).chain([&config.cwd, &config.user]);
    let bytes: usize = words.clone().map(String::len).sum();
    let refuse = |why: &str| Err(Error::new(Kind::InvalidArgument, format!("{what}: its configuration {why}")));
    if bytes > 64 << 10 || config.env.len() > 256 {
        return refuse("has over 64 KiB of words, or over 256 variables");
    }
    if words.into_iter().any(|word| word.contains('\0')) {
        return refuse("has a NUL byte in a word");
    }
    Ok(())
}

/// An identity for the file system: the same layers give the same.
#[must_use]
pub fn uuid(image: &Image) -> String {
    use sha2::Digest as _;
    let mut hasher = sha2::Sha256::new();
    for diff_id in &image.diff_ids {
        hasher.update(diff_id.as_str());
    }
    let bytes: [u8; 32] = hasher.finalize().into();
    let hex = Digest::from_sha256(&bytes);
    let hex = hex.hex();
    // Version 8: of our own making.
    format!("{}-{}-8{}-8{}-{}", &hex[..8], &hex[8..12], &hex[13..16], &hex[17..20], &hex[20..32])
}

#[must_use]
pub fn now() -> Timestamp {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    Timestamp(u64::try_from(since.as_micros()).unwrap_or(u64::MAX))
}
