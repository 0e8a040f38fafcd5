//! However a build ends, nothing of it is left: no VM, no file. Over a host that is not there, in virtual time.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use clawpot_control::{Build, BuildProgress, Builds, Row};
use clawpot_core::admission::Room;
use clawpot_core::ports::{
    BoxStream, BuildName, BuildOrder, BuilderGuest, BuilderSays, FlakeSource, GuestEndpoint, ImageDetail, Images as _,
    LARGEST_SOURCE, LaidOut, Revision, Source, Workbench,
};
use clawpot_core::{DiskSource, Reach};
use clawpot_testkit::{FakeImages, Injection, Method};
use clawpot_types::{Digest, Error, Kind, MiB, Result, Vcpus, VmId};
use futures_util::StreamExt as _;
use support::House;

/// Files of builds as names in memory.
#[derive(Default)]
struct Bench {
    files: Mutex<BTreeSet<VmId>>,
    logs: Mutex<BTreeMap<VmId, String>>,
    built: Mutex<Option<(Digest, ImageDetail)>>,
    image: Mutex<Option<ImageDetail>>,
}

#[async_trait]
impl Workbench for Bench {
    async fn may_call(&self, _: &BuildName) -> Result<()> {
        Ok(())
    }

    async fn receive(&self, build: &VmId, mut archive: BoxStream<Result<bytes::Bytes>>) -> Result<Source> {
        self.files.lock().unwrap().insert(build.clone());
        while let Some(chunk) = archive.next().await {
            chunk?;
        }
        Ok(Source { digest: Digest::from_sha256(&[1; 32]), lock: None })
    }

    fn key(&self, source: &Source, _: &str) -> Digest {
        source.digest.clone()
    }

    async fn known(&self, key: Option<&Digest>, _: &BuildName) -> Result<Option<ImageDetail>> {
        let built = self.built.lock().unwrap();
        Ok(built.as_ref().filter(|(known, _)| Some(known) == key).map(|(_, image)| image.clone()))
    }

    async fn lay_out(&self, build: &VmId, _: MiB) -> Result<LaidOut> {
        self.files.lock().unwrap().insert(build.clone());
        let disks = ["output", "source"].map(|name| format!("/fake/builds/{build}/{name}").into()).to_vec();
        Ok(LaidOut { disks, sources: MiB(3) })
    }

    async fn take(&self, build: &VmId, revision: Revision, _: &BuildName) -> Result<ImageDetail> {
        assert!(self.files.lock().unwrap().contains(build));
        let image = self.image.lock().unwrap().clone().unwrap();
        if let Some(key) = revision.key {
            *self.built.lock().unwrap() = Some((key, image.clone()));
        }
        Ok(image)
    }

    async fn clear(&self, build: &VmId) -> Result<()> {
        self.files.lock().unwrap().remove(build);
        Ok(())
    }

    async fn write_log(&self, build: &VmId, text: String) -> Result<()> {
        self.logs.lock().unwrap().entry(build.clone()).or_default().push_str(&text);
        Ok(())
    }

    async fn read_log(&self, build: &VmId) -> Result<BoxStream<Result<bytes::Bytes>>> {
        let log = self.logs.lock().unwrap().get(build).cloned();
        let log = log.ok_or_else(|| Error::new(Kind::NotFound, "no log"))?;
        Ok(Box::pin(futures_util::stream::iter([Ok(log.into())])))
    }

    async fn left(&self) -> Result<Vec<VmId>> {
        Ok(self.files.lock().unwrap().iter().cloned().collect())
    }
}

#[derive(Clone, Copy)]
enum Does {
    Builds,
    Fails,
    NeverEnds,
    IsNoBuilder,
}

struct Nix(Does);

#[async_trait]
impl BuilderGuest for Nix {
    async fn build(&self, _: &GuestEndpoint, order: BuildOrder) -> Result<BoxStream<Result<BuilderSays>>> {
        let log = Ok(BuilderSays::Log(format!("building {}", order.attr)));
        let last = match self.0 {
            Does::IsNoBuilder => return Err(Error::new(Kind::Unavailable, "nobody listens")),
            Does::NeverEnds => {
                return Ok(Box::pin(futures_util::stream::iter([log]).chain(futures_util::stream::pending())));
            }
            Does::Builds => Ok(BuilderSays::Built { out_path: "/nix/store/x".to_owned() }),
            Does::Fails => Err(Error::new(Kind::FailedPrecondition, "the build failed")),
        };
        Ok(Box::pin(futures_util::stream::iter([log, last])))
    }
}

