//! Build: a flake to an image, by way of a VM that exists for this alone.
//!
//! The VM is an ordinary one, made by the ordinary create: admission, crash-safety and deletion are the usual ones. What marks
//! it is that it has disks which only the server gives ([`VmRecord::is_servers`]); a server that starts has no use for such a
//! VM and removes it ([`Builds::clear_up`]). The build's files are there before its VM and go after it; its log stays.
//!
//! - `one` a build on its way, from the flake's directory to the image
//! - `diary` its log, which outlives it
//! - `clear` its end, also that of a build whose server is gone

mod clear;
mod diary;
mod one;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use clawpot_core::Reach;
use clawpot_core::event::{About, Draft};
use clawpot_core::ports::{
    BoxStream, BuildName, BuilderGuest, FlakeSource, ImageDetail, LARGEST_SOURCE, Txn, Workbench,
};
use clawpot_types::{Error, ImageRef, Incarnation, Kind, MiB, Result, Vcpus, VmId};
use tokio::sync::{Semaphore, mpsc};
use tracing::{info, warn};

use self::diary::Diary;
use self::one::One;
use crate::Service;
use crate::records::Row;
use crate::service::event;

/// At once; each has a VM and up to a gibibyte of sources.
const AT_ONCE: usize = 8;
/// Of these, for one user: whoever sends slowly, or nothing at all, leaves some to others.
const OF_ONE: usize = 6;
/// Messages that wait for a slow client. The guest waits too.
const AHEAD: usize = 32;
/// Characters of an event.
const SHOWN: usize = 500;
const EVENT: &str = "image.build";

/// What a client asks for, checked in form by the API.
#[derive(Clone, Debug)]
pub struct Build {
    pub flake: FlakeSource,
    /// As it was asked for.
    pub shown: String,
    /// Empty: the flake's default.
    pub attr: String,
    pub name: BuildName,
    pub builder: ImageRef,
    pub reach: Reach,
    pub vcpus: Vcpus,
    pub memory: MiB,
    /// Of the VM's own disk and of that of results.
    pub disk: MiB,
    pub timeout_secs: u64,
    /// What was built before is enough.
    pub cache: bool,
}

#[derive(Debug)]
pub enum BuildProgress {
    Step(String),
    Log(String),
    /// The last. Nothing is left of the build's VM.
    Done {
        image: Box<ImageDetail>,
        cached: bool,
    },
}

/// Cheap to clone.
#[derive(Clone)]
pub struct Builds {
    service: Service,
    bench: Arc<dyn Workbench>,
    guest: Arc<dyn BuilderGuest>,
    places: Arc<Semaphore>,
    /// Whose files a clear-up leaves alone, and who asked for it.
    running: Arc<Mutex<BTreeMap<VmId, String>>>,
}

impl std::fmt::Debug for Builds {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Builds").finish_non_exhaustive()
    }
}

type Say = mpsc::Sender<Result<BuildProgress>>;

impl Builds {
    pub fn new(service: Service, bench: Arc<dyn Workbench>, guest: Arc<dyn BuilderGuest>) -> Self {
        Self { service, bench, guest, places: Arc::new(Semaphore::new(AT_ONCE)), running: Arc::default() }
    }

    /// Dropping the stream ends the build. `archive`: of a local flake's directory.
    #[must_use]
    pub fn build(
        &self,
        build: Build,
        archive: BoxStream<Result<Bytes>>,
        actor: &str,
    ) -> BoxStream<Result<BuildProgress>> {
        let (say, mut said) = mpsc::channel(AHEAD);
        let (this, actor) = (self.clone(), actor.to_owned());
        tokio::spawn(async move {
            let last = this.run(&build, archive, &actor, &say).await;
            // Nobody listens any more: nobody needs to know.
            say.send(last).await.unwrap_or_default();
        });
        Box::pin(futures_util::stream::poll_fn(move |cx| said.poll_recv(cx)))
    }

