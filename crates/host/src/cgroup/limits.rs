//! What a group may use. Each controller is taken where the host has it: version 2, else version 1 under the same name.

use std::io;
use std::path::{Path, PathBuf};

use clawpot_types::{Error, Kind, Result};

use super::mounts::Cgroups;

/// `None`: no limit is set, and no controller is needed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Of memory, bytes. The page cache of what its processes read and write counts too, and is given up under it. None of
    /// it is swapped, where the kernel lets a group say so: what a guest has in memory is not to be found on a disk.
    pub memory: Option<u64>,
    /// Processes and threads.
    pub pids: Option<u32>,
    /// Thousandths of one CPU: 1500 is one and a half.
    pub cpu: Option<u32>,
}

/// A controller that this host cannot limit by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Missing {
    pub controller: &'static str,
    pub why: &'static str,
}

/// Period of the CPU limit, microseconds: the kernel's default in both versions.
const CPU_PERIOD_US: u64 = 100_000;

impl Limits {
    /// What is left of them on a host that lacks these controllers.
    #[must_use]
    pub fn without(mut self, missing: &[Missing]) -> Self {
        for missing in missing {
            match missing.controller {
                "memory" => self.memory = None,
                "pids" => self.pids = None,
                _ => self.cpu = None,
            }
        }
        self
    }
}

/// `Unsupported`: a controller that is not there; `NotFound`: someone removed a group meanwhile.
pub(super) fn apply(hosts: &Cgroups, name: &str, limits: &Limits) -> Result<()> {
    let quota = |thousandths: u32| u64::from(thousandths) * CPU_PERIOD_US / 1000;
    if let Some(bytes) = limits.memory {
        memory(hosts, name, bytes)?;
    }
    let wanted = [
        limits.pids.map(|count| Limit::new("pids", "pids.max", "pids.max", count.into())),
        limits.cpu.map(|cpu| Limit::new("cpu", "cpu.max", "cpu.cfs_quota_us", quota(cpu))),
    ];
    wanted.iter().flatten().try_for_each(|limit| limit.set(hosts, name).map(drop))
}

/// Memory and no swap. In version 1 the limit of both together may never be below that of memory alone, so that it is
/// lifted first: a group of an earlier attempt may have another.
fn memory(hosts: &Cgroups, name: &str, bytes: u64) -> Result<()> {
    if let Some((_, mount)) = hosts.v1().iter().find(|(controller, _)| controller == "memory") {
        offer(&mount.join(name).join(SWAP_TOO), "-1")?;
    }
    let group = Limit::new("memory", "memory.max", "memory.limit_in_bytes", bytes).set(hosts, name)?;
    for (file, value) in [("memory.swap.max", "0"), ("memory.swappiness", "0"), (SWAP_TOO, &bytes.to_string())] {
        offer(&group.join(file), value)?;
    }
    Ok(())
}

/// Version 1's limit of memory and swap together.
const SWAP_TOO: &str = "memory.memsw.limit_in_bytes";

/// For what not every kernel has.
fn offer(path: &Path, value: &str) -> Result<()> {
    match put(path, value) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        done => done.map_err(|error| Error::io(format!("setting {} to {value}", path.display()), error)),
    }
}

struct Limit {
    controller: &'static str,
    v2_file: &'static str,
    v1_file: &'static str,
    value: String,
}

impl Limit {
    fn new(controller: &'static str, v2_file: &'static str, v1_file: &'static str, value: u64) -> Self {
        Self { controller, v2_file, v1_file, value: value.to_string() }
    }

    /// The group's directory in the controller's hierarchy.
    fn set(&self, hosts: &Cgroups, name: &str) -> Result<PathBuf> {
        let failed = |error| Error::io(format!("setting {} to {}", self.v2_file, self.value), error);
        if let Some((_, mount)) = hosts.v1().iter().find(|(controller, _)| controller == self.controller) {
            let group = mount.join(name);
            std::fs::create_dir_all(&group).map_err(failed)?;
            put(&group.join(self.v1_file), &self.value).map_err(failed)?;
            return Ok(group);
        }
        if let Some(Missing { why, .. }) = hosts.lacks(self.controller).map_err(failed)? {
            return Err(Error::new(Kind::Unsupported, format!("setting {}: {why}", self.v2_file)));
        }
        // A controller reaches a group when every group above hands it down.
        let mut above = hosts.root().to_owned();
        for part in name.split('/') {
            hand_down(&above.join("cgroup.subtree_control"), self.controller).map_err(failed)?;
            above.push(part);
        }
        put(&above.join(self.v2_file), &self.value).map_err(failed)?;
        Ok(above)
    }
}

/// Only where it is not: the first time the kernel goes through every group below.
fn hand_down(path: &Path, controller: &str) -> io::Result<()> {
    if names(path, controller)? { Ok(()) } else { put(path, &format!("+{controller}")) }
}

/// Whether a file that lists controllers has this one.
pub(super) fn names(path: &Path, controller: &str) -> io::Result<bool> {
    Ok(std::fs::read_to_string(path)?.split_whitespace().any(|name| name == controller))
}

/// The kernel's files take one write as one command.
pub(super) fn put(path: &Path, value: &str) -> io::Result<()> {
    io::Write::write_all(&mut std::fs::OpenOptions::new().write(true).open(path)?, value.as_bytes())
}
