//! Build: a flake to an image, by way of a VM that exists for this alone.
//!
//! The VM is an ordinary one, made by the ordinary create: admission, crash-safety and deletion are the usual ones. What marks
//! it is that it has disks which only the server gives ([`VmRecord::is_servers`]); a server that starts has no use for such a
//! VM and removes it ([`Builds::clear_up`]). The build's files are there before its VM and go after it.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use clawpot_core::ports::{
    BoxStream, BuildName, BuildOrder, BuilderGuest, BuilderSays, FlakeSource, GuestEndpoint, ImageDetail, Revision,
    Source, Txn, Workbench,
};
use clawpot_core::{DiskSource, ExtraDisk, ImagePin, Phase, Reach, RestartPolicy, VmRecord, VmSpec};
use clawpot_failpoint::{self as failpoint, Point};
use clawpot_types::{Digest, Error, ImageRef, Kind, MiB, Millis, Result, Timestamp, Vcpus, VmId};
use futures_util::StreamExt as _;
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{Semaphore, mpsc};
use tracing::{info, warn};

use crate::records::Row;
use crate::service::create::CreateVm;
use crate::service::exec::Attachment;
use crate::{Service, service::event, service::known};

/// At once; each has a VM and up to a gibibyte of sources.
const AT_ONCE: usize = 8;
/// Messages that wait for a slow client. The guest waits too.
const AHEAD: usize = 32;
/// For the builder's agent to listen, once its VM's agent answers.
const LISTENS: Duration = Duration::from_secs(30);
const AGAIN: Duration = Duration::from_millis(200);
/// How much longer than the build's own limit the host waits for its last word: results are copied after it.
const COPY: Duration = Duration::from_secs(600);
/// Of the VM beyond both, for its boot and its shutdown; then the server removes it whoever is busy with it.
const AROUND: Duration = Duration::from_secs(600);
/// For an orderly shutdown, in which the guest's file systems are made clean.
const GRACE: Millis = Millis(30_000);
/// Between two attempts to remove a VM of a store that cannot be written.
const RETRY: Duration = Duration::from_secs(5);
/// Characters of an event.
const SHOWN: usize = 500;

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
    /// Whose files a clear-up leaves alone.
    running: Arc<Mutex<BTreeSet<VmId>>>,
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
        archive: BoxStream<Result<bytes::Bytes>>,
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
        archive: BoxStream<Result<bytes::Bytes>>,
        actor: &str,
        say: &Say,
    ) -> Result<BuildProgress> {
        let Ok(_place) = self.places.try_acquire() else {
            let what = format!("build: {AT_ONCE} builds are running already");
            return Err(Error::new(Kind::Exhausted, what).hint("wait until one is done"));
        };
        let id = self.service.deps().ids.vm_id();
        let one = One { builds: self, build, id: &id, actor, say };
        self.running().insert(id.clone());
        let done = one.go(archive).await;
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
                Err(match cleared {
                    Ok(()) => error,
                    Err(failed) => error.and_cleanup(failed),
                })
            }
        }
    }

    /// What came of it, among the events of its VM; one that had none leaves none. On a store that cannot be written builds run
    /// all the same.
    async fn tell(&self, build: &Build, id: &VmId, actor: &str, done: &Result<(ImageDetail, bool)>) {
        let records = self.service.records();
        let Some(Row::Known { record, .. }) = records.find(&vm_name(id)).ok().and_then(|vm| records.get(&vm)) else {
            return;
        };
        let name = &build.name.name;
        let message = match done {
            Ok((image, _)) => format!("{name}: {}", image.info.digest),
            Err(error) => format!("{name}: failed: {}", error.chain()),
        };
        // What a guest said is in it.
        let message = message.chars().filter(|c| !c.is_control()).take(SHOWN).collect();
        let told = event(self.service.deps(), &record, "image.build", message, actor);
        if let Err(error) = records.store().txn(Txn { events: vec![told], ..Txn::default() }).await {
            warn!(vm = %record.id, error = error.chain(), "writing the event of a build");
        }
    }

    /// The VM first, as it has the disks.
    async fn clear(&self, build: &VmId, actor: &str) -> Result<()> {
        // By its name, as the answer of its create may have been lost.
        if let Ok(vm) = self.service.records().find(&vm_name(build)) {
            self.remove_vm(&vm, actor).await?;
        }
        self.bench.clear(build).await
    }

    /// Until it is gone. Not forever: what stays is removed by its time to live, or by the next server.
    async fn remove_vm(&self, vm: &VmId, actor: &str) -> Result<()> {
        let mut attempts = 0;
        loop {
            match self.service.delete(vm.as_str(), false, actor).await {
                Ok(_) => break,
                Err(error) if error.kind() == Kind::NotFound => return Ok(()),
                Err(error) if attempts == 3 => return Err(error),
                Err(error) => warn!(%vm, error = error.chain(), "removing the VM of a build"),
            }
            attempts += 1;
            tokio::time::sleep(RETRY).await;
        }
        self.service.until(vm, |row| row.is_none()).await
    }

    /// What builds of servers that are gone have left: their VMs, then their files. What there is, is looked at in this call,
    /// before anybody can ask for a build; the work is done when the future is.
    pub fn clear_up(&self) -> impl Future<Output = ()> + Send + 'static {
        let rows = self.service.records().rows_after(None);
        let own = |row: &Row| matches!(row, Row::Known { record, .. } if record.is_servers());
        let vms: Vec<VmId> = rows.iter().filter(|(_, row)| own(row)).map(|(vm, _)| vm.clone()).collect();
        let this = self.clone();
        async move { this.remove(&vms).await }
    }

    async fn remove(&self, vms: &[VmId]) {
        for vm in vms {
            // The runner goes on by itself where this gives up.
            match self.remove_vm(vm, "server").await {
                Ok(()) => info!(%vm, "the VM of a build that nobody waits for was removed"),
                Err(error) => warn!(%vm, error = error.chain(), "removing the VM of a build that nobody waits for"),
            }
        }
        match self.bench.left().await {
            Ok(left) => {
                for build in left {
                    self.clear_files(&build).await;
                }
            }
            Err(error) => warn!(error = error.chain(), "looking for what builds have left"),
        }
    }

    async fn clear_files(&self, build: &VmId) {
        let used = self.running().contains(build)
            || self.service.records().rows_after(None).iter().any(|(_, row)| match row {
                // Who knows what it has.
                Row::Unreadable { .. } => true,
                Row::Known { record, .. } => record.is_servers() && names(record, build),
            });
        if used {
            return;
        }
        if let Err(error) = self.bench.clear(build).await {
            warn!(%build, error = error.chain(), "removing what a build has left");
        }
    }

    fn running(&self) -> std::sync::MutexGuard<'_, BTreeSet<VmId>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether one of the VM's disks is a file of this build.