    /// To its end, or until nobody listens; in either case nothing is left of it but the image.
    async fn run(
        &self,
        build: &Build,
        archive: BoxStream<Result<Bytes>>,
        actor: &str,
        say: &Say,
    ) -> Result<BuildProgress> {
        let Ok(_place) = self.places.try_acquire() else {
            let what = format!("build: {AT_ONCE} builds are running already");
            return Err(Error::new(Kind::Exhausted, what).hint("wait until one is done"));
        };
        let id = self.service.deps().ids.vm_id();
        self.begin(&id, actor)?;
        let diary = Diary::new(&*self.bench, &id);
        let done = self.held(build, archive, actor, say, &diary).await;
        diary.end(&done).await;
        self.tell(build, &id, actor, &done).await;
        let cleared = self.clear(&id, actor).await;
        self.running().remove(&id);
        match (done, cleared) {
            (Ok((image, cached)), Ok(())) => {
                info!(actor, image = %build.name.name, digest = %image.info.digest, cached, "built");
                Ok(BuildProgress::Done { image: Box::new(image), cached })
            }
            (Ok(_), Err(failed)) => Err(failed.context("build: it is done, but what it leaves could not be removed")),
            (Err(error), cleared) => {
                info!(actor, image = %build.name.name, error = error.chain(), "a build came to nothing");
                let error = diary.pointed_at(error);
                Err(match cleared {
                    Ok(()) => error,
                    Err(failed) => error.and_cleanup(failed),
                })
            }
        }
    }

    /// With room promised for what the client sends; the VM is admitted when it is made.
    async fn held(
        &self,
        build: &Build,
        archive: BoxStream<Result<Bytes>>,
        actor: &str,
        say: &Say,
        diary: &Diary<'_>,
    ) -> Result<(ImageDetail, bool)> {
        let room = match build.flake {
            FlakeSource::Local => Some(self.service.promise_disk(diary.build, LARGEST_SOURCE, "build").await?),
            FlakeSource::Remote(_) => None,
        };
        One { builds: self, build, id: diary.build, actor, say, diary, room }.go(archive).await
    }

    /// What came of it, among the events: of its VM, or, where there was none, of the VM that there would have been. On a store
    /// that cannot be written builds run all the same.
    async fn tell(&self, build: &Build, id: &VmId, actor: &str, done: &Result<(ImageDetail, bool)>) {
        let name = &build.name.name;
        let message = match done {
            Ok((image, false)) => format!("{name}: {}", image.info.digest),
            Ok((image, true)) => format!("{name}: {}, as built before", image.info.digest),
            Err(error) => format!("{name}: failed: {}", error.chain()),
        };
        // What a guest said is in it.
        let message: String = message.chars().filter(|c| !c.is_control()).take(SHOWN).collect();
        let records = self.service.records();
        let told = match records.find(&build_name(id)).ok().and_then(|vm| records.get(&vm)) {
            Some(Row::Known { record, .. }) => Ok(event(self.service.deps(), &record, EVENT, message, actor)),
            _ => build_name(id).parse().map(|name| Draft {
                time: self.service.deps().clock.now(),
                about: About::Vm { vm: id.clone(), name, incarnation: Incarnation(0) },
                kind: EVENT,
                message,
                actor: actor.to_owned(),
            }),
        };
        let written = match told {
            Ok(told) => records.store().txn(Txn { events: vec![told], ..Txn::default() }).await.map(drop),
            Err(error) => Err(error),
        };
        if let Err(error) = written {
            warn!(build = %id, error = error.chain(), "writing the event of a build");
        }
    }

    /// What a build said, as far as it has come: of an image (name or digest), or of a build by its name (`build-…`), which is
    /// also that of its VM. `NotFound`: no such build, or its log is not kept any more.
    pub async fn log(&self, of: &str) -> Result<BoxStream<Result<Bytes>>> {
        if let Some(build) = of.strip_prefix("build-").and_then(|id| id.parse::<VmId>().ok()) {
            return self.bench.read_log(&build).await;
        }
        let image: ImageRef = of.parse()?;
        let revision = self.service.deps().images.describe(&image).await?.revision;
        match revision.and_then(|revision| revision.build) {
            Some(build) => self.bench.read_log(&build).await,
            None => {
                Err(Error::new(Kind::NotFound, format!("image {image}: it was not built here, so that it has no log"))
                    .hint(format!("what is known of where it came from: clawpot image inspect {image}")))
            }
        }
    }

    fn begin(&self, id: &VmId, actor: &str) -> Result<()> {
        let mut running = self.running();
        if running.values().filter(|other| *other == actor).count() >= OF_ONE {
            let what = format!("build: {OF_ONE} builds of {actor} are running already");
            return Err(Error::new(Kind::Exhausted, what).hint("wait until one is done"));
        }
        running.insert(id.clone(), actor.to_owned());
        Ok(())
    }

    fn running(&self) -> std::sync::MutexGuard<'_, BTreeMap<VmId, String>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a build is called, and its VM.
#[must_use]
pub fn build_name(build: &VmId) -> String {
    format!("build-{build}")
}
