//! The host and its server.

use clawpot_common::v1::Host;
use serde::Serialize;

use super::known;
use crate::output::{table, time};

/// The host as `-o json` shows it.
#[derive(Debug, Serialize)]
pub struct HostView {
    pub version: String,
    pub instance: String,
    /// "qemu" or "firecracker".
    pub vmm: Option<String>,
    pub vmm_version: Option<String>,
    /// Why this VMM was chosen.
    pub vmm_reason: Option<String>,
    pub started_at: Option<String>,
    pub capacity: CapacityView,
}

#[derive(Debug, Serialize)]
pub struct CapacityView {
    pub cpus: u32,
    pub memory_mib: u64,
    pub memory_available_mib: u64,
    pub disk_mib: u64,
    pub disk_free_mib: u64,
    pub slots: u32,
    pub slots_used: u32,
    pub vms: u32,
}

impl From<&Host> for HostView {
    fn from(host: &Host) -> Self {
        let capacity = host.capacity.unwrap_or_default();
        Self {
            version: host.version.clone(),
            instance: host.instance.clone(),
            vmm: known(&host.vmm),
            vmm_version: known(&host.vmm_version),
            vmm_reason: known(&host.vmm_reason),
            started_at: host.started_at.as_ref().map(time::rfc3339),
            capacity: CapacityView {
                cpus: capacity.cpus,
                memory_mib: capacity.memory_mib,
                memory_available_mib: capacity.memory_available_mib,
                disk_mib: capacity.disk_mib,
                disk_free_mib: capacity.disk_free_mib,
                slots: capacity.slots,
                slots_used: capacity.slots_used,
                vms: capacity.vms,
            },
        }
    }
}

/// `host`.
pub fn detail(view: &HostView) -> String {
    let capacity = &view.capacity;
    let unknown = || "-".to_owned();
    let vmm = view.vmm.as_ref().map(|vmm| format!("{vmm} {}", view.vmm_version.as_deref().unwrap_or_default()));
    let pairs = [
        ("Server", format!("{}, instance {}", view.version, view.instance)),
        ("Started", view.started_at.clone().unwrap_or_else(unknown)),
        ("VMM", vmm.unwrap_or_else(unknown)),
        ("Because", view.vmm_reason.clone().unwrap_or_else(unknown)),
        ("CPUs", capacity.cpus.to_string()),
        ("Memory", format!("{} MiB, {} MiB available", capacity.memory_mib, capacity.memory_available_mib)),
        ("Disk", format!("{} MiB, {} MiB free", capacity.disk_mib, capacity.disk_free_mib)),
        ("Slots", format!("{}, {} used", capacity.slots, capacity.slots_used)),
        ("VMs", capacity.vms.to_string()),
    ];
    table::pairs(pairs.map(|(key, value)| (key.to_owned(), value)))
}
