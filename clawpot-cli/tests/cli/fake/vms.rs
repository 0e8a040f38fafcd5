//! VMs by image: "debian" boots, "slow" stays in BOOTING, "broken" fails, "unknown" is none.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use clawpot_common::v1::vm_service_server::VmService;
use clawpot_common::v1::*;
use tokio::sync::{mpsc, watch};
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::Service;
use super::guest::Guest;

pub type Answer<T> = Result<Response<T>, Status>;
pub type Frames<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

pub struct State {
    pub vms: Mutex<BTreeMap<String, Vm>>,
    pub creates: Mutex<Vec<CreateVmRequest>>,
    pub deletes: Mutex<Vec<DeleteVmRequest>>,
    pub stops: Mutex<Vec<StopVmRequest>>,
    /// The first create is carried out, but its answer is lost.
    pub lose_create: Mutex<bool>,
    pub console: Mutex<Vec<u8>>,
    pub events: Mutex<Vec<Event>>,
    pub guest: Guest,
    /// Counts changes; watchers look again.
    changed: watch::Sender<u64>,
}

impl Default for State {
    fn default() -> Self {
        Self {
            vms: Mutex::default(),
            creates: Mutex::default(),
            deletes: Mutex::default(),
            stops: Mutex::default(),
            lose_create: Mutex::default(),
            console: Mutex::default(),
            events: Mutex::default(),
            guest: Guest::default(),
            changed: watch::channel(0).0,
        }
    }
}

impl State {
    pub fn add_running(&self, name: &str) {
        self.put(vm(name, "debian"));
    }

    pub fn put(&self, vm: Vm) {
        self.vms.lock().unwrap().insert(vm.id.clone(), vm);
        self.touch();
    }

    /// Tells every watcher to look again.
    pub fn touch(&self) {
        self.changed.send_modify(|count| *count += 1);
    }

    pub fn watch(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// Whether somebody waits for a change.
    pub fn is_watched(&self) -> bool {
        self.changed.receiver_count() > 0
    }

    pub fn find(&self, given: &str) -> Result<Vm, Status> {
        let vms = self.vms.lock().unwrap();
        let found = vms.values().find(|vm| vm.name == given || vm.id.starts_with(given)).cloned();
        found.ok_or_else(|| Status::not_found(format!("VM {given:?}: not found")))
    }

    pub fn set_phase(&self, id: &str, phase: Phase) {
        if let Some(vm) = self.vms.lock().unwrap().get_mut(id) {
            vm.phase = phase.into();
            vm.revision += 1;
            vm.phase_changed_at = Some(SystemTime::now().into());
            if phase == Phase::Failed {
                vm.failure = Some(broken());
            }
        }
        self.touch();
    }

    fn remove(&self, id: &str) {
        self.vms.lock().unwrap().remove(id);
        self.touch();
    }
}

/// A VM that runs; its id follows from its name.
pub fn vm(name: &str, image: &str) -> Vm {
    let ago = |seconds| Some((SystemTime::now() - Duration::from_secs(seconds)).into());
    let took = |name: &str, us: i32| PhaseTiming {
        name: name.into(),
        duration: Some(prost_types::Duration { seconds: 0, nanos: us * 1_000 }),
    };
    Vm {
        id: format!("{name:0<16}").replace('-', "0"),
        name: name.into(),
        labels: [("team".to_owned(), "red".to_owned())].into(),
        revision: 41,
        generation: 2,
        incarnation: 1,
        phase: Phase::Running.into(),
        desired: Desired::Running.into(),
        spec: Some(VmSpec { image: image.into(), vcpus: 2, memory_mib: 512, disk_mib: 4096, ..Default::default() }),
        created_at: ago(3 * 3_600 + 60),
        phase_changed_at: ago(185),
        timings: vec![took("preparing", 12_400), took("booting", 401_000), took("booting.kernel", 310_900)],
        image_digest: super::rest::OF_VMS.into(),
        vmm: "qemu".into(),
        vmm_version: "7.2.22".into(),
        address: "10.201.0.7".into(),
        ..Default::default()
    }
}

pub fn broken() -> Failure {
    Failure {
        during: Phase::Booting.into(),
        message: "the guest did not say hello within 60 s".into(),
        hint: "look at the console: `clawpot logs broken`".into(),
        retryable: true,
        cleanup: String::new(),
        console_tail: vec![
            "[    0.512] Kernel panic - not syncing: No working init found.".into(),
            "\x1b[2Jpwned".into(),
        ],
    }
}

#[tonic::async_trait]
impl VmService for Service {
    type WatchVmsStream = Frames<VmChange>;
    type ExecStream = Frames<ExecOutput>;
    type GetConsoleStream = Frames<ConsoleChunk>;

    async fn create_vm(&self, request: Request<CreateVmRequest>) -> Answer<Vm> {
        let request = request.into_inner();
        let spec = request.spec.clone().unwrap_or_default();
        self.0.creates.lock().unwrap().push(request.clone());
        if spec.image == "unknown" {
            let mut status = Status::not_found("image \"unknown\": creating a VM of it\nno image has this name");
            status.metadata_mut().insert("clawpot-hint", "`clawpot image ls` lists the images".parse().unwrap());
            return Err(status);
        }
        if spec.image == "never" {
            return std::future::pending().await;
        }
        let name = if request.name.is_empty() { "brave-otter".to_owned() } else { request.name };
        let mut vm = vm(&name, &spec.image);
        vm.phase = Phase::Accepted.into();
        vm.remove_when_done = request.remove_when_done;
        let known = self.0.vms.lock().unwrap().contains_key(&vm.id);
        if !known {
            self.0.put(vm.clone());
            tokio::spawn(boot(self.0.clone(), vm.id.clone(), spec.image));
        }
        if std::mem::take(&mut *self.0.lose_create.lock().unwrap()) {
            return Err(Status::unavailable("the server is going down"));
        }
        Ok(Response::new(vm))
    }