fn wanted() -> Build {
    Build {
        flake: FlakeSource::Local,
        shown: ".".to_owned(),
        attr: "image".to_owned(),
        name: BuildName { name: "app".parse().unwrap(), replace: false },
        builder: "debian".parse().unwrap(),
        reach: Reach::None,
        vcpus: Vcpus::ONE,
        memory: MiB(256),
        disk: MiB(1024),
        timeout_secs: 60,
        cache: true,
    }
}

async fn workshop(house: &House, does: Does) -> (Builds, Arc<Bench>) {
    let bench = Arc::new(Bench::default());
    let image = FakeImages::new(&house.host).describe(&"debian".parse().unwrap()).await.unwrap();
    *bench.image.lock().unwrap() = Some(image);
    (Builds::new(house.service().clone(), bench.clone(), Arc::new(Nix(does))), bench)
}

fn begin(builds: &Builds, build: Build) -> BoxStream<Result<BuildProgress>> {
    builds.build(build, Box::pin(futures_util::stream::empty()), "uid=0")
}

/// What it said, and how it ended.
async fn ended(builds: &Builds, build: Build) -> (Vec<String>, Result<bool>) {
    let (mut said, mut progress) = (Vec::new(), begin(builds, build));
    while let Some(one) = progress.next().await {
        match one {
            Ok(BuildProgress::Step(text) | BuildProgress::Log(text)) => said.push(text),
            Ok(BuildProgress::Done { cached, .. }) => return (said, Ok(cached)),
            Err(error) => return (said, Err(error)),
        }
    }
    panic!("it ended without a word: {said:?}")
}

/// The events of builds.
async fn told(house: &House) -> Vec<String> {
    let events = house.service().events("", Default::default(), 1000).await.unwrap();
    events.into_iter().filter(|event| event.kind == "image.build").map(|event| event.message).collect()
}

