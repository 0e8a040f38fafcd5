//! `clawpot.v1.HostService` and `ImageService`.

use std::path::PathBuf;

use clawpot_common::v1;
use clawpot_common::v1::host_service_server::HostService;
use clawpot_common::v1::image_service_server::ImageService;
use clawpot_control::Service;
use clawpot_types::{Error, InstanceId, Kind, MiB, Timestamp};
use tonic::{Request, Response, Status};
use tracing::warn;

use super::convert;
use super::status::status;

#[derive(Debug)]
pub struct HostApi {
    pub service: Service,
    pub about: About,
}

/// What does not change while the server runs.
#[derive(Clone, Debug)]
pub struct About {
    pub instance: InstanceId,
    pub state_dir: PathBuf,
    /// Why this VMM was chosen.
    pub vmm_reason: String,
    pub started_at: Timestamp,
}

#[tonic::async_trait]
impl HostService for HostApi {
    async fn get_host(&self, _: Request<v1::GetHostRequest>) -> Result<Response<v1::Host>, Status> {
        let vmm = self.service.deps().vmms.default().capabilities();
        Ok(Response::new(v1::Host {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            instance: self.about.instance.to_string(),
            vmm: vmm.kind.to_string(),
            vmm_version: vmm.version,
            vmm_reason: self.about.vmm_reason.clone(),
            capacity: Some(self.capacity().map_err(status)?),
            started_at: Some(convert::timestamp(self.about.started_at)),
        }))
    }
}

impl HostApi {
    fn capacity(&self) -> Result<v1::Capacity, Error> {
        let (memory, available) = memory()?;
        let disk = rustix::fs::statvfs(&self.about.state_dir).map_err(|error| {
            Error::io(format!("{}: asking for its free space", self.about.state_dir.display()), error.into())
        })?;
        let records = self.service.records();
        Ok(v1::Capacity {
            cpus: convert::count(std::thread::available_parallelism().map_or(1, std::num::NonZero::get))?,
            memory_mib: memory.0,
            memory_available_mib: available.0,
            disk_mib: MiB::from_bytes(disk.f_blocks.saturating_mul(disk.f_frsize)).0,
            disk_free_mib: MiB::from_bytes(disk.f_bavail.saturating_mul(disk.f_frsize)).0,
            slots: self.service.deps().net.slots(),
            slots_used: convert::count(records.slots_taken().len())?,
            vms: convert::count(records.count())?,
        })
    }
}

/// All memory and what may still be had of it (`MemAvailable`), from `/proc/meminfo`, in kB there.
fn memory() -> Result<(MiB, MiB), Error> {
    let text = std::fs::read_to_string("/proc/meminfo").map_err(|error| Error::io("reading /proc/meminfo", error))?;
    let field = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim_start_matches(':').split_whitespace().next()?.parse().ok().map(|kib: u64| MiB(kib >> 10))
    };
    field("MemTotal")
        .zip(field("MemAvailable"))
        .ok_or_else(|| Error::new(Kind::Internal, "/proc/meminfo: MemTotal or MemAvailable is missing"))
}

#[derive(Debug)]
pub struct ImageApi {
    pub service: Service,
}

#[tonic::async_trait]
impl ImageService for ImageApi {
    async fn list_images(&self, _: Request<v1::ListImagesRequest>) -> Result<Response<v1::ListImagesResponse>, Status> {
        let (good, bad) = self.service.deps().images.list().await.map_err(status)?;
        for image in bad {
            warn!(image = image.name, error = image.error.chain(), "an image cannot be read");
        }
        let image = |image: clawpot_core::ports::ImageInfo| v1::Image {
            name: image.name,
            digest: image.digest.to_string(),
            size_bytes: image.size_bytes,
            created_at: Some(convert::timestamp(image.created_at)),
            format: image.format,
        };
        Ok(Response::new(v1::ListImagesResponse { images: good.into_iter().map(image).collect() }))
    }
}
