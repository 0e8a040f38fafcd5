//! From layers that are in the store to an image that bears a name.

use std::fs::File;

use clawpot_core::ports::ImageDetail;
use clawpot_failpoint::{self as failpoint, Point};
use clawpot_types::{Digest, Error, ImageRef, Kind, Result};
use tokio::sync::mpsc;

use super::Library;
use super::progress::{Meter, Teller};
use crate::build::{Feed, Made, Recipe, Told};
use crate::manifest::{Blob, Format, Manifest, Rootfs, Source, VERSION};
use crate::oci::{self, Image};
use crate::refs::Hold;
use crate::unpack;

/// What the new image is to be called.
#[derive(Clone, Debug)]
pub struct Called {
    pub name: ImageRef,
    pub replace: bool,
    /// "registry" or "archive", and what was asked of it.
    pub kind: &'static str,
    pub reference: String,
}

/// Everything that is bytes on disk costs twice for a while: the tree, and the file system made of it.
const TREE_AND_IMAGE: u64 = 2;

impl Library {
    /// The image that was made of the same manifest before, under the new name; `None`: there is none.
    pub(super) async fn known(&self, digest: &Digest, called: &Called) -> Result<Option<ImageDetail>> {
        let (digest, called) = (digest.clone(), called.clone());
        self.blocking(move |this| {
            let held = this.store.lock()?;
            let Some((image, _)) = this.store.made_of(&digest)? else {
                return this.early_clash(&called).map(|()| None);
            };
            this.store.set_name(&called.name, &image, called.replace, &held)?;
            drop(held);
            this.store.describe(&called.name).map(Some)
        })
        .await
    }

    /// Whatever is coming, it is not what the name means now: said before anything is downloaded.
    fn early_clash(&self, called: &Called) -> Result<()> {
        if called.replace {
            return Ok(());
        }
        match self.store.resolve(&called.name) {
            Ok((digest, _)) => {
                let what = format!("image name {}: it means {digest} already", called.name);
                Err(Error::new(Kind::AlreadyExists, what)
                    .hint("choose another name, or give --replace to let it mean the new image"))
            }
            Err(error) if error.kind() == Kind::NotFound => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Unpacks the layers that `files` gives, lowest first, and brings the result in. `room`: bytes for tree and file system.
    pub(super) async fn assemble<S>(
        &self,
        image: Image,
        called: Called,
        room: u64,
        teller: &Teller,
        files: S,
    ) -> Result<ImageDetail>
    where
        S: futures_util::Stream<Item = Result<File>> + Send,
    {
        let recipe = Recipe {
            plain: false,
            limits: unpack::within(room / TREE_AND_IMAGE, self.room.entries),
            uuid: oci::uuid(&image),
            time: 0,
        };
        let (feed, fed) = mpsc::channel(1);
        let meters: Vec<Meter> =
            image.layers.iter().map(|layer| teller.meter(layer.digest.as_str(), layer.size)).collect();
        let made = self.builder.build(recipe, fed, tell(meters, teller.clone()));
        let feeding = feed_all(feed, &image, files);
        // Whichever fails first; the other is dropped with all that it does.
        let (made, ()) = tokio::try_join!(made, feeding)?;
        self.blocking(move |this| this.bring_in(made, &image, &called)).await
    }

    /// Lets go of what was held for it, and gives the result; a failed clean-up stands beside its cause.
    pub(super) async fn settle(&self, hold: Hold, made: Result<ImageDetail>) -> Result<ImageDetail> {
        match made {
            Ok(detail) => {
                drop(hold);
                Ok(detail)
            }
            Err(error) => {
                let cleaned = |error: Error| match hold.failed(&error) {
                    Ok(()) => error,
                    Err(failed) => error.and_cleanup(failed),
                };
                Err(self.blocking(move |_| Ok(cleaned(error))).await?)
            }
        }
    }

    /// All at once, as far as a collection is concerned.
    fn bring_in(&self, made: Made, image: &Image, called: &Called) -> Result<ImageDetail> {
        if made.devices + made.xattrs > 0 {
            tracing::info!(devices = made.devices, xattrs = made.xattrs, image = %called.name, "left out of the image");
        }
        let manifest = Manifest {
            version: VERSION,
            rootfs: Rootfs { blob: Blob { digest: made.digest.clone(), size: made.size }, format: Format::Ext4 },
            config: image.config.clone(),
            created_at: oci::now(),
            kernel: None,
            revision: None,
            machine: None,
            source: Some(Source {
                kind: called.kind.to_owned(),
                reference: called.reference.clone(),
                digest: image.digest.clone(),
                architecture: oci::ARCHITECTURE.to_owned(),
                config: image.config_blob.clone(),
                layers: image.layers.clone(),
            }),
        };
        failpoint::reached(Point::ImageBuilt);
        let held = self.store.lock()?;
        // Over one of the same digest, if there is: this one has just been read, byte for byte.
        self.store.adopt(&made.path, &made.digest, &held)?;
        failpoint::reached(Point::ImageAdopted);
        self.verifier.vouch(&self.store.blob_path(&made.digest), &made.digest);
        let digest = self.store.put_manifest(&manifest, &held)?;
        clawpot_host::fs::replace(&self.store.made_of_path(&image.digest), format!("{digest}\n").as_bytes(), 0o444)?;
        failpoint::reached(Point::ImageDescribed);
        self.store.set_name(&called.name, &digest, called.replace, &held)?;
        failpoint::reached(Point::ImageNamed);
        drop(held);
        self.store.describe(&called.name)
    }
}

/// Layer after layer, as they come.
async fn feed_all<S>(feed: mpsc::Sender<Feed>, image: &Image, files: S) -> Result<()>
where
    S: futures_util::Stream<Item = Result<File>> + Send,
{
    use futures_util::StreamExt as _;
    let mut files = std::pin::pin!(files);
    let mut diff_ids = image.diff_ids.iter();
    while let Some(file) = files.next().await {
        send(&feed, Feed::Layer { file: file?, diff_id: diff_ids.next().cloned() }).await;
    }
    send(&feed, Feed::End).await;
    Ok(())
}

/// Where the helper takes no more, it has failed: its own error is the one to be told.
async fn send(feed: &mpsc::Sender<Feed>, one: Feed) {
    if feed.send(one).await.is_err() {
        std::future::pending::<()>().await;
    }
}

fn tell(meters: Vec<Meter>, teller: Teller) -> impl Fn(Told) + Send + 'static {
    let current = std::sync::atomic::AtomicUsize::new(0);
    move |told| {
        let at = current.load(std::sync::atomic::Ordering::Relaxed);
        match (told, meters.get(at)) {
            (Told::Read(read), Some(meter)) => meter.at("unpacking", read),
            (Told::LayerDone, Some(meter)) => {
                meter.done();
                current.store(at + 1, std::sync::atomic::Ordering::Relaxed);
            }
            (Told::Making(bytes), _) => teller.meter("file system", bytes).at("making", 0),
            _ => {}
        }
    }
}
