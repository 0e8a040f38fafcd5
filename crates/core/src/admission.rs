//! May this VM be taken in? Budgets of memory, disk, vCPUs and slots, and a watermark under the host's free disk.
//!
//! - A VM holds its disk, what else the server gives it to write on (a build's result) and its slot from create to gone, memory and vCPUs while it may have a machine: [`Claim::of`].
//! - What may be held in all follows from what the host has and how much of it may be promised: [`Policy`].
//! - To the memory that its guest is given comes what its VMM needs itself: [`Footprint`].
//! - Disks are sparse: their sum is a promise, the watermark is about what is really there. Below it nothing is created or
//!   started, so that what guests write cannot take the room that records and logs need.
//!
//! A VM whose record cannot be read holds its slot; what else it holds nobody can say.

use std::fmt;

use clawpot_types::{Error, Kind, MiB, Vcpus};

use crate::{Desired, DiskSource, ExtraDisk, Phase, VmRecord, VmSpec};

/// How much of what the host has may be promised to VMs, in percent; over 100 is overcommitment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    pub memory_percent: u32,
    pub disk_percent: u32,
    pub vcpu_percent: u32,
    /// Free space of the state directory's filesystem under which nothing is created or started, percent; 0: no such limit.
    pub low_disk_percent: u32,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            // A tenth is the host's own: kernel, server, page cache.
            memory_percent: 90,
            // Sparse: an image's VM writes a small part of its disk, as a rule.
            disk_percent: 400,
            // Idle guests cost next to nothing, and busy ones share by weight.
            vcpu_percent: 1600,
            low_disk_percent: 10,
        }
    }
}

/// What the host has, and what of it is free now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    pub cpus: u32,
    pub memory: MiB,
    pub memory_available: MiB,
    /// Of the state directory's filesystem.
    pub disk: MiB,
    pub disk_free: MiB,
}

/// Memory that a VMM takes beside its guest's, as a rule: what was measured, of a guest at work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Footprint {
    pub memory: MiB,
    pub memory_per_vcpu: MiB,
}

impl Footprint {
    /// A fake's, that takes nothing.
    pub const NONE: Self = Self { memory: MiB(0), memory_per_vcpu: MiB(0) };

    #[must_use]
    pub fn of(self, vcpus: Vcpus) -> MiB {
        let per_vcpu = self.memory_per_vcpu.0.saturating_mul(vcpus.get().into());
        MiB(self.memory.0.saturating_add(per_vcpu))
    }
}

/// What VMs hold, or one would.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Claim {
    /// Of guests and their VMMs.
    pub memory: u64,
    /// Of it, the VMMs'.
    pub vmm_memory: u64,
    pub disk: u64,
    pub vcpus: u64,
    pub slots: u64,
}

impl Claim {
    /// Of a VM that runs, or is to.
    #[must_use]
    pub fn whole(spec: &VmSpec, vmm: Footprint) -> Self {
        let MiB(vmm_memory) = vmm.of(spec.vcpus);
        let memory = spec.memory.0.saturating_add(vmm_memory);
        Self { memory, vmm_memory, vcpus: spec.vcpus.get().into(), ..Self::at_rest(spec) }
    }

    /// Of a VM that has no machine.
    #[must_use]
    pub fn at_rest(spec: &VmSpec) -> Self {
        let written = |disk: &&ExtraDisk| !disk.read_only && matches!(disk.source, DiskSource::File(_));
        let disks = 1 + spec.extra_disks.iter().filter(written).count();
        let disk = spec.disk.0.saturating_mul(u64::try_from(disks).unwrap_or(u64::MAX));
        Self { disk, slots: 1, ..Self::default() }
    }

    /// Of a VM as it is.
    #[must_use]
    pub fn of(record: &VmRecord, vmm: Footprint) -> Self {
        if may_have_machine(record) { Self::whole(&record.spec, vmm) } else { Self::at_rest(&record.spec) }
    }

    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self {
            memory: self.memory.saturating_add(other.memory),
            vmm_memory: self.vmm_memory.saturating_add(other.vmm_memory),
            disk: self.disk.saturating_add(other.disk),
            vcpus: self.vcpus.saturating_add(other.vcpus),
            slots: self.slots.saturating_add(other.slots),
        }
    }
}

/// Whether the VM has a machine, or gets one without anybody asking again.
#[must_use]
pub fn may_have_machine(record: &VmRecord) -> bool {
    match record.phase {
        Phase::Stopped => record.desired == Desired::Running,
        Phase::Failed => {
            record.desired == Desired::Running && (record.asked_since_failure() || record.restart.at.is_some())
        }
        _ => true,
    }
}

/// One resource: what may be held of it, and what is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    pub limit: u64,
    pub used: u64,
}

