//! From an archive: an OCI layout, what `docker save` writes, or an export of ours.

use std::fs::File;

use bytes::Bytes;
use clawpot_core::ports::{BoxStream, ImageDetail, Import};
use clawpot_failpoint::{self as failpoint, Point};
use clawpot_types::{Digest, Error, ImageRef, Kind, Result};
use futures_util::StreamExt as _;
use serde::Deserialize;
use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;

use super::Library;
use super::fetch::place;
use super::finish::Called;
use super::progress::Teller;
use super::room::LEAST;
use super::spool::{Chunks, Spool};
use crate::build::{Work, format_of};
use crate::manifest::{self, Blob, Manifest};
use crate::oci::{self, Descriptor, Document, Image};
use crate::refs::Hold;

/// One image of what `docker save` writes.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Saved {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

/// What was found in the archive.
enum Found {
    Image(Image, Option<String>),
    /// An export: the manifest of a store like ours.
    Own(Digest, Option<String>),
}

pub async fn import(
    library: Library,
    import: Import,
    archive: BoxStream<Result<Bytes>>,
    teller: Teller,
) -> Result<ImageDetail> {
    if let Some(name) = &import.name {
        crate::write::plain_name(name)?;
    }
    let limit = library
        .blocking(|this| {
            this.store.prepare()?;
            this.left(LEAST)
        })
        .await?;
    let spool = spooled(&library, archive, limit, &teller).await?;
    failpoint::reached(Point::ArchiveReceived);
    let select = import.select.clone();
    let (spool, found) = library
        .blocking(move |_| {
            let found = find(&spool, &select)?;
            Ok((spool, found))
        })
        .await?;
    match found {
        Found::Own(digest, name) => {
            let called = called(&import, name, "")?;
            library.blocking(move |this| own(this, &spool, &digest, &called)).await
        }
        Found::Image(image, name) => {
            let called = called(&import, name, &import.select)?;
            layered(&library, spool, image, called, &teller).await
        }
    }
}

async fn spooled(
    library: &Library,
    mut archive: BoxStream<Result<Bytes>>,
    limit: u64,
    teller: &Teller,
) -> Result<Spool> {
    let (send, receive) = mpsc::channel(16);
    let meter = teller.meter("archive", 0);
    let chunks = Chunks::new(receive, move |read| meter.at("reading", read));
    let reading = library.blocking(move |this| Spool::read(chunks, Work::make(&this.store.cache())?, limit));
    let feeding = AbortOnDropHandle::new(tokio::spawn(async move {
        // To the end of the stream, also when nobody reads any more: a client that is still sending is not cut off.
        while let Some(chunk) = archive.next().await {
            let failed = chunk.is_err();
            if send.send(chunk).await.is_err() && failed {
                break;
            }
        }
    }));
    let spool = reading.await;
    drop(feeding);
    spool
}

fn called(import: &Import, own: Option<String>, reference: &str) -> Result<Called> {
    let name = match (&import.name, own) {
        (Some(name), _) => name.clone(),
        (None, Some(own)) => own.parse::<ImageRef>().map_err(|error| error.hint("give it a name with --name"))?,
        (None, None) => {
            return Err(Error::new(Kind::InvalidArgument, "import: the archive does not say what the image is called")
                .hint("give it a name with --name"));
        }
    };
    Ok(Called { name, replace: import.replace, kind: "archive", reference: reference.to_owned() })
}

fn find(spool: &Spool, select: &str) -> Result<Found> {
    if let Some(index) = spool.get("index.json") {
        let index: Document = oci::parse("index.json", &spool.document(index)?)?;
        return layout(spool, &index.manifests.unwrap_or_default(), select);
    }
    let Some(saved) = spool.get("manifest.json") else {
        return Err(Error::new(
            Kind::InvalidArgument,
            "import: neither index.json nor manifest.json is in the archive",
        )
        .hint("it must be an OCI layout (directory or tar), what `docker save` writes, or an export"));
    };
    let saved: Vec<Saved> = oci::parse("manifest.json", &spool.document(saved)?)?;
    docker(spool, saved, select)
}

