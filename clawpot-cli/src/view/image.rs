//! An image.

use std::collections::BTreeMap;
use std::time::SystemTime;

use clawpot_common::v1::{CollectImagesResponse, Image, ImageDetail, ImageGarbage, ImageRevision};
use clawpot_types::MiB;
use serde::Serialize;

use super::known;
use crate::output::{table, time};

/// An image as `-o json` shows it.
#[derive(Debug, Serialize)]
pub struct ImageView {
    pub name: String,
    pub digest: String,
    pub size_bytes: u64,
    /// "ext4", "erofs", "unreadable".
    pub format: String,
    /// Why it cannot be read.
    pub problem: Option<String>,
    pub created_at: Option<String>,
}

impl From<&Image> for ImageView {
    fn from(image: &Image) -> Self {
        Self {
            name: image.name.clone(),
            digest: image.digest.clone(),
            size_bytes: image.size_bytes,
            format: image.format.clone(),
            problem: known(&image.problem),
            created_at: image.created_at.as_ref().map(time::rfc3339),
        }
    }
}

/// `image ls`. Digests are cut to 12 digits, which `-o json` does not.
pub fn list(images: &[Image], now: SystemTime) -> String {
    let rows = images.iter().map(|image| {
        let digits = image.digest.strip_prefix("sha256:").unwrap_or(&image.digest);
        let if_read = |text: String| if image.problem.is_empty() { text } else { "-".to_owned() };
        [
            image.name.clone(),
            if_read(digits.chars().take(12).collect()),
            if_read(MiB::from_bytes(image.size_bytes).to_string()),
            image.format.clone(),
            time::age_of(image.created_at.as_ref(), now),
        ]
    });
    table::rows(["NAME", "DIGEST", "SIZE", "FORMAT", "AGE"], rows)
}

/// An image with all that is known of it, as `-o json` shows it.
#[derive(Debug, Serialize)]
pub struct ImageDetailView {
    #[serde(flatten)]
    pub image: ImageView,
    pub names: Vec<String>,
    pub env: BTreeMap<String, String>,
    pub entrypoint: Vec<String>,
    pub cmd: Vec<String>,
    pub cwd: Option<String>,
    pub user: Option<String>,
    pub machine: MachineView,
    /// Its own; null: the host's.
    pub kernel_digest: Option<String>,
    /// Null for what was made on this host.
    pub source: Option<SourceView>,
    /// Null for what was not built of a flake.
    pub revision: Option<RevisionView>,
}

/// How it was built.
#[derive(Debug, Serialize)]
pub struct RevisionView {
    pub flake: String,
    pub attr: String,
    pub lock_digest: Option<String>,
    pub source_digest: Option<String>,
    pub builder_digest: String,
    /// "none" or "default".
    pub network: String,
    pub kernel_release: Option<String>,
    pub out_path: String,
    pub started_at: Option<String>,
    pub finished_at: Option<String>,
    /// What `image log` takes too.
    pub build: Option<String>,
}

impl From<&ImageRevision> for RevisionView {
    fn from(revision: &ImageRevision) -> Self {
        Self {
            flake: revision.flake.clone(),
            attr: revision.attr.clone(),
            lock_digest: known(&revision.lock_digest),
            source_digest: known(&revision.source_digest),
            builder_digest: revision.builder_digest.clone(),
            network: revision.network.clone(),
            kernel_release: known(&revision.kernel_release),
            out_path: revision.out_path.clone(),
            started_at: revision.started_at.as_ref().map(time::rfc3339),
            finished_at: revision.finished_at.as_ref().map(time::rfc3339),
            build: known(&revision.build),
        }
    }
}

/// What a VM has that asks for nothing; null: the server's default.
#[derive(Debug, Serialize)]
pub struct MachineView {
    pub vcpus: Option<u32>,
    pub memory_mib: Option<u64>,
    pub disk_mib: Option<u64>,
}

#[derive(Debug, Serialize)]
pub struct SourceView {
    /// "registry" or "archive".
    pub kind: String,
    pub reference: Option<String>,
    pub digest: String,
    pub architecture: String,
    pub layers: Vec<LayerView>,
}

#[derive(Debug, Serialize)]
pub struct LayerView {
    pub digest: String,
    pub size_bytes: u64,
}

impl From<&ImageDetail> for ImageDetailView {
    fn from(detail: &ImageDetail) -> Self {
        let config = detail.config.clone().unwrap_or_default();
        let machine = detail.machine.unwrap_or_default();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Self {
            image: ImageView::from(&detail.image.clone().unwrap_or_default()),
            names: detail.names.clone(),
            env: config.env.iter().map(|var| (text(&var.name), text(&var.value))).collect(),
            entrypoint: config.entrypoint,
            cmd: config.cmd,
            cwd: known(&config.cwd),
            user: known(&config.user),
            machine: MachineView {
                vcpus: Some(machine.vcpus).filter(|count| *count > 0),
                memory_mib: Some(machine.memory_mib).filter(|size| *size > 0),
                disk_mib: Some(machine.disk_mib).filter(|size| *size > 0),
            },
            kernel_digest: known(&detail.kernel_digest),
            revision: detail.revision.as_ref().map(RevisionView::from),
            source: detail.source.as_ref().map(|source| SourceView {
                kind: source.kind.clone(),
                reference: known(&source.reference),
                digest: source.digest.clone(),
                architecture: source.architecture.clone(),
                layers: source
                    .layers
                    .iter()
                    .map(|layer| LayerView { digest: layer.digest.clone(), size_bytes: layer.size_bytes })
                    .collect(),
            }),
        }
    }
}