fn names(record: &VmRecord, build: &VmId) -> bool {
    record.spec.extra_disks.iter().any(|disk| match &disk.source {
        DiskSource::File(path) => path.iter().any(|part| part == build.as_str()),
        DiskSource::Volume(_) => false,
    })
}

fn vm_name(build: &VmId) -> String {
    format!("build-{build}")
}

/// What there is before the VM.
enum Prepared {
    Known(Box<ImageDetail>),
    Ready { builder: ImagePin, source: Option<Source>, disks: Vec<PathBuf> },
}

/// One build on its way.
struct One<'a> {
    builds: &'a Builds,
    build: &'a Build,
    id: &'a VmId,
    actor: &'a str,
    say: &'a Say,
}

impl One<'_> {
    /// The image, and whether it was there already.
    async fn go(&self, archive: BoxStream<Result<bytes::Bytes>>) -> Result<(ImageDetail, bool)> {
        let bench = &self.builds.bench;
        let started = self.now();
        let (builder, source, disks) = match self.unless_gone(self.prepare(archive)).await? {
            Prepared::Known(image) => return Ok((*image, true)),
            Prepared::Ready { builder, source, disks } => (builder, source, disks),
        };
        self.step("starting the builder").await;
        // Not dropped half way: what it makes must be known to whoever clears up.
        let (vm, _attached) = self.create(disks).await?;
        let out_path = self.unless_gone(self.in_vm(&vm)).await?;
        self.step("stopping the builder").await;
        self.unless_gone(self.stop(&vm)).await?;
        self.step("importing the result").await;
        let key = source.as_ref().map(|source| bench.key(source, &self.build.attr));
        let revision = self.revision(builder, source, key, out_path, started);
        let image = self.unless_gone(bench.take(self.id, revision, &self.build.name)).await?;
        Ok((image, false))
    }

    async fn unless_gone<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        tokio::select! {
            biased;
            done = work => done,
            () = self.say.closed() => Err(Error::new(Kind::Cancelled, "build: nobody waits for it any more")),
        }
    }

    async fn prepare(&self, archive: BoxStream<Result<bytes::Bytes>>) -> Result<Prepared> {
        let (bench, build) = (&self.builds.bench, self.build);
        bench.may_call(&build.name).await?;
        let builder = self.builder().await?;
        let source = match build.flake {
            FlakeSource::Local => {
                self.step("receiving the flake's directory").await;
                let source = bench.receive(self.id, archive).await?;
                failpoint::reached(Point::BuildReceived);
                Some(source)
            }
            FlakeSource::Remote(_) => None,
        };
        let key = source.as_ref().map(|source| bench.key(source, &build.attr));
        if let Some(image) = bench.known(key.as_ref().filter(|_| build.cache), &build.name).await? {
            return Ok(Prepared::Known(Box::new(image)));
        }
        self.step("making its disks").await;
        let disks = bench.lay_out(self.id, build.disk).await?;
        failpoint::reached(Point::BuildLaidOut);
        Ok(Prepared::Ready { builder, source, disks })
    }

    fn now(&self) -> Timestamp {
        self.builds.service.deps().clock.now()
    }

    async fn step(&self, doing: &str) {
        // Nobody listens: `run` sees it too.
        self.say.send(Ok(BuildProgress::Step(doing.to_owned()))).await.unwrap_or_default();
    }

    async fn builder(&self) -> Result<ImagePin> {
        let image = &self.build.builder;
        self.builds.service.deps().images.resolve(image).await.map_err(|error| match error.kind() {
            Kind::NotFound => Error::new(
                Kind::FailedPrecondition,
                format!("build: there is no image {image}, in which nix would run"),
            )
            .hint("make it with scripts/setup-builder.sh"),
            _ => error.context("build: the builder's image"),
        })
    }

    /// In the order in which the guest expects them: results, then sources.
    async fn create(&self, disks: Vec<PathBuf>) -> Result<(VmId, Attachment)> {
        let build = self.build;
        let disk = |(index, path)| ExtraDisk { source: DiskSource::File(path), read_only: index > 0, mount: None };
        let spec = VmSpec {
            image: build.builder.clone(),
            vcpus: build.vcpus,
            memory: build.memory,
            disk: build.disk,
            env: Vec::new(),
            cwd: String::new(),
            user: String::new(),
            extra_disks: disks.into_iter().enumerate().map(disk).collect(),
            reach: build.reach,
        };
        let ttl = Duration::from_secs(build.timeout_secs) + COPY + AROUND;
        let mut labels = std::collections::BTreeMap::new();
        // What cannot be a label is left out: it is only there to be read.
        if let (Ok(key), Ok(value)) = ("build".parse(), build.name.name.to_string().parse()) {
            labels.insert(key, value);
        }
        let body = CreateVm {
            name: Some(vm_name(self.id).parse()?),
            labels,
            spec,
            remove_when_done: true,
            ttl: Some(Millis(u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX))),
            restart: RestartPolicy::Never,
        };
        let (_, record) = self.builds.service.create("", body, self.actor).await?;
        failpoint::reached(Point::BuildAccepted);
        Ok((record.id.clone(), Attachment::new(&self.builds.service, &record.id)))
    }

    /// Boots and builds; where nix has the result.
    async fn in_vm(&self, vm: &VmId) -> Result<String> {
        let service = &self.builds.service;
        let (record, link) = service.ready(vm).await.map_err(|error| error.context("build: starting the builder"))?;
        self.step("building").await;
        let over = service.machine_over(vm.clone(), record.machine());
        let limit = Duration::from_secs(self.build.timeout_secs) + COPY;
        tokio::select! {
            biased;
            built = self.listen(&link.endpoint) => built,
            ended = over => Err(ended.context("build: its VM ended")
                .hint("it may have run out of memory: give it more with --memory")),
            () = tokio::time::sleep(limit) => {
                let what = format!("build: no end of it within {} s", limit.as_secs());
                Err(Error::new(Kind::Timeout, what).hint("give it longer with --timeout"))
            }
        }
    }

    async fn listen(&self, endpoint: &GuestEndpoint) -> Result<String> {
        let mut says = self.call(endpoint).await?;
        while let Some(said) = says.next().await {
            match said? {
                // Waits for a client that reads slowly, and so does the guest.
                BuilderSays::Log(line) => self.say.send(Ok(BuildProgress::Log(line))).await.unwrap_or_default(),
                BuilderSays::Built { out_path } => return Ok(out_path),
            }
        }
        Err(Error::new(Kind::Unavailable, "build: the builder ended without a word"))
    }

    /// Its VM's agent answers; the builder's listens at about the same time.
    async fn call(&self, endpoint: &GuestEndpoint) -> Result<BoxStream<Result<BuilderSays>>> {
        let mut late = std::pin::pin!(tokio::time::sleep(LISTENS));
        loop {
            let order = BuildOrder {
                flake: self.build.flake.clone(),
                attr: self.build.attr.clone(),
                timeout_secs: self.build.timeout_secs,
            };
            let error = match self.builds.guest.build(endpoint, order).await {
                Err(error) if matches!(error.kind(), Kind::Unavailable | Kind::Timeout) => error,
                says => return says,
            };
            tokio::select! {
                biased;
                () = &mut late => {
                    let what = format!("build: no builder listens in image {}", self.build.builder);
                    return Err(Error::new(Kind::FailedPrecondition, what)
                        .because(error)
                        .hint("make the image anew with scripts/setup-builder.sh --upgrade"));
                }
                () = tokio::time::sleep(AGAIN) => {}
            }
        }
    }

    /// In order, so that the guest's file systems are clean.
    async fn stop(&self, vm: &VmId) -> Result<()> {
        let service = &self.builds.service;
        service.stop(vm.as_str(), GRACE, self.actor).await?;
        service
            .until(vm, |row| {
                row.is_none_or(|row| matches!(row.phase(), Phase::Stopped | Phase::Failed | Phase::Deleting))
            })
            .await?;
        match known(vm, service.records().get(vm))? {
            (_, record) if record.phase == Phase::Stopped => Ok(()),
            (_, record) => {
                Err(Error::new(Kind::Conflict, format!("build: its VM is {} where it was to be stopped", record.phase)))
            }
        }
    }

    fn revision(
        &self,
        builder: ImagePin,
        source: Option<Source>,
        key: Option<Digest>,
        out_path: String,
        started_at: Timestamp,
    ) -> Revision {
        Revision {
            flake: self.build.shown.clone(),
            attr: self.build.attr.clone(),
            lock: source.as_ref().and_then(|source| source.lock.clone()),
            source: source.map(|source| source.digest),
            builder: builder.digest,
            network: self.build.reach.as_str().to_owned(),
            kernel_release: None,
            out_path,
            started_at,
            finished_at: self.now(),
            key,
        }
    }
}

impl Service {
    /// Until `reached` says so of the VM's row.
    async fn until(&self, vm: &VmId, reached: impl Fn(Option<Row>) -> bool + Send) -> Result<()> {
        let mut changes = self.records.subscribe();
        loop {
            if reached(self.records.get(vm)) {
                return Ok(());
            }
            match changes.recv().await {
                Ok(_) | Err(RecvError::Lagged(_)) => {}
                Err(RecvError::Closed) => return Err(Error::new(Kind::Unavailable, "the server is going")),
            }
        }
    }
}