    async fn get_vm(&self, request: Request<GetVmRequest>) -> Answer<Vm> {
        self.0.find(&request.into_inner().vm).map(Response::new)
    }

    async fn list_vms(&self, request: Request<ListVmsRequest>) -> Answer<ListVmsResponse> {
        let request = request.into_inner();
        let matches = |vm: &&Vm| request.labels.iter().all(|(key, value)| vm.labels.get(key) == Some(value));
        let all: Vec<Vm> = self.0.vms.lock().unwrap().values().filter(matches).cloned().collect();
        // So small that every listing pages.
        let page = all.len() / 2 + 1;
        let from: usize = request.page_token.parse().unwrap_or(0);
        let next_page_token = if from + page < all.len() { (from + page).to_string() } else { String::new() };
        Ok(Response::new(ListVmsResponse { vms: all.into_iter().skip(from).take(page).collect(), next_page_token }))
    }

    async fn watch_vms(&self, request: Request<WatchVmsRequest>) -> Answer<Self::WatchVmsStream> {
        let id = self.0.find(&request.into_inner().vm)?.id;
        let (tx, rx) = mpsc::channel(4);
        tokio::spawn(watch_one(self.0.clone(), id, tx));
        Ok(Response::new(Box::pin(ReceiverStream::new(rx))))
    }

    async fn start_vm(&self, request: Request<StartVmRequest>) -> Answer<Vm> {
        let vm = self.0.find(&request.into_inner().vm)?;
        let image = vm.spec.clone().unwrap_or_default().image;
        tokio::spawn(boot(self.0.clone(), vm.id.clone(), image));
        Ok(Response::new(vm))
    }

    async fn stop_vm(&self, request: Request<StopVmRequest>) -> Answer<Vm> {
        let request = request.into_inner();
        let vm = self.0.find(&request.vm)?;
        self.0.stops.lock().unwrap().push(request);
        let (state, id) = (self.0.clone(), vm.id.clone());
        tokio::spawn(async move {
            for phase in [Phase::Stopping, Phase::Stopped] {
                tokio::time::sleep(Duration::from_millis(20)).await;
                state.set_phase(&id, phase);
            }
        });
        Ok(Response::new(vm))
    }

    async fn delete_vm(&self, request: Request<DeleteVmRequest>) -> Answer<DeleteVmResponse> {
        let request = request.into_inner();
        let vm = self.0.find(&request.vm)?;
        self.0.deletes.lock().unwrap().push(request);
        self.0.set_phase(&vm.id, Phase::Deleting);
        let (state, id) = (self.0.clone(), vm.id.clone());
        tokio::spawn(async move {
            tokio::time::sleep(Duration::from_millis(20)).await;
            state.remove(&id);
        });
        Ok(Response::new(DeleteVmResponse { id: vm.id }))
    }

    async fn set_ttl(&self, request: Request<SetTtlRequest>) -> Answer<Vm> {
        let request = request.into_inner();
        let mut vm = self.0.find(&request.vm)?;
        vm.ttl_ms = request.ttl_ms;
        self.0.put(vm.clone());
        Ok(Response::new(vm))
    }

    async fn exec(&self, request: Request<Streaming<ExecInput>>) -> Answer<Self::ExecStream> {
        super::exec::attach(self.0.clone(), request.into_inner()).await
    }

    async fn get_console(&self, request: Request<GetConsoleRequest>) -> Answer<Self::GetConsoleStream> {
        let request = request.into_inner();
        self.0.find(&request.vm)?;
        let (tx, rx) = mpsc::channel(4);
        tokio::spawn(console(self.0.clone(), request, tx));
        Ok(Response::new(Box::pin(ReceiverStream::new(rx))))
    }
}

async fn boot(state: Arc<State>, id: String, image: String) {
    let way: &[Phase] = match image.as_str() {
        "slow" => &[Phase::Preparing, Phase::Booting],
        "broken" => &[Phase::Preparing, Phase::Booting, Phase::Failed],
        _ => &[Phase::Preparing, Phase::Booting, Phase::Running],
    };
    for phase in way {
        tokio::time::sleep(Duration::from_millis(20)).await;
        state.set_phase(&id, *phase);
    }
}

async fn watch_one(state: Arc<State>, id: String, tx: mpsc::Sender<Result<VmChange, Status>>) {
    let mut changed = state.watch();
    let mut last = Vm::default();
    loop {
        changed.borrow_and_update();
        let now = state.vms.lock().unwrap().get(&id).cloned();
        let deleted = now.is_none();
        last = now.unwrap_or(last);
        if tx.send(Ok(VmChange { vm: Some(last.clone()), deleted })).await.is_err() || deleted {
            return;
        }
        if changed.changed().await.is_err() {
            return;
        }
    }
}

async fn console(state: Arc<State>, request: GetConsoleRequest, tx: mpsc::Sender<Result<ConsoleChunk, Status>>) {
    let mut changed = state.watch();
    let mut at = 0;
    let lines = usize::try_from(request.tail_lines).unwrap();
    if lines > 0 {
        let text = state.console.lock().unwrap().clone();
        let starts: Vec<usize> = (0..text.len()).filter(|i| *i == 0 || text[i - 1] == b'\n').collect();
        at = starts[starts.len().saturating_sub(lines)];
    }
    loop {
        changed.borrow_and_update();
        let data = state.console.lock().unwrap()[at..].to_vec();
        at += data.len();
        if tx.send(Ok(ConsoleChunk { data: data.into() })).await.is_err() || !request.follow {
            return;
        }
        if changed.changed().await.is_err() {
            return;
        }
    }
}