fn check_empty(house: &House, bench: &Bench) {
    house.check_empty();
    assert!(bench.files.lock().unwrap().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_build_has_a_vm_of_its_own_and_leaves_an_image() {
    let house = House::new().await;
    let (builds, bench) = workshop(&house, Does::Builds).await;
    let (said, done) = ended(&builds, wanted()).await;
    assert!(!done.unwrap(), "{said:?}");
    let told = told(&house).await;
    let [told] = &told[..] else { panic!("{told:?}") };
    assert!(told.starts_with("app: sha256:"), "{told}");
    let log = the_log(&builds, &bench).await;
    assert!(log.starts_with("== . as app, for uid=0\n") && log.contains("\nbuilding image\n"), "{log}");
    assert!(log.lines().last().unwrap().starts_with("== built: sha256:"), "{log}");
    assert!(said.contains(&"building image".to_owned()), "{said:?}");
    check_empty(&house, &bench);
    // The same again: nothing runs.
    let (said, done) = ended(&builds, wanted()).await;
    assert!(done.unwrap() && !said.contains(&"building image".to_owned()), "{said:?}");
    let told = self::told(&house).await;
    assert!(
        told.len() == 2 && told[1].ends_with(", as built before"),
        "who called is told also where nothing ran: {told:?}"
    );
    let (_, done) = ended(&builds, Build { cache: false, ..wanted() }).await;
    assert!(!done.unwrap());
    check_empty(&house, &bench);
}

/// Of the one build of which there is a log.
async fn the_log(builds: &Builds, bench: &Bench) -> String {
    let logged: Vec<_> = bench.logs.lock().unwrap().keys().cloned().collect();
    let [build] = &logged[..] else { panic!("{logged:?}") };
    let mut log = builds.log(&format!("build-{build}")).await.unwrap();
    let mut text = String::new();
    while let Some(piece) = log.next().await {
        text.push_str(std::str::from_utf8(&piece.unwrap()).unwrap());
    }
    text
}

/// The sources' disk counts: at its largest while it comes, then as it is, and not at all behind the build.
#[tokio::test(start_paused = true)]
async fn what_is_received_is_admitted_first() {
    let house = House::new().await;
    let (builds, bench) = workshop(&house, Does::NeverEnds).await;
    let used = async || house.service().budgets().await.unwrap().disk;
    let before = used().await.used;
    let (send, mut sent) = tokio::sync::mpsc::channel(1);
    let archive = Box::pin(futures_util::stream::poll_fn(move |cx| sent.poll_recv(cx)));
    let mut progress = builds.build(wanted(), archive, "uid=0");
    assert!(matches!(progress.next().await, Some(Ok(BuildProgress::Step(_)))));
    assert_eq!(used().await.used, before + LARGEST_SOURCE.0);
    drop(send);
    let vm = in_its_vm(&house, &mut progress).await;
    assert_eq!(used().await.used, before + 2 * 1024 + 3);
    // Where there is no room nothing is received.
    let gib = |n: u64| MiB(n << 10);
    let room = Room {
        cpus: 4,
        memory: gib(8),
        memory_available: gib(8),
        disk: MiB(used().await.used / 4 + 200),
        disk_free: gib(1),
    };
    house.host.set_room(room);
    let error = ended(&builds, Build { cache: false, ..wanted() }).await.1.unwrap_err();
    assert_eq!(error.kind(), Kind::Exhausted, "{}", error.chain());
    assert!(error.chain().contains("1024 MiB asked"), "{}", error.chain());
    drop(progress);
    house.until(&vm, None).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(used().await.used, before);
    check_empty(&house, &bench);
}

#[tokio::test(start_paused = true)]
async fn however_it_fails_nothing_is_left() {
    for (does, kind, why) in [
        (Does::Fails, Kind::FailedPrecondition, "the build failed"),
        (Does::NeverEnds, Kind::Timeout, "no end of it"),
        (Does::IsNoBuilder, Kind::FailedPrecondition, "no builder listens in image debian"),
    ] {
        let house = House::new().await;
        let (builds, bench) = workshop(&house, does).await;
        let error = ended(&builds, wanted()).await.1.unwrap_err();
        assert_eq!(error.kind(), kind, "{}", error.chain());
        assert!(error.chain().contains(why), "{}", error.chain());
        let told = told(&house).await;
        let [told] = &told[..] else { panic!("{told:?}") };
        assert!(told.starts_with("app: failed: ") && told.contains(why), "{told}");
        let log = the_log(&builds, &bench).await;
        assert!(log.lines().last().unwrap().starts_with("== failed: ") && log.contains(why), "{log}");
        assert!(error.next_step().unwrap().contains("clawpot image log build-"), "{error:?}");
        check_empty(&house, &bench);
    }
    let house = House::new().await;
    let (builds, bench) = workshop(&house, Does::Builds).await;
    let error = ended(&builds, Build { builder: "builder".parse().unwrap(), ..wanted() }).await.1.unwrap_err();
    assert!(error.next_step().unwrap().contains("setup-builder.sh"), "{}", error.chain());
    check_empty(&house, &bench);
}

/// The VM of a build that runs; it has the two disks and reaches nobody.
async fn in_its_vm(house: &House, progress: &mut BoxStream<Result<BuildProgress>>) -> VmId {
    while let Some(one) = progress.next().await {
        if let BuildProgress::Log(_) = one.unwrap() {
            break;
        }
    }
    let rows = house.service().records().rows_after(None);
    let [(id, Row::Known { record, .. })] = &rows[..] else { panic!("{rows:?}") };
    assert!(record.is_servers() && record.remove_when_done && record.ttl.is_some());
    assert_eq!(record.spec.reach, Reach::None);
    let disks: Vec<_> = record.spec.extra_disks.iter().map(|disk| (&disk.source, disk.read_only)).collect();
    let [(DiskSource::File(output), false), (DiskSource::File(source), true)] = &disks[..] else { panic!("{disks:?}") };
    assert!(output.ends_with("output") && source.ends_with("source"));
    id.clone()
}

#[tokio::test(start_paused = true)]
async fn one_that_nobody_waits_for_ends_and_so_does_one_whose_vm_is_deleted() {
    let house = House::new().await;
    let (builds, bench) = workshop(&house, Does::NeverEnds).await;
    let mut progress = begin(&builds, wanted());
    let vm = in_its_vm(&house, &mut progress).await;
    drop(progress);
    house.until(&vm, None).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    check_empty(&house, &bench);

    let mut progress = begin(&builds, wanted());
    let vm = in_its_vm(&house, &mut progress).await;
    house.delete(&vm).await;
    while let Some(one) = progress.next().await {
        if let Err(error) = one {
            assert!(error.chain().contains("its VM ended"), "{}", error.chain());
        }
    }
    check_empty(&house, &bench);
}

/// One user who never sends what was announced does not keep everybody else from building.
#[tokio::test(start_paused = true)]
async fn builds_of_one_user_leave_places_to_others() {
    let house = House::with_slots(16).await;
    let (builds, bench) = workshop(&house, Does::Builds).await;
    let silent = || builds.build(wanted(), Box::pin(futures_util::stream::pending()), "uid=1000");
    let mut held: Vec<_> = std::iter::repeat_with(silent).take(6).collect();
    tokio::time::sleep(Duration::from_secs(60)).await;
    let mut more = silent();
    let refused = more.next().await.unwrap().unwrap_err();
    assert_eq!(refused.kind(), Kind::Exhausted);
    assert!(refused.chain().contains("of uid=1000"), "{}", refused.chain());
    ended(&builds, wanted()).await.1.unwrap();
    held.truncate(5);
    tokio::time::sleep(Duration::from_secs(1)).await;
    let mut again = silent();
    assert!(matches!(again.next().await, Some(Ok(BuildProgress::Step(_)))));
    drop((held, again));
    tokio::time::sleep(Duration::from_secs(1)).await;
    check_empty(&house, &bench);
}

/// Its end may take days, until somebody has looked after it: neither the client nor the builds after it wait so long.
#[tokio::test(start_paused = true)]
async fn one_whose_vm_cannot_be_proven_to_be_its_own_ends() {
    let house = House::new().await;
    let (builds, bench) = workshop(&house, Does::NeverEnds).await;
    let mut progress = begin(&builds, wanted());
    let vm = in_its_vm(&house, &mut progress).await;
    house.faults.always(Method::VmmStop, Injection::Error(Kind::Internal));
    house.service().delete(vm.as_str(), false, "uid=0").await.unwrap();
    tokio::time::sleep(Duration::from_secs(5)).await;
    house.host.intrude(&vm, true);
    let waiting = async {
        loop {
            if let Some(Err(error)) = progress.next().await {
                return error;
            }
        }
    };
    let error = tokio::time::timeout(Duration::from_secs(600), waiting).await.expect("it waits for ever");
    assert!(error.cleanup().is_some_and(|failed| failed.chain().contains("it is quarantined")), "{}", error.chain());
    house.faults.heal(Method::VmmStop);
    house.host.intruders_leave();
    house.until(&vm, None).await;
    // Its files: as the next server finds them.
    builds.clear_up().await;
    check_empty(&house, &bench);
}

/// Nobody can say what is there of the VM: it is kept, and the others are looked after all the same.
#[tokio::test(start_paused = true)]
async fn one_vm_that_stays_keeps_no_other_from_being_removed() {
    let mut house = House::new().await;
    let (builds, bench) = workshop(&house, Does::NeverEnds).await;
    let mut progress = begin(&builds, wanted());
    in_its_vm(&house, &mut progress).await;
    house.restart().await;
    house.faults.always(Method::VmmInspect, Injection::Error(Kind::Internal));
    let next = Builds::new(house.service().clone(), bench.clone(), Arc::new(Nix(Does::Builds)));
    tokio::time::timeout(Duration::from_secs(3600), next.clear_up()).await.expect("it waits for ever");
    assert_eq!(bench.files.lock().unwrap().len(), 1, "who knows who writes to them");
    house.faults.heal(Method::VmmInspect);
    tokio::time::sleep(Duration::from_secs(10)).await;
    next.clear_up().await;
    check_empty(&house, &bench);
}

#[tokio::test(start_paused = true)]
async fn the_next_server_removes_what_a_dead_one_was_building() {
    let mut house = House::new().await;
    let (builds, bench) = workshop(&house, Does::NeverEnds).await;
    let mut progress = begin(&builds, wanted());
    let vm = in_its_vm(&house, &mut progress).await;
    let other = house.running("web").await;
    house.restart().await;
    assert_eq!(bench.files.lock().unwrap().len(), 1);
    // As it comes up it knows none of them to be running.
    let next = Builds::new(house.service().clone(), bench.clone(), Arc::new(Nix(Does::Builds)));
    next.clear_up().await;
    assert!(house.phase(&vm).is_none() && house.phase(&other).is_some(), "a VM that somebody wants stays");
    assert!(bench.files.lock().unwrap().is_empty());
    house.delete(&other).await;
    check_empty(&house, &bench);
}
