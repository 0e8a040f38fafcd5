//! `clawpot.v1.VolumeService`.

use clawpot_common::v1;
use clawpot_common::v1::volume_service_server::VolumeService;
use clawpot_control::Service;
use clawpot_control::service::volume::VolumeView;
use clawpot_core::ports::{Check, Copied};
use clawpot_core::volume::VolumeState;
use clawpot_types::{Error, Kind, MiB, Result, VolumeName};
use tonic::{Request, Response, Status};

use super::access::actor;
use super::convert;
use super::status::status;

#[derive(Debug)]
pub struct VolumeApi {
    pub service: Service,
}

type Answer<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl VolumeService for VolumeApi {
    async fn list_volumes(&self, _: Request<v1::ListVolumesRequest>) -> Answer<v1::ListVolumesResponse> {
        let (good, bad) = self.service.list_volumes().await.map_err(status)?;
        let mut volumes: Vec<v1::Volume> = good.into_iter().map(volume).collect();
        volumes.extend(bad.into_iter().map(|(key, error)| unreadable(&key, &error)));
        volumes.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(Response::new(v1::ListVolumesResponse { volumes }))
    }

    async fn get_volume(&self, request: Request<v1::GetVolumeRequest>) -> Answer<v1::Volume> {
        let name = name("name", &request.into_inner().name).map_err(status)?;
        Ok(Response::new(volume(self.service.get_volume(&name).await.map_err(status)?)))
    }

    async fn create_volume(&self, request: Request<v1::CreateVolumeRequest>) -> Answer<v1::Volume> {
        let actor = actor(&request);
        let v1::CreateVolumeRequest { name: asked, size_mib } = request.into_inner();
        let asked = name("name", &asked).map_err(status)?;
        let size = size(size_mib).map_err(status)?;
        Ok(Response::new(volume(self.service.create_volume(asked, size, &actor).await.map_err(status)?)))
    }

    async fn copy_volume(&self, request: Request<v1::CopyVolumeRequest>) -> Answer<v1::CopyVolumeResponse> {
        let actor = actor(&request);
        let request = request.into_inner();
        let (from, to) = (name("from", &request.from).map_err(status)?, name("name", &request.name).map_err(status)?);
        let (made, copied) = self.service.copy_volume(from, to, &actor).await.map_err(status)?;
        let (how, copied_bytes) = match copied {
            Copied::Reflink => ("reflink", 0),
            Copied::Sparse { bytes } => ("sparse", bytes),
        };
        Ok(Response::new(v1::CopyVolumeResponse { volume: Some(volume(made)), how: how.to_owned(), copied_bytes }))
    }

    async fn resize_volume(&self, request: Request<v1::ResizeVolumeRequest>) -> Answer<v1::Volume> {
        let actor = actor(&request);
        let v1::ResizeVolumeRequest { name: asked, size_mib } = request.into_inner();
        let asked = name("name", &asked).map_err(status)?;
        let size = size(size_mib).map_err(status)?;
        Ok(Response::new(volume(self.service.resize_volume(asked, size, &actor).await.map_err(status)?)))
    }

    async fn check_volume(&self, request: Request<v1::CheckVolumeRequest>) -> Answer<v1::CheckVolumeResponse> {
        let actor = actor(&request);
        let request = request.into_inner();
        let name = name("name", &request.name).map_err(status)?;
        let how = if request.repair { Check::Repair } else { Check::Whole };
        let (checked, outcome) = self.service.check_volume(name, how, &actor).await.map_err(status)?;
        Ok(Response::new(v1::CheckVolumeResponse { volume: Some(volume(checked)), outcome }))
    }

    async fn delete_volume(&self, request: Request<v1::DeleteVolumeRequest>) -> Answer<v1::DeleteVolumeResponse> {
        let actor = actor(&request);
        let v1::DeleteVolumeRequest { name: asked, force } = request.into_inner();
        let name = name("name", &asked).map_err(status)?;
        let gone = match force {
            true => self.service.delete_volume_by_force(name, &actor).await,
            false => self.service.delete_volume(name, &actor).await,
        };
        gone.map_err(status)?;
        Ok(Response::new(v1::DeleteVolumeResponse {}))
    }
}

fn name(field: &str, text: &str) -> Result<VolumeName> {
    text.parse().map_err(|error: Error| Error::new(Kind::InvalidArgument, format!("{field}: {}", error.chain())))
}

fn size(mib: u64) -> Result<MiB> {
    MiB::disk(mib).map_err(|error| Error::new(Kind::InvalidArgument, format!("size_mib: {}", error.chain())))
}

fn volume(view: VolumeView) -> v1::Volume {
    let VolumeView { record, file } = view;
    let state = match record.state {
        VolumeState::Ready if file.is_none() => "lost",
        VolumeState::Making => "making",
        VolumeState::Ready => "ready",
        VolumeState::Copying => "copying",
        VolumeState::Growing => "growing",
        VolumeState::Checking => "checking",
        VolumeState::Removing => "removing",
    };
    let used_by = record.attached.iter().map(|(vm, lease)| v1::VolumeUse {
        vm_id: vm.to_string(),
        vm_name: lease.vm.to_string(),
        path: lease.path.as_ref().map(ToString::to_string).unwrap_or_default(),
        read_only: lease.read_only,
    });
    v1::Volume {
        name: record.name.to_string(),
        id: record.id.to_string(),
        size_mib: record.size.0,
        used_bytes: file.map(|file| file.used_bytes).unwrap_or_default(),
        created_at: Some(convert::timestamp(record.created_at)),
        created_by: record.created_by.clone(),
        state: state.to_owned(),
        unclean: record.unclean,
        used_by: used_by.collect(),
        problem: String::new(),
    }
}

/// Shown, so that whoever looks for it finds it.
fn unreadable(key: &str, error: &Error) -> v1::Volume {
    v1::Volume {
        name: key.trim_start_matches("volumes/").to_owned(),
        state: "unreadable".to_owned(),
        problem: error.chain(),
        ..v1::Volume::default()
    }
}
