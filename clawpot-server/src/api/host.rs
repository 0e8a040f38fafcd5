//! `clawpot.v1.HostService`.

use clawpot_common::v1;
use clawpot_common::v1::host_service_server::HostService;
use clawpot_control::Service;
use clawpot_core::admission::Budget;
use clawpot_types::{Error, InstanceId, Timestamp, Vcpus};
use tonic::{Request, Response, Status};

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
    /// Why this VMM was chosen.
    pub vmm_reason: String,
    pub started_at: Timestamp,
}

#[tonic::async_trait]
impl HostService for HostApi {
    async fn get_host(&self, _: Request<v1::GetHostRequest>) -> Result<Response<v1::Host>, Status> {
        let vmm = self.service.deps().vmms.default().capabilities();
        let (capacity, budgets) = self.capacity().await.map_err(status)?;
        Ok(Response::new(v1::Host {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            instance: self.about.instance.to_string(),
            vmm: vmm.kind.to_string(),
            vmm_version: vmm.version,
            vmm_reason: self.about.vmm_reason.clone(),
            capacity: Some(capacity),
            budgets: Some(budgets),
            started_at: Some(convert::timestamp(self.about.started_at)),
        }))
    }
}

impl HostApi {
    async fn capacity(&self) -> Result<(v1::Capacity, v1::Budgets), Error> {
        let room = self.service.deps().room.look().await?;
        let budgets = self.service.budgets().await?;
        let footprint = self.service.deps().vmms.default().capabilities().footprint;
        let capacity = v1::Capacity {
            cpus: room.cpus,
            memory_mib: room.memory.0,
            memory_available_mib: room.memory_available.0,
            disk_mib: room.disk.0,
            disk_free_mib: room.disk_free.0,
            slots: self.service.deps().net.slots(),
            slots_used: convert::count(self.service.records().slots_taken().len())?,
            vms: convert::count(self.service.records().count())?,
        };
        let budget = |of: Budget| Some(v1::Budget { limit: of.limit, used: of.used, free: of.free() });
        let budgets = v1::Budgets {
            memory_mib: budget(budgets.memory),
            disk_mib: budget(budgets.disk),
            vcpus: budget(budgets.vcpus),
            slots: budget(budgets.slots),
            low_disk_mib: budgets.low_disk,
            vmm_memory_mib: budgets.vmm_memory,
            vmm_memory_each_mib: footprint.of(Vcpus::ONE).0,
            vmm_memory_vcpu_mib: footprint.memory_per_vcpu.0,
        };
        Ok((capacity, budgets))
    }
}