impl Budget {
    #[must_use]
    pub const fn free(self) -> u64 {
        self.limit.saturating_sub(self.used)
    }
}

/// All of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budgets {
    pub memory: Budget,
    /// Of the memory used, the VMMs'.
    pub vmm_memory: u64,
    pub disk: Budget,
    pub vcpus: Budget,
    pub slots: Budget,
    /// Free space under which nothing is created or started, MiB.
    pub low_disk: u64,
    /// Free space now, MiB.
    pub disk_free: u64,
}

impl Budgets {
    /// `slots`: how many there are.
    #[must_use]
    pub fn new(policy: &Policy, room: &Room, slots: u32, held: Claim) -> Self {
        Self {
            memory: Budget { limit: percent(room.memory.0, policy.memory_percent), used: held.memory },
            vmm_memory: held.vmm_memory,
            disk: Budget { limit: percent(room.disk.0, policy.disk_percent), used: held.disk },
            vcpus: Budget { limit: percent(room.cpus.into(), policy.vcpu_percent), used: held.vcpus },
            slots: Budget { limit: slots.into(), used: held.slots },
            low_disk: percent(room.disk.0, policy.low_disk_percent),
            disk_free: room.disk_free.0,
        }
    }

    /// Whether `asked` fits beside what is held. The first resource that is short is told.
    pub fn admit(&self, asked: Claim) -> Result<(), Short> {
        if self.disk_free < self.low_disk {
            let (asked, of) = (self.low_disk, self.watermark());
            return Err(Short { resource: Resource::FreeDisk, asked, vmm_memory: 0, of });
        }
        let all = [
            (Resource::Memory, asked.memory, self.memory),
            (Resource::Vcpus, asked.vcpus, self.vcpus),
            (Resource::Disk, asked.disk, self.disk),
            (Resource::Slots, asked.slots, self.slots),
        ];
        // What asks for none of it is not kept out by others' having too much.
        match all.into_iter().find(|(_, asked, of)| *asked > 0 && *asked > of.free()) {
            Some((resource, needs, of)) => Err(Short { resource, asked: needs, vmm_memory: asked.vmm_memory, of }),
            None => Ok(()),
        }
    }

    const fn watermark(&self) -> Budget {
        Budget { limit: self.disk_free, used: 0 }
    }
}

fn percent(whole: u64, percent: u32) -> u64 {
    u64::try_from(u128::from(whole) * u128::from(percent) / 100).unwrap_or(u64::MAX)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Resource {
    Memory,
    Vcpus,
    Disk,
    Slots,
    /// Really free space, under the watermark.
    FreeDisk,
}

/// What there is too little of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Short {
    pub resource: Resource,
    pub asked: u64,
    /// Of the memory asked, the VMM's.
    pub vmm_memory: u64,
    pub of: Budget,
}

impl fmt::Display for Short {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { asked, vmm_memory, of, .. } = self;
        let (free, limit) = (of.free(), of.limit);
        match self.resource {
            Resource::Memory => {
                let guest = asked.saturating_sub(*vmm_memory);
                let parts = match vmm_memory {
                    0 => String::new(),
                    _ => format!(" ({guest} for the guest, {vmm_memory} for its VMM)"),
                };
                write!(f, "memory: {asked} MiB asked{parts}, {free} MiB free of {limit} MiB for VMs")
            }
            Resource::Vcpus => write!(f, "vCPUs: {asked} asked, {free} free of {limit} for VMs"),
            Resource::Disk => write!(f, "disk: {asked} MiB asked, {free} MiB free of {limit} MiB for VMs"),
            Resource::Slots => write!(f, "slots: all {limit} network slots of this server are taken"),
            Resource::FreeDisk => {
                write!(
                    f,
                    "disk: {limit} MiB are free on the state directory's filesystem, under the watermark of {asked} MiB"
                )
            }
        }
    }
}

impl Short {
    const fn hint(&self) -> &'static str {
        match self.resource {
            Resource::Memory => {
                "stop or delete VMs (`clawpot ls`), ask for less, or let the server promise more: its setting memory_percent"
            }
            Resource::Vcpus => {
                "stop or delete VMs (`clawpot ls`), ask for less, or let the server promise more: its setting vcpu_percent"
            }
            Resource::Disk => {
                "delete VMs (`clawpot ls`), ask for less, or let the server promise more: its setting disk_percent"
            }
            Resource::Slots => "delete VMs that are not needed: `clawpot ls`, `clawpot rm`",
            Resource::FreeDisk => {
                "free some space there, delete VMs (`clawpot rm`), or lower the watermark: the server's setting low_disk_percent"
            }
        }
    }

    /// `doing`: "create", "VM web: start".
    #[must_use]
    pub fn error(&self, doing: &str) -> Error {
        Error::new(Kind::Exhausted, format!("{doing}: {self}")).hint(self.hint())
    }
}