impl ImageDetailView {
    /// What it was asked by, or its digest.
    pub fn called(&self) -> &str {
        if self.image.name.is_empty() { &self.image.digest } else { &self.image.name }
    }
}

/// `image inspect`.
pub fn detail(view: &ImageDetailView) -> String {
    let words = |words: &[String]| if words.is_empty() { "-".to_owned() } else { words.join(" ") };
    let or = |text: &Option<String>, other: &str| text.clone().unwrap_or_else(|| other.to_owned());
    let number =
        |number: Option<u64>, unit: &str| number.map_or_else(|| "the server's".to_owned(), |n| format!("{n}{unit}"));
    let machine = &view.machine;
    let mut pairs = vec![
        ("Names", words(&view.names)),
        ("Digest", view.image.digest.clone()),
        ("Size", format!("{}, {}", MiB::from_bytes(view.image.size_bytes), view.image.format)),
        ("Created", or(&view.image.created_at, "-")),
        ("Entrypoint", words(&view.entrypoint)),
        ("Command", words(&view.cmd)),
        ("Directory", or(&view.cwd, "-")),
        ("User", or(&view.user, "root")),
        ("Kernel", or(&view.kernel_digest, "the host's")),
        ("vCPUs", number(machine.vcpus.map(u64::from), "")),
        ("Memory", number(machine.memory_mib, " MiB")),
        ("Disk", number(machine.disk_mib, " MiB")),
    ];
    if let Some(source) = &view.source {
        pairs.push(("From", format!("{} {}", source.kind, or(&source.reference, ""))));
        pairs.push(("", source.digest.clone()));
        pairs.push(("Layers", source.layers.len().to_string()));
    }
    if let Some(built) = &view.revision {
        let whole = built.attr.is_empty() || built.flake.contains('#');
        pairs.push(("Flake", if whole { built.flake.clone() } else { format!("{}#{}", built.flake, built.attr) }));
        pairs.push(("Lock", or(&built.lock_digest, "none")));
        pairs.push(("Source", or(&built.source_digest, "-")));
        pairs.push(("Builder", format!("{}, network {}", built.builder_digest, built.network)));
        pairs.push(("Built", format!("{} to {}", or(&built.started_at, "-"), or(&built.finished_at, "-"))));
        pairs.push(("Result", built.out_path.clone()));
        pairs.push((
            "Log",
            built.build.as_ref().map_or_else(|| "-".to_owned(), |build| format!("clawpot image log {build}")),
        ));
        pairs.push(("Release", or(&built.kernel_release, "-")));
    }
    let env = view.env.iter().map(|(name, value)| ("Env".to_owned(), format!("{name}={value}")));
    table::pairs(pairs.into_iter().map(|(key, value)| (key.to_owned(), value)).chain(env))
}

/// What a collection did, as `-o json` shows it.
#[derive(Debug, Serialize)]
pub struct CollectedView {
    pub dry_run: bool,
    pub freed_bytes: u64,
    pub kept_bytes: u64,
    pub removed: Vec<GarbageView>,
}

#[derive(Debug, Serialize)]
pub struct GarbageView {
    pub kind: String,
    pub name: String,
    pub size_bytes: u64,
}

impl CollectedView {
    pub fn new(answer: &CollectImagesResponse, dry_run: bool) -> Self {
        let garbage = |one: &ImageGarbage| GarbageView {
            kind: one.kind.clone(),
            name: one.name.clone(),
            size_bytes: one.size_bytes,
        };
        Self {
            dry_run,
            freed_bytes: answer.removed.iter().map(|one| one.size_bytes).sum(),
            kept_bytes: answer.kept_bytes,
            removed: answer.removed.iter().map(garbage).collect(),
        }
    }
}

/// `image gc`: what went, then the sum.
pub fn collected(view: &CollectedView) -> String {
    let rows = view.removed.iter().map(|one| {
        let name = if one.name.len() == 64 { one.name[..12].to_owned() } else { one.name.clone() };
        [one.kind.clone(), name, MiB::from_bytes(one.size_bytes).to_string()]
    });
    let freed = if view.dry_run { "would be freed" } else { "freed" };
    let (free, kept) = (MiB::from_bytes(view.freed_bytes), MiB::from_bytes(view.kept_bytes));
    format!("{}\n{free} {freed}, {kept} kept", table::rows(["KIND", "NAME", "SIZE"], rows))
}
