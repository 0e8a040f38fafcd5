//! The operator's side of the store: the `ImageLibrary` port.
//!
//! - [`pull`] from registries, [`fetch`] one blob of it · [`import`] from archives, [`spool`] how they are read · [`export`]
//! - [`finish`] from layers to an image under a name · [`room`] quota and free space · [`progress`] what is told meanwhile

mod export;
mod fetch;
mod finish;
mod import;
mod progress;
mod pull;
mod room;
mod spool;

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use clawpot_core::ports::{
    BoxStream, Collect, Collected, ImageDetail, ImageInfo, ImageLibrary, ImageProgress, Import, Pull, UnreadableImage,
};
use clawpot_types::{Digest, Error, ImageRef, Kind, Result};

use crate::build::Builder;
use crate::refs::Refs;
use crate::store::Store;
use crate::verify::Verifier;

pub(crate) use room::LEAST;
pub use room::Room;

/// Over one store. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Library {
    pub(crate) store: Store,
    pub(crate) verifier: Arc<Verifier>,
    pub(crate) refs: Arc<Refs>,
    pub(crate) builder: Builder,
    room: Room,
    promised: room::Promised,
}

impl Library {
    /// `helper` is the path of `clawpot-unpack`.
    pub(crate) fn new(store: Store, verifier: Arc<Verifier>, refs: Arc<Refs>, helper: PathBuf, room: Room) -> Self {
        let builder = Builder { helper, cache: store.cache() };
        Self { store, verifier, refs, builder, room, promised: room::Promised::default() }
    }

    /// Bytes that may still be written. `Exhausted`: not even `needed`. Blocks.
    pub(crate) fn left(&self, needed: u64) -> Result<u64> {
        self.promised.left(self.room, &self.store, needed)
    }

    /// Runs `work` where it may block.
    pub(crate) async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Self) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let this = self.clone();
        let task = tokio::task::spawn_blocking(move || work(&this));
        task.await.map_err(|error| Error::new(Kind::Internal, "an image task panicked").because(error))?
    }
}

#[async_trait]
impl ImageLibrary for Library {
    async fn list(&self) -> Result<(Vec<ImageInfo>, Vec<UnreadableImage>)> {
        self.blocking(|this| this.store.list()).await
    }

    async fn describe(&self, image: &ImageRef) -> Result<ImageDetail> {
        let image = image.clone();
        self.blocking(move |this| this.store.describe(&image)).await
    }

    fn pull(&self, pull: Pull) -> BoxStream<Result<ImageProgress>> {
        let this = self.clone();
        progress::stream(move |teller| pull::pull(this, pull, teller))
    }

    fn import(&self, import: Import, archive: BoxStream<Result<Bytes>>) -> BoxStream<Result<ImageProgress>> {
        let this = self.clone();
        progress::stream(move |teller| import::import(this, import, archive, teller))
    }

    async fn export(&self, image: &ImageRef) -> Result<BoxStream<Result<Bytes>>> {
        let image = image.clone();
        self.blocking(move |this| export::export(this, &image)).await
    }

    async fn tag(&self, image: &ImageRef, name: &ImageRef, replace: bool) -> Result<Digest> {
        let (image, name) = (image.clone(), name.clone());
        self.blocking(move |this| this.store.tag(&image, &name, replace)).await
    }

    async fn untag(&self, name: &ImageRef) -> Result<Digest> {
        let name = name.clone();
        self.blocking(move |this| this.store.untag(&name)).await
    }

    async fn gc(&self, gc: Collect) -> Result<Collected> {
        self.blocking(move |this| {
            if let Some(live) = gc.live.as_ref().filter(|_| !gc.dry_run) {
                this.refs.hold(Some(live))?;
            }
            this.store.collect(gc.dry_run, gc.all)
        })
        .await
    }

    async fn hold(&self, live: Option<BTreeSet<Digest>>) -> Result<()> {
        self.blocking(move |this| this.refs.hold(live.as_ref())).await
    }
}
