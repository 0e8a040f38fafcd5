//! A daemon's control over a host that is not there. It can be killed and started again; host and store stay.

#![allow(dead_code, clippy::unwrap_used, reason = "each test binary uses a part of it; a test fails by panicking")]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use clawpot_control::records::{name_key, slot_key, vm_key};
use clawpot_control::service::create::CreateVm;
use clawpot_control::{Deps, Row, Service, Settings, Vmms, start};
use clawpot_core::exec::{ExecEnd, ExecInput, ExecOutput, ExecStart};
use clawpot_core::ports::{Op, StateStore as _, Txn, Vmm};
use clawpot_core::{Phase, RestartPolicy, VmRecord, VmmKind};
use clawpot_testkit::{
    FakeClock, FakeConsole, FakeGuest, FakeHost, FakeIds, FakeImages, FakeNet, FakeRoom, FakeStore, FakeVmm,
    FakeVolumes, Faults, samples,
};
use clawpot_types::{Error, ExecId, Millis, Result, VmId};
use futures_util::StreamExt as _;

/// Longer than any limit of a plan; virtual.
const PATIENCE: Duration = Duration::from_secs(600);

pub struct House {
    pub faults: Arc<Faults>,
    pub host: Arc<FakeHost>,
    pub store: Arc<FakeStore>,
    clock: Arc<FakeClock>,
    ids: Arc<FakeIds>,
    service: Option<Service>,
}

impl House {
    pub async fn new() -> Self {
        Self::with_slots(8).await
    }

    pub async fn with_slots(slots: u32) -> Self {
        let faults = Faults::new();
        let mut house = Self {
            host: FakeHost::new(Arc::clone(&faults), slots),
            store: FakeStore::new(&faults),
            clock: Arc::new(FakeClock::following_tokio()),
            ids: Arc::new(FakeIds::seeded(1)),
            faults,
            service: None,
        };
        house.restart().await;
        house
    }

    /// `kill -9` and a new daemon on the same host and store.
    pub async fn restart(&mut self) {
        self.try_restart().await.unwrap_or_else(|error| panic!("it does not start: {}", error.chain()));
    }

    pub async fn try_restart(&mut self) -> Result<()> {
        self.faults.kill_daemon();
        self.service = None;
        self.store = self.store.reopen(&self.faults);
        self.service = Some(start(self.deps()).await?);
        Ok(())
    }

    fn deps(&self) -> Deps {
        let vmm: Arc<dyn Vmm> = Arc::new(FakeVmm::new(&self.host));
        Deps {
            store: self.store.clone(),
            events: self.store.clone(),
            images: Arc::new(FakeImages::new(&self.host)),
            volumes: FakeVolumes::new(&self.host),
            net: Arc::new(FakeNet::new(&self.host)),
            vmms: Vmms::new(VmmKind::Qemu, [vmm]).unwrap(),
            console: Arc::new(FakeConsole::new(&self.host)),
            guest: Arc::new(FakeGuest::new(&self.host)),
            clock: self.clock.clone(),
            ids: self.ids.clone(),
            room: Arc::new(FakeRoom::new(&self.host)),
            boot_id: self.host.boot_id(),
            settings: Settings::default(),
        }
    }

    pub fn service(&self) -> &Service {
        self.service.as_ref().expect("the daemon is down")
    }

    pub async fn create(&self, name: &str) -> VmId {
        self.try_create(name, &wanted(name)).await.unwrap_or_else(|error| panic!("{}", error.chain()))
    }

    pub async fn try_create(&self, request_id: &str, body: &CreateVm) -> Result<VmId> {
        self.service().create(request_id, body.clone(), "uid=0").await.map(|(_, record)| record.id.clone())
    }

    pub fn phase(&self, id: &VmId) -> Option<Phase> {
        self.service().records().get(id).map(|row| row.phase())
    }

    pub fn record(&self, id: &VmId) -> Arc<VmRecord> {
        match self.service().records().get(id) {
            Some(Row::Known { record, .. }) => record,
            other => panic!("{other:?}"),
        }
    }

    /// When the VM is in `phase`; `None`: gone.
    pub async fn until(&self, id: &VmId, phase: Option<Phase>) {
        self.until_one_of(id, &[phase]).await;
    }

