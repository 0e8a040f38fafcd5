//! `clawpot.v1.VmService`.

use clawpot_common::v1;
use clawpot_common::v1::vm_service_server::VmService;
use clawpot_control::{Service, Settings};
use clawpot_core::ports::BoxStream;
use futures_util::StreamExt as _;
use tonic::{Request, Response, Status, Streaming};

use super::access::actor;
use super::status::status;
use super::{convert, exec, validate};

#[derive(Debug)]
pub struct VmApi {
    pub service: Service,
}

impl VmApi {
    /// The server's defaults, with those of the image in front. An image that cannot be described is told by the create itself.
    async fn settings_for(&self, request: &v1::CreateVmRequest) -> Settings {
        let mut settings = self.service.deps().settings.clone();
        let Some(Ok(image)) = request.spec.as_ref().map(|spec| spec.image.parse()) else { return settings };
        if let Ok(detail) = self.service.deps().images.describe(&image).await {
            settings.default_vcpus = detail.machine.vcpus.unwrap_or(settings.default_vcpus);
            settings.default_memory = detail.machine.memory.unwrap_or(settings.default_memory);
            settings.default_disk = detail.machine.disk.unwrap_or(settings.default_disk);
        }
        settings
    }
}

type Answer<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl VmService for VmApi {
    type WatchVmsStream = BoxStream<Result<v1::VmChange, Status>>;
    type ExecStream = BoxStream<Result<v1::ExecOutput, Status>>;
    type GetConsoleStream = BoxStream<Result<v1::ConsoleChunk, Status>>;

    async fn create_vm(&self, request: Request<v1::CreateVmRequest>) -> Answer<v1::Vm> {
        let actor = actor(&request);
        let request = request.into_inner();
        let request_id = request.request_id.clone();
        let settings = self.settings_for(&request).await;
        let body = validate::create(request, &settings).map_err(status)?;
        let (revision, record) = self.service.create(&request_id, body, &actor).await.map_err(status)?;
        Ok(Response::new(convert::known(revision, &record)))
    }

    async fn get_vm(&self, request: Request<v1::GetVmRequest>) -> Answer<v1::Vm> {
        let (id, row) = self.service.get(&request.into_inner().vm).map_err(status)?;
        Ok(Response::new(convert::vm(&id, &row)))
    }

    async fn list_vms(&self, request: Request<v1::ListVmsRequest>) -> Answer<v1::ListVmsResponse> {
        let request = request.into_inner();
        let labels = validate::labels(request.labels).map_err(status)?;
        let size = usize::try_from(request.page_size).unwrap_or(usize::MAX);
        let page = self.service.list(&labels, size, &request.page_token).map_err(status)?;
        let vms = page.rows.iter().map(|(id, row)| convert::vm(id, row)).collect();
        Ok(Response::new(v1::ListVmsResponse { vms, next_page_token: page.next }))
    }

    async fn watch_vms(&self, request: Request<v1::WatchVmsRequest>) -> Answer<Self::WatchVmsStream> {
        let request = request.into_inner();
        let labels = validate::labels(request.labels).map_err(status)?;
        let only = match request.vm.as_str() {
            "" => None,
            vm => Some(self.service.records().find(vm).map_err(status)?),
        };
        let changes = self.service.watch(only, labels).map(|changed| {
            let changed = changed.map_err(status)?;
            let vm = match (&changed.row, &changed.last) {
                (Some(row), _) => convert::vm(&changed.id, row),
                (None, Some(last)) => convert::known(changed.revision, last),
                (None, None) => v1::Vm { id: changed.id.to_string(), ..Default::default() },
            };
            Ok(v1::VmChange { vm: Some(vm), deleted: changed.row.is_none() })
        });
        Ok(Response::new(Box::pin(changes)))
    }

    async fn start_vm(&self, request: Request<v1::StartVmRequest>) -> Answer<v1::Vm> {
        let actor = actor(&request);
        let (revision, record) = self.service.start(&request.into_inner().vm, &actor).await.map_err(status)?;
        Ok(Response::new(convert::known(revision, &record)))
    }

    async fn stop_vm(&self, request: Request<v1::StopVmRequest>) -> Answer<v1::Vm> {
        let actor = actor(&request);
        let request = request.into_inner();
        let grace = convert::grace(request.grace_ms);
        let (revision, record) = self.service.stop(&request.vm, grace, &actor).await.map_err(status)?;
        Ok(Response::new(convert::known(revision, &record)))
    }

    async fn set_ttl(&self, request: Request<v1::SetTtlRequest>) -> Answer<v1::Vm> {
        let actor = actor(&request);
        let request = request.into_inner();
        let ttl = convert::ttl(request.ttl_ms);
        let (revision, record) = self.service.keep(&request.vm, ttl, &actor).await.map_err(status)?;
        Ok(Response::new(convert::known(revision, &record)))
    }

    async fn delete_vm(&self, request: Request<v1::DeleteVmRequest>) -> Answer<v1::DeleteVmResponse> {
        let actor = actor(&request);
        let request = request.into_inner();
        let id = self.service.delete(&request.vm, request.force, &actor).await.map_err(status)?;
        Ok(Response::new(v1::DeleteVmResponse { id: id.to_string() }))
    }

    async fn exec(&self, request: Request<Streaming<v1::ExecInput>>) -> Answer<Self::ExecStream> {
        let actor = actor(&request);
        let mut frames = request.into_inner();
        let opening = exec::opening(frames.message().await?).map_err(status)?;
        let (rest, refusal) = exec::rest(frames);
        let output = self.service.exec(&opening.vm, opening.first, rest, &actor).await.map_err(status)?;
        Ok(Response::new(exec::answers(output, refusal)))
    }

    async fn get_console(&self, request: Request<v1::GetConsoleRequest>) -> Answer<Self::GetConsoleStream> {
        let request = request.into_inner();
        let lines = usize::try_from(request.tail_lines).unwrap_or(usize::MAX);
        let chunks = self.service.console(&request.vm, lines, request.follow).await.map_err(status)?;
        Ok(Response::new(Box::pin(chunks.map(|chunk| Ok(v1::ConsoleChunk { data: chunk.map_err(status)? })))))
    }
}
