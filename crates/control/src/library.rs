//! Images: what the library does, with an event of who had it done.
//!
//! The library's files are no part of the store's transactions: an event is written when the change is there, and on a store
//! that cannot be written the change stands all the same. What is done goes to its end, event and all, when its client goes.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use clawpot_core::event::{About, Draft};
use clawpot_core::ports::{BoxStream, Collect, Collected, ImageLibrary, ImageProgress, Import, Pull, Txn};
use clawpot_types::{Digest, ImageRef, Result};
use futures_util::{FutureExt as _, StreamExt as _};
use tokio::sync::mpsc;
use tracing::{info, warn};

use crate::Service;
use crate::service::to_its_end;

/// Progress that waits for a slow client; more is dropped.
const BACKLOG: usize = 64;
/// Characters of an event.
const SHOWN: usize = 500;

/// Cheap to clone.
#[derive(Clone)]
pub struct Library {
    service: Service,
    library: Arc<dyn ImageLibrary>,
}

impl std::fmt::Debug for Library {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Library").finish_non_exhaustive()
    }
}

type Steps = BoxStream<Result<ImageProgress>>;

impl Library {
    pub fn new(service: Service, library: Arc<dyn ImageLibrary>) -> Self {
        Self { service, library }
    }

    #[must_use]
    pub const fn service(&self) -> &Service {
        &self.service
    }

    /// For what changes nothing.
    #[must_use]
    pub fn read(&self) -> &dyn ImageLibrary {
        &*self.library
    }

    /// Dropping the stream ends the pull.
    #[must_use]
    pub fn pull(&self, pull: Pull, actor: &str) -> Steps {
        info!(actor, reference = pull.reference, "pulling an image");
        let from = format!("of {}", pull.reference);
        self.told("image.pull", from, self.library.pull(pull), actor)
    }

    /// Dropping the stream ends the import.
    #[must_use]
    pub fn import(&self, import: Import, archive: BoxStream<Result<Bytes>>, actor: &str) -> Steps {
        info!(actor, name = import.name.as_ref().map(ToString::to_string), "importing an image");
        self.told("image.import", "of an archive".to_owned(), self.library.import(import, archive), actor)
    }

    pub async fn tag(&self, image: ImageRef, name: ImageRef, replace: bool, actor: &str) -> Result<Digest> {
        let (this, actor) = (self.clone(), actor.to_owned());
        to_its_end(async move {
            let digest = this.library.tag(&image, &name, replace).await?;
            info!(actor, %name, %digest, "an image has a name");
            this.tell("image.tag", image_of(&digest, &name.to_string()), format!("of {image}"), &actor).await;
            Ok(digest)
        })
        .await
    }

    pub async fn untag(&self, name: ImageRef, actor: &str) -> Result<Digest> {
        let (this, actor) = (self.clone(), actor.to_owned());
        to_its_end(async move {
            let digest = this.library.untag(&name).await?;
            info!(actor, %name, %digest, "an image's name is gone");
            let what = format!("the name is gone from {digest}");
            this.tell("image.rm", image_of(&digest, &name.to_string()), what, &actor).await;
            Ok(digest)
        })
        .await
    }

    pub async fn gc(&self, gc: Collect, actor: &str) -> Result<Collected> {
        let (this, actor) = (self.clone(), actor.to_owned());
        to_its_end(async move {
            let dry_run = gc.dry_run;
            let collected = this.library.gc(gc).await?;
            info!(actor, dry_run, removed = collected.removed.len(), "images were collected");
            if !dry_run && !collected.removed.is_empty() {
                let about =
                    About::Images { images_removed: u64::try_from(collected.removed.len()).unwrap_or(u64::MAX) };
                this.tell("image.gc", about, counted(&collected), &actor).await;
            }
            Ok(collected)
        })
        .await
    }

    /// `steps`, with an event before the last of them where an image came of it.
    fn told(&self, kind: &'static str, from: String, mut steps: Steps, actor: &str) -> Steps {
        let (say, mut said) = mpsc::channel(BACKLOG);
        let (this, actor) = (self.clone(), actor.to_owned());
        tokio::spawn(async move {
            loop {
                let step = tokio::select! {
                    biased;
                    step = steps.next() => step,
                    // What is done by now is told all the same.
                    () = say.closed() => steps.next().now_or_never().flatten(),
                };
                match step {
                    None => return,
                    // Full: somebody reads slowly and learns the next number.
                    Some(Ok(step @ ImageProgress::Step(_))) => say.try_send(Ok(step)).unwrap_or_default(),
                    Some(last) => {
                        if let Ok(ImageProgress::Done(image)) = &last {
                            let about = image_of(&image.info.digest, &image.info.name);
                            this.tell(kind, about, from.clone(), &actor).await;
                        }
                        // Nobody listens any more: nobody needs to know.
                        say.send(last).await.unwrap_or_default();
                    }
                }
            }
        });
        Box::pin(futures_util::stream::poll_fn(move |cx| said.poll_recv(cx)))
    }

    async fn tell(&self, kind: &'static str, about: About, message: String, actor: &str) {
        // A reference is what a client says.
        let message = message.chars().filter(|c| !c.is_control()).take(SHOWN).collect();
        let time = self.service.deps().clock.now();
        let told = Draft { time, about, kind, message, actor: actor.to_owned() };
        let store = self.service.records().store();
        if let Err(error) = store.txn(Txn { events: vec![told], ..Txn::default() }).await {
            warn!(kind, error = error.chain(), "writing the event of an image");
        }
    }
}

fn image_of(digest: &Digest, name: &str) -> About {
    About::Image { image: digest.clone(), image_name: name.to_owned() }
}

/// "3 files removed (1 manifest, 2 layer), 5242880 bytes"
fn counted(collected: &Collected) -> String {
    let mut kinds: BTreeMap<&str, u64> = BTreeMap::new();
    for one in &collected.removed {
        *kinds.entry(&one.kind).or_default() += 1;
    }
    let kinds: Vec<String> = kinds.into_iter().map(|(kind, count)| format!("{count} {kind}")).collect();
    let bytes: u64 = collected.removed.iter().map(|one| one.bytes).sum();
    let files = collected.removed.len();
    format!("{files} {} removed ({}), {bytes} bytes", if files == 1 { "file" } else { "files" }, kinds.join(", "))
}