    pub async fn until_one_of(&self, id: &VmId, phases: &[Option<Phase>]) -> Option<Phase> {
        let reached = async {
            loop {
                let phase = self.phase(id);
                if phases.contains(&phase) {
                    return phase;
                }
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        tokio::time::timeout(PATIENCE, reached).await.unwrap_or_else(|_| {
            panic!(
                "it does not become {phases:?}: {:?}; left: {:?}",
                self.service().records().get(id),
                self.host.left_behind()
            )
        })
    }

    pub async fn running(&self, name: &str) -> VmId {
        let id = self.create(name).await;
        self.until(&id, Some(Phase::Running)).await;
        id
    }

    pub async fn stop(&self, id: &VmId) {
        self.service().stop(id.as_str(), Millis(0), "uid=0").await.unwrap();
        self.until(id, Some(Phase::Stopped)).await;
    }

    pub async fn start(&self, id: &VmId) {
        self.service().start(id.as_str(), "uid=0").await.unwrap();
        self.until(id, Some(Phase::Running)).await;
    }

    pub async fn delete(&self, id: &VmId) {
        self.service().delete(id.as_str(), false, "uid=0").await.unwrap();
        self.until(id, None).await;
    }

    /// As in a store that is older than the VM: what there is of it is on the host.
    pub async fn forget(&self, id: &VmId) {
        let record = self.record(id);
        let keys = [vm_key(id), name_key(&record.name), slot_key(record.slot)];
        let ops = keys.into_iter().map(|key| Op::Delete { key }).collect();
        self.store.txn(Txn { ops, ..Txn::default() }).await.unwrap();
    }

    /// Runs a program of the fake guest to its end.
    pub async fn exec(&self, id: &VmId, words: &[&str]) -> Result<(ExecEnd, String)> {
        let (first, rest) = program(words);
        let mut output = self.service().exec(id.as_str(), first, rest, "uid=0").await?;
        let mut text = String::new();
        while let Some(frame) = output.next().await {
            match frame? {
                ExecOutput::Stdout { data, .. } => text.push_str(&String::from_utf8_lossy(&data)),
                ExecOutput::Exited(exited) => return Ok((exited.end, text)),
                ExecOutput::Failed { message, .. } => panic!("{message}"),
                _ => {}
            }
        }
        panic!("the exec has no end")
    }

    /// Nothing of any VM is left: not on the host, not in the store, and no port was used against its contract.
    pub fn check_empty(&self) {
        assert_eq!(self.host.left_behind(), Vec::<String>::new());
        self.check_contracts();
        let kept: Vec<String> = self.store.keys().into_iter().filter(|key| !key.starts_with("requests/")).collect();
        assert_eq!(kept, Vec::<String>::new());
    }

    pub fn check_contracts(&self) {
        assert_eq!(self.host.violations(), Vec::<String>::new());
    }
}

pub fn wanted(name: &str) -> CreateVm {
    CreateVm {
        name: Some(name.parse().unwrap()),
        labels: BTreeMap::new(),
        spec: samples::spec(),
        remove_when_done: false,
        ttl: None,
        restart: RestartPolicy::Never,
    }
}

pub type Input = clawpot_core::ports::BoxStream<ExecInput>;

pub fn exec_id(words: &[&str]) -> ExecId {
    let mut bytes = [7; ExecId::LEN];
    for (byte, from) in bytes.iter_mut().zip(words.concat().bytes()) {
        *byte = from;
    }
    ExecId::from_random(bytes)
}

pub fn program(words: &[&str]) -> (ExecInput, Input) {
    let start = ExecStart {
        id: exec_id(words),
        argv: words.iter().map(|word| word.as_bytes().to_vec().into()).collect(),
        env: Vec::new(),
        cwd: String::new(),
        user: String::new(),
        timeout: Millis(0),
        stdin: false,
        tty: None,
    };
    // The caller has nothing to say and stays.
    (ExecInput::Start(start), futures_util::stream::pending().boxed())
}

/// The error's kind, for comparing.
pub fn refused<T: std::fmt::Debug>(result: Result<T>) -> Error {
    result.expect_err("it should be refused")
}
