//! Everything control is given, by the composition root or by a test.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use clawpot_core::admission::{Footprint, Policy};
use clawpot_core::plan::Limits;
use clawpot_core::ports::{Clock, Console, EventLog, Guest, HostRoom, Ids, Images, Net, StateStore, Vmm, Volumes};
use clawpot_core::{VmRecord, VmmKind};
use clawpot_types::{Error, Kind, MiB, Millis, Result, Vcpus};

#[derive(Clone)]
pub struct Deps {
    pub store: Arc<dyn StateStore>,
    pub events: Arc<dyn EventLog>,
    pub images: Arc<dyn Images>,
    pub volumes: Arc<dyn Volumes>,
    pub net: Arc<dyn Net>,
    pub vmms: Vmms,
    pub console: Arc<dyn Console>,
    pub guest: Arc<dyn Guest>,
    pub clock: Arc<dyn Clock>,
    pub ids: Arc<dyn Ids>,
    pub room: Arc<dyn HostRoom>,
    /// `/proc/sys/kernel/random/boot_id`.
    pub boot_id: String,
    pub settings: Settings,
}

impl std::fmt::Debug for Deps {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Deps").field("boot_id", &self.boot_id).field("settings", &self.settings).finish_non_exhaustive()
    }
}

/// The VMMs of this host: new VMs get the default; each living one stays with its own.
#[derive(Clone)]
pub struct Vmms {
    default: VmmKind,
    all: BTreeMap<VmmKind, Arc<dyn Vmm>>,
}

impl Vmms {
    /// `default` must be among `all`.
    pub fn new(default: VmmKind, all: impl IntoIterator<Item = Arc<dyn Vmm>>) -> Result<Self> {
        let all: BTreeMap<_, _> = all.into_iter().map(|vmm| (vmm.capabilities().kind, vmm)).collect();
        if all.contains_key(&default) {
            return Ok(Self { default, all });
        }
        Err(Error::new(Kind::Unsupported, format!("VMM {default}: no driver for it")))
    }

    #[must_use]
    pub fn default(&self) -> &Arc<dyn Vmm> {
        // Checked in `new`; the map is never changed.
        &self.all[&self.default]
    }

    pub fn get(&self, kind: VmmKind) -> Result<&Arc<dyn Vmm>> {
        self.all.get(&kind).ok_or_else(|| {
            Error::new(Kind::Unsupported, format!("VMM {kind}: this server cannot run it"))
                .hint(format!("start the server where {kind} is installed, or delete the VM"))
        })
    }

    /// What the VMM that runs the VM, or will, takes beside the guest's memory. One that this server does not have is taken
    /// for the default.
    #[must_use]
    pub fn footprint(&self, record: &VmRecord) -> Footprint {
        let own = record.vmm.as_ref().and_then(|choice| self.all.get(&choice.kind));
        own.unwrap_or_else(|| self.default()).capabilities().footprint
    }

    pub fn iter(&self) -> impl Iterator<Item = &Arc<dyn Vmm>> {
        self.all.values()
    }
}

impl std::fmt::Debug for Vmms {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Vmms").field("default", &self.default).finish_non_exhaustive()
    }
}

/// What an operator may set.
#[derive(Clone, Debug)]
pub struct Settings {
    pub limits: Limits,
    pub admission: Policy,
    pub default_vcpus: Vcpus,
    pub default_memory: MiB,
    pub default_disk: MiB,
    pub stop_grace: Millis,
    /// Slots kept ready ahead of demand.
    pub warm_slots: usize,
    /// How long a `request_id` is remembered, beyond the VM's deletion.
    pub request_memory: Duration,
    /// How long what bears this instance's name and has no record is left alone after the server's start.
    pub stray_grace: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            limits: Limits::default(),
            admission: Policy::default(),
            // In range by construction; 1 is.
            default_vcpus: Vcpus::ONE,
            default_memory: MiB(256),
            default_disk: MiB(4096),
            stop_grace: Millis(10_000),
            warm_slots: 4,
            request_memory: Duration::from_secs(24 * 3600),
            stray_grace: Duration::from_secs(30),
        }
    }
}
