//! One build on its way.

use std::path::PathBuf;
use std::time::Duration;

use bytes::Bytes;
use clawpot_core::ports::{
    BoxStream, BuildOrder, BuilderSays, FlakeSource, GuestEndpoint, ImageDetail, LaidOut, Revision, Source,
};
use clawpot_core::{DiskSource, ExtraDisk, ImagePin, Phase, Reach, RestartPolicy, VmSpec};
use clawpot_failpoint::{self as failpoint, Point};
use clawpot_types::{Digest, Error, Kind, Millis, Result, Timestamp, VmId};
use futures_util::StreamExt as _;
use tokio::sync::broadcast::error::RecvError;

use super::diary::Diary;
use super::{Build, BuildProgress, Builds, Say, build_name};
use crate::records::Row;
use crate::service::admit::Promise;
use crate::service::create::CreateVm;
use crate::service::exec::Attachment;
use crate::{Service, service::known};

/// For the builder's agent to listen, once its VM's agent answers.
const LISTENS: Duration = Duration::from_secs(30);
const AGAIN: Duration = Duration::from_millis(200);
/// How much longer than the build's own limit the host waits for its last word: results are copied after it.
const COPY: Duration = Duration::from_secs(600);
/// Of the VM beyond both, for its boot and its shutdown; then the server removes it whoever is busy with it.
const AROUND: Duration = Duration::from_secs(600);
/// For an orderly shutdown, in which the guest's file systems are made clean.
const GRACE: Millis = Millis(30_000);
/// Lines that are written into the log, and passed on, together.
const TOGETHER: usize = 64;

/// What there is before the VM.
enum Prepared {
    Known(Box<ImageDetail>),
    Ready { builder: ImagePin, source: Option<Source>, disks: Vec<PathBuf> },
}

/// One build on its way.
pub struct One<'a> {
    pub builds: &'a Builds,
    pub build: &'a Build,
    pub id: &'a VmId,
    pub actor: &'a str,
    pub say: &'a Say,
    pub diary: &'a Diary<'a>,
    /// What is promised for its sources, where it has any.
    pub room: Option<Promise>,
}

impl One<'_> {
    /// The image, and whether it was there already.
    pub async fn go(&self, archive: BoxStream<Result<Bytes>>) -> Result<(ImageDetail, bool)> {
        let bench = &self.builds.bench;
        let started = self.now();
        let (builder, source, disks) = match self.unless_gone(self.prepare(archive)).await? {
            Prepared::Known(image) => return Ok((*image, true)),
            Prepared::Ready { builder, source, disks } => (builder, source, disks),
        };
        self.diary.begin(self.build, self.actor).await;
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
        self.say_whether_it_boots(&image).await;
        Ok((image, false))
    }

    /// On this host. It may be meant for another, and cannot be had without being built.
    async fn say_whether_it_boots(&self, image: &ImageDetail) {
        let deps = self.builds.service.deps();
        let pin = ImagePin { digest: image.info.digest.clone() };
        if let Err(error) = deps.images.boots(&pin, deps.vmms.default().capabilities().kind).await {
            self.step(&format!("it is no image for VMs of this server: {}", error.chain())).await;
        }
    }

    async fn unless_gone<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        tokio::select! {
            biased;
            done = work => done,
            () = self.say.closed() => Err(Error::new(Kind::Cancelled, "build: nobody waits for it any more")),
        }
    }

    async fn prepare(&self, archive: BoxStream<Result<Bytes>>) -> Result<Prepared> {
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
        let LaidOut { disks, sources } = bench.lay_out(self.id, build.disk).await?;
        failpoint::reached(Point::BuildLaidOut);
        if let Some(room) = &self.room {
            room.only(sources);
        }
        Ok(Prepared::Ready { builder, source, disks })
    }

    fn now(&self) -> Timestamp {
        self.builds.service.deps().clock.now()
    }

    async fn step(&self, doing: &str) {
        self.diary.write(&[format!("== {doing}")]).await;
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
            name: Some(build_name(self.id).parse()?),
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
        let mut says = self.call(endpoint).await?.ready_chunks(TOGETHER);
        while let Some(said) = says.next().await {
            let (mut lines, mut last) = (Vec::new(), None);
            for one in said {
                match one {
                    Ok(BuilderSays::Log(line)) => lines.push(line),
                    Ok(BuilderSays::Built { out_path }) => last = Some(Ok(out_path)),
                    Err(error) => last = Some(Err(error)),
                }
            }
            self.diary.write(&lines).await;
            for line in lines {
                // Waits for a client that reads slowly, and so does the guest.
                self.say.send(Ok(BuildProgress::Log(line))).await.unwrap_or_default();
            }
            if let Some(last) = last {
                return last;
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
                substitute: self.build.reach == Reach::Default,
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
                row.is_none_or(|row| {
                    matches!(row.phase(), Phase::Stopped | Phase::Failed | Phase::Deleting | Phase::Quarantined)
                })
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
            build: Some(self.id.clone()),
            key,
        }
    }
}

impl Service {
    /// Until `reached` says so of the VM's row.
    pub(super) async fn until(&self, vm: &VmId, reached: impl Fn(Option<Row>) -> bool + Send) -> Result<()> {
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
