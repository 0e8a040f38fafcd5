//! Creates and deletes on fakes with a durable store: what control and store cost, without VMM, network and guest.
//!
//! `cargo run --release -p clawpot-simulator --example burst [-- DIR [RESULTS.json]]`: the store is made in DIR, on whose filesystem it
//! depends; default: `target/burst`. Ends with an error when a target of SPECIFICATION.md is missed.

// A bench says what went wrong by panicking.
#![allow(clippy::unwrap_used, reason = "not production code")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use clawpot_control::service::create::CreateVm;
use clawpot_control::{Deps, Row, Service, Settings, Vmms, start};
use clawpot_core::ports::Vmm;
use clawpot_core::{Phase, RestartPolicy, VmmKind};
use clawpot_store::{Options, SqliteStore, StateLock};
use clawpot_testkit::{
    Boot, FakeClock, FakeConsole, FakeGuest, FakeHost, FakeIds, FakeImages, FakeNet, FakeRoom, FakeVmm, FakeVolumes,
    Faults, samples,
};
use clawpot_types::VmId;
use futures_util::StreamExt as _;
use futures_util::future::join_all;

/// VMs of a burst, and bursts.
const WIDE: usize = 50;
const BURSTS: usize = 10;
/// Clients of the sustained load, and how long it lasts.
const CLIENTS: u64 = 64;
const LASTS: Duration = Duration::from_secs(10);

/// SPECIFICATION.md.
const P99_MS: f64 = 100.0;
const PER_SECOND: f64 = 300.0;

/// Milliseconds of one VM of a burst.
#[derive(Clone, Copy, Debug)]
struct Life {
    answered: f64,
    running: f64,
    gone: f64,
}

fn main() {
    let mut given = std::env::args_os().skip(1);
    let dir = given.next().map_or_else(|| PathBuf::from("target/burst"), PathBuf::from);
    let results = given.next().map(PathBuf::from);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_time().build().unwrap();
    if dir.exists() {
        std::fs::remove_dir_all(&dir).unwrap();
    }
    let (bursts, pairs) = runtime.block_on(measure(&dir));
    drop(runtime);
    std::fs::remove_dir_all(&dir).unwrap();
    let column = |of: fn(&Life) -> f64| bursts.iter().map(of).collect::<Vec<f64>>();
    let rows = [
        ("create answered", column(|life| life.answered)),
        ("create to running", column(|life| life.running)),
        ("delete to gone", column(|life| life.gone)),
    ];
    println!("{WIDE}-wide bursts on fakes, durable store, guests that answer at once; ms");
    println!("{:<20} {:>8} {:>8} {:>8}", "", "p50", "p99", "max");
    let mut json = serde_json::Map::new();
    for (name, mut samples) in rows {
        samples.sort_by(f64::total_cmp);
        let at = |percent: usize| samples[(samples.len() * percent / 100).min(samples.len() - 1)];
        println!("{name:<20} {:>8.1} {:>8.1} {:>8.1}", at(50), at(99), at(100));
        let row = serde_json::json!({ "unit": "ms", "n": samples.len(), "p50": at(50), "p99": at(99), "max": at(100) });
        json.insert(name.to_owned(), row);
    }
    println!("sustained: {pairs:.0} creates and deletes per second, {CLIENTS} clients, {} s", LASTS.as_secs());
    let p99 = json["create to running"]["p99"].as_f64().unwrap();
    let met = p99 <= P99_MS && pairs >= PER_SECOND;
    json.insert("create and delete per second".to_owned(), pairs.into());
    json.insert("met".to_owned(), met.into());
    if let Some(path) = results {
        write(&path, &json);
    }
    assert!(met, "a target is missed: p99 {p99:.1} ms of {P99_MS}, {pairs:.0} per second of {PER_SECOND}");
}

#[expect(clippy::disallowed_methods, reason = "a bench's results: half a file is made anew")]
fn write(path: &Path, json: &serde_json::Map<String, serde_json::Value>) {
    std::fs::write(path, serde_json::to_string_pretty(json).unwrap() + "\n").unwrap();
}