fn layout(spool: &Spool, manifests: &[Descriptor], select: &str) -> Result<Found> {
    let names = |one: &Descriptor| {
        let name = |key| one.annotations.get(key).cloned();
        [name(oci::NAME_ANNOTATION), name(oci::REF_ANNOTATION)]
    };
    let matching: Vec<&Descriptor> = manifests
        .iter()
        .filter(|one| select.is_empty() || names(one).iter().flatten().any(|name| name == select))
        .collect();
    let chosen = match matching.as_slice() {
        [] => return Err(nothing(select, manifests.iter().flat_map(names).flatten())),
        [only] => *only,
        // Several of one name are one image for several machines.
        several if several.iter().all(|one| one.platform.is_some()) => {
            let platforms: Vec<Descriptor> = several.iter().map(|one| (*one).clone()).collect();
            let digest = oci::select("the archive", &platforms)?.digest.clone();
            *several.iter().find(|one| one.digest == digest).unwrap_or(&several[0])
        }
        several => {
            return Err(nothing(select, several.iter().flat_map(|one| names(one)).flatten()));
        }
    };
    let name = names(chosen)[0].clone();
    let mut manifest = chosen.clone();
    let mut document: Document = oci::parse("the image's manifest", &spool.document(spool.blob(&manifest.blob())?)?)?;
    if let Some(inner) = &document.manifests {
        manifest = oci::select("the archive", inner)?.clone();
        document = oci::parse("the image's manifest", &spool.document(spool.blob(&manifest.blob())?)?)?;
    }
    let (Some(config), Some(layers)) = (document.config, document.layers) else {
        return Err(Error::new(Kind::InvalidArgument, "import: neither an image nor an index of images"));
    };
    if config.media_type == oci::OWN_CONFIG {
        return Ok(Found::Own(config.digest, name));
    }
    let bytes = spool.document(spool.blob(&config.blob())?)?;
    let layers = layers.iter().map(Descriptor::blob).collect();
    let image = oci::image("the archive", manifest.digest, config.blob(), layers, &bytes)?;
    Ok(Found::Image(image, name))
}

fn docker(spool: &Spool, saved: Vec<Saved>, select: &str) -> Result<Found> {
    let tags = |one: &Saved| one.repo_tags.clone().unwrap_or_default();
    let mut matching: Vec<Saved> = Vec::new();
    let all: Vec<String> = saved.iter().flat_map(tags).collect();
    matching.extend(saved.into_iter().filter(|one| select.is_empty() || tags(one).iter().any(|tag| tag == select)));
    if matching.len() != 1 {
        return Err(nothing(select, all.into_iter()));
    }
    let one = matching.remove(0);
    let missing = |name: &str| Error::new(Kind::InvalidArgument, format!("import: {name} is not in the archive"));
    let config = spool.get(&one.config).ok_or_else(|| missing(&one.config))?;
    let mut layers = Vec::new();
    for layer in &one.layers {
        layers.push(spool.get(layer).ok_or_else(|| missing(layer))?.blob.clone());
    }
    let bytes = spool.document(config)?;
    let image = oci::image("the archive", config.blob.digest.clone(), config.blob.clone(), layers, &bytes)?;
    Ok(Found::Image(image, tags(&one).first().cloned()))
}

fn nothing(select: &str, names: impl Iterator<Item = String>) -> Error {
    let names: Vec<_> = names.collect();
    let what = match select {
        "" => "import: the archive has none or several images".to_owned(),
        select => format!("import: the archive has none or several images called {select:?}"),
    };
    Error::new(Kind::InvalidArgument, what).hint(format!("choose one with --select: {}", names.join(", ")))
}

