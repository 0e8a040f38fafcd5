//! The host and its server.

use clawpot_common::v1::{Budget, Host};
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
    /// What may be promised to VMs, and what is.
    pub budgets: BudgetsView,
}

#[derive(Debug, Serialize)]
pub struct BudgetsView {
    pub memory_mib: BudgetView,
    pub disk_mib: BudgetView,
    pub vcpus: BudgetView,
    pub slots: BudgetView,
    /// Free space under which nothing is created or started.
    pub low_disk_mib: u64,
    /// Of the memory used, what VMMs take beside their guests'.
    pub vmm_memory_mib: u64,
    /// What the VMM of one more VM takes, with one vCPU; and for each further one.
    pub vmm_memory_each_mib: u64,
    pub vmm_memory_vcpu_mib: u64,
}

#[derive(Debug, Serialize)]
pub struct BudgetView {
    pub limit: u64,
    pub used: u64,
    pub free: u64,
}

impl From<Option<Budget>> for BudgetView {
    fn from(budget: Option<Budget>) -> Self {
        let Budget { limit, used, free } = budget.unwrap_or_default();
        Self { limit, used, free }
    }
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
        let budgets = host.budgets.unwrap_or_default();
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
            budgets: BudgetsView {
                memory_mib: budgets.memory_mib.into(),
                disk_mib: budgets.disk_mib.into(),
                vcpus: budgets.vcpus.into(),
                slots: budgets.slots.into(),
                low_disk_mib: budgets.low_disk_mib,
                vmm_memory_mib: budgets.vmm_memory_mib,
                vmm_memory_each_mib: budgets.vmm_memory_each_mib,
                vmm_memory_vcpu_mib: budgets.vmm_memory_vcpu_mib,
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
        ("VMs", capacity.vms.to_string()),
    ];
    let pairs = table::pairs(pairs.map(|(key, value)| (key.to_owned(), value)));
    let budgets = &view.budgets;
    let row = |name: &str, unit: &str, of: &BudgetView| {
        [name.to_owned(), format!("{}{unit}", of.limit), format!("{}{unit}", of.used), format!("{}{unit}", of.free)]
    };
    let rows = [
        row("memory", " MiB", &budgets.memory_mib),
        row("vcpus", "", &budgets.vcpus),
        row("disk", " MiB", &budgets.disk_mib),
        row("slots", "", &budgets.slots),
    ];
    let low = format!("nothing is created or started with less than {} MiB of disk really free", budgets.low_disk_mib);
    let vmm = format!(
        "memory used includes {} MiB that VMMs take themselves: {} MiB each, and {} for each further vCPU",
        budgets.vmm_memory_mib, budgets.vmm_memory_each_mib, budgets.vmm_memory_vcpu_mib
    );
    format!("{pairs}\n\n{}\n{vmm}\n{low}", table::rows(["FOR VMS", "LIMIT", "USED", "FREE"], rows))
}
