//! How long a server takes to adopt its VMs: from the opening of the real store to the last guest's hello, over a host that is
//! not there, whose answers take no time. Prints JSON: milliseconds, one for each of five restarts.
//!
//! `cargo run --release -p clawpot-control --example adoption [-- VMS]`

// A bench says what went wrong by panicking.
#![allow(clippy::unwrap_used, reason = "not production code")]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clawpot_control::service::create::CreateVm;
use clawpot_control::{Deps, Service, Settings, Vmms, start};
use clawpot_core::ports::Vmm;
use clawpot_core::{Phase, RestartPolicy, VmmKind};
use clawpot_store::{Options, SqliteStore, StateLock};
use clawpot_testkit::{
    Boot, FakeClock, FakeConsole, FakeGuest, FakeHost, FakeIds, FakeImages, FakeNet, FakeRoom, FakeVmm, FakeVolumes,
    Faults, Method, samples,
};

const VMS: usize = 500;
const RESTARTS: usize = 5;

#[tokio::main(worker_threads = 2)]
async fn main() {
    let vms = std::env::args().nth(1).map_or(VMS, |count| count.parse().unwrap());
    let home = tempfile::tempdir().unwrap();
    let lock = StateLock::acquire(&home.path().join("state")).unwrap();
    let faults = Faults::new();
    let host = FakeHost::new(faults, 1023);
    host.set_boot(Boot::ReadyAfter(Duration::ZERO));
    let service = start(deps(&host, &lock)).await.unwrap();
    create(&service, vms).await;
    service.leave().await;
    drop(service);
    let mut times = Vec::new();
    for _ in 0..RESTARTS {
        host.faults.kill_daemon();
        let before = host.faults.count(Method::GuestHello);
        let begun = Instant::now();
        let service = start(deps(&host, &lock)).await.unwrap();
        while host.faults.count(Method::GuestHello) < before + vms {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        times.push(begun.elapsed().as_secs_f64() * 1000.0);
        assert_eq!((host.living().len(), host.violations()), (vms, Vec::new()));
        service.leave().await;
    }
    println!("{times:?}");
}

/// Of a daemon that begins now.
fn deps(host: &Arc<FakeHost>, lock: &StateLock) -> Deps {
    let store = Arc::new(SqliteStore::open(lock, Options::default()).unwrap());
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
        clock: Arc::new(FakeClock::following_tokio()),
        ids: Arc::new(FakeIds::seeded(1)),
        room: Arc::new(FakeRoom::new(host)),
        boot_id: host.boot_id(),
        settings: Settings::default(),
    }
}

async fn create(service: &Service, vms: usize) {
    for number in 0..vms {
        let body = CreateVm {
            name: Some(format!("vm-{number}").parse().unwrap()),
            labels: BTreeMap::new(),
            spec: samples::spec(),
            remove_when_done: false,
            ttl: None,
            restart: RestartPolicy::Never,
        };
        let (_, record) = service.create("", body, "uid=0").await.unwrap();
        while service.records().get(&record.id).map(|row| row.phase()) != Some(Phase::Running) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}