/// Its layers become the store's, then as with a pull.
async fn layered(
    library: &Library,
    spool: Spool,
    image: Image,
    called: Called,
    teller: &Teller,
) -> Result<ImageDetail> {
    if let Some(known) = library.known(&image.digest, &called).await? {
        return Ok(known);
    }
    let blobs: Vec<Blob> = image.layers.iter().cloned().chain([image.config_blob.clone()]).collect();
    let hold = library
        .blocking(move |this| {
            let mut hold = Hold::new(&this.store)?;
            hold.add(blobs.iter().map(|blob| blob.digest.clone()))?;
            for blob in &blobs {
                keep(this, &spool, blob)?;
            }
            failpoint::reached(Point::LayersKept);
            Ok(hold)
        })
        .await?;
    let files: Vec<_> = image
        .layers
        .iter()
        .map(|layer| library.fetched(layer).and_then(|file| file.ok_or_else(|| gone(layer))))
        .collect();
    let left = library.blocking(|this| this.left(LEAST)).await;
    let made = match left {
        Ok(left) => library.assemble(image, called, left, teller, futures_util::stream::iter(files)).await,
        Err(error) => Err(error),
    };
    library.settle(hold, made).await
}

fn gone(layer: &Blob) -> Error {
    Error::new(Kind::NotFound, format!("import: layer {} is gone again", layer.digest))
}

fn keep(library: &Library, spool: &Spool, blob: &Blob) -> Result<()> {
    // The archive's is good; what was there before may have rotted.
    library.remove_rotten(std::slice::from_ref(blob))?;
    if library.fetched(blob)?.is_some() {
        return Ok(());
    }
    let spooled = spool.blob(blob)?;
    let file = File::options().read(true).write(true).open(&spooled.path);
    let file = file.map_err(|error| Error::io(format!("opening {}", spooled.path.display()), error))?;
    // The same layer may stand in the archive twice.
    place(&file, &spooled.path, &library.store.oci_path(&blob.digest))
}

/// An export: its files are the store's as they are, and its digest stays.
fn own(library: &Library, spool: &Spool, digest: &Digest, called: &Called) -> Result<ImageDetail> {
    let missing = |what: &Digest| Error::new(Kind::InvalidArgument, format!("import: {what} is not in the archive"));
    let file = spool.get(&format!("blobs/sha256/{}", digest.hex())).ok_or_else(|| missing(digest))?;
    let bytes = spool.document(file)?;
    let manifest: Manifest =
        manifest::parse(&file.path, &bytes).map_err(|error| error.context("import: the image's manifest"))?;
    let rootfs = spool.blob(&manifest.rootfs.blob)?;
    let format = File::open(&rootfs.path)
        .map_err(|error| Error::io(format!("opening {}", rootfs.path.display()), error))
        .and_then(|mut file| format_of(&mut file))?;
    if format != manifest.rootfs.format {
        return Err(Error::new(
            Kind::InvalidArgument,
            "import: the file system is of another kind than its manifest says",
        ));
    }
    let blobs: Vec<&Blob> = [Some(&manifest.rootfs.blob), manifest.kernel.as_ref()].into_iter().flatten().collect();
    let open = |blob: &Blob| {
        let path = &spool.blob(blob)?.path;
        let file = File::options().read(true).write(true).open(path);
        file.map_err(|error| Error::io(format!("opening {}", path.display()), error)).map(|file| (path, file))
    };
    for blob in &blobs {
        let (path, file) = open(blob)?;
        // Gigabytes perhaps, for which nobody else should wait: before the store is locked.
        file.sync_all().map_err(|error| Error::io(format!("syncing {}", path.display()), error))?;
    }
    let held = library.store.lock()?;
    library.store.may_name(crate::write::plain_name(&called.name)?, digest, called.replace)?;
    for blob in blobs {
        let (path, file) = open(blob)?;
        place(&file, path, &library.store.blob_path(&blob.digest))?;
    }
    clawpot_host::fs::replace(&library.store.blob_path(digest), &bytes, 0o444)?;
    library.store.set_name(&called.name, digest, called.replace, &held)?;
    drop(held);
    library.store.describe(&called.name)
}