async fn measure(dir: &Path) -> (Vec<Life>, f64) {
    let lock = StateLock::acquire(dir).unwrap();
    let store = Arc::new(SqliteStore::open(&lock, Options::default()).unwrap());
    let host = FakeHost::new(Faults::new(), 1023);
    host.set_boot(Boot::ReadyAfter(Duration::ZERO));
    let service = start(deps(&host, store)).await.unwrap();
    let mut lives = Vec::new();
    for burst in 0..BURSTS {
        let created = join_all((0..WIDE).map(|n| {
            let (service, request) = (service.clone(), format!("burst-{burst}-{n}"));
            tokio::spawn(async move { create(&service, &request).await })
        }))
        .await;
        let deleted = join_all(created.into_iter().map(|created| {
            let (service, (id, life)) = (service.clone(), created.unwrap());
            tokio::spawn(async move { Life { gone: delete(&service, &id).await, ..life } })
        }));
        lives.extend(deleted.await.into_iter().map(Result::unwrap));
    }
    let pairs = sustained(&service).await;
    assert_eq!(host.left_behind(), Vec::<String>::new());
    assert_eq!(host.violations(), Vec::<String>::new());
    service.leave().await;
    (lives, pairs)
}

async fn sustained(service: &Service) -> f64 {
    let done = Arc::new(AtomicU64::new(0));
    let begun = Instant::now();
    let clients = (0..CLIENTS).map(|client| {
        let (service, done) = (service.clone(), Arc::clone(&done));
        tokio::spawn(async move {
            for n in 0.. {
                if begun.elapsed() >= LASTS {
                    break;
                }
                let (id, _) = create(&service, &format!("sustained-{client}-{n}")).await;
                delete(&service, &id).await;
                done.fetch_add(1, Ordering::SeqCst);
            }
        })
    });
    join_all(clients).await.into_iter().for_each(|client| client.unwrap());
    f64::from(u32::try_from(done.load(Ordering::SeqCst)).unwrap()) / begun.elapsed().as_secs_f64()
}

async fn create(service: &Service, request: &str) -> (VmId, Life) {
    let body = CreateVm {
        name: Some(request.parse().unwrap()),
        labels: BTreeMap::new(),
        spec: samples::spec(),
        ttl: None,
        restart: RestartPolicy::Never,
        remove_when_done: false,
    };
    let begun = Instant::now();
    let (_, record) = service.create(request, body, "uid=0").await.unwrap();
    let answered = ms(begun);
    let mut changes = service.watch(Some(record.id.clone()), BTreeMap::new());
    loop {
        match changes.next().await.unwrap().unwrap().row {
            Some(Row::Known { record, .. }) if record.phase == Phase::Failed => panic!("{:?}", record.failure),
            Some(row) if row.phase() == Phase::Running => break,
            _ => {}
        }
    }
    (record.id.clone(), Life { answered, running: ms(begun), gone: 0.0 })
}

async fn delete(service: &Service, id: &VmId) -> f64 {
    let mut changes = service.watch(Some(id.clone()), BTreeMap::new());
    let begun = Instant::now();
    service.delete(id.as_str(), false, "uid=0").await.unwrap();
    while changes.next().await.unwrap().unwrap().row.is_some() {}
    ms(begun)
}

fn ms(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1000.0
}

fn deps(host: &Arc<FakeHost>, store: Arc<SqliteStore>) -> Deps {
    let vmm: Arc<dyn Vmm> = Arc::new(FakeVmm::new(host));
    Deps {
        store: store.clone(),
        events: store,
        images: Arc::new(FakeImages::new(host)),
        volumes: FakeVolumes::new(host),
        net: Arc::new(FakeNet::new(host)),
        vmms: Vmms::new(VmmKind::Qemu, [vmm]).unwrap(),
        console: Arc::new(FakeConsole::new(host)),
        guest: Arc::new(FakeGuest::new(host)),
        room: Arc::new(FakeRoom::new(host)),
        clock: Arc::new(FakeClock::following_tokio()),
        ids: Arc::new(FakeIds::seeded(1)),
        boot_id: host.boot_id(),
        settings: Settings::default(),
    }
}
