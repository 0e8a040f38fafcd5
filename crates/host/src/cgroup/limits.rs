//! What a group may use. Each controller is taken where the host has it: version 2, else version 1 under the same name.

use std::io;
use std::path::Path;

use clawpot_types::{Error, Kind, Result};

use super::mounts::Cgroups;

/// `None`: no limit is set, and no controller is needed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Of memory, bytes.
    pub memory: Option<u64>,
    /// Processes and threads.
    pub pids: Option<u32>,
    /// Thousandths of one CPU: 1500 is one and a half.
    pub cpu: Option<u32>,
}

/// Period of the CPU limit, microseconds: the kernel's default in both versions.
const CPU_PERIOD_US: u64 = 100_000;

pub(super) fn apply(hosts: &Cgroups, name: &str, limits: &Limits) -> Result<()> {
    let quota = |thousandths: u32| u64::from(thousandths) * CPU_PERIOD_US / 1000;
    let wanted = [
        limits.memory.map(|bytes| Limit::new("memory", "memory.max", "memory.limit_in_bytes", bytes)),
        limits.pids.map(|count| Limit::new("pids", "pids.max", "pids.max", count.into())),
        limits.cpu.map(|cpu| Limit::new("cpu", "cpu.max", "cpu.cfs_quota_us", quota(cpu))),
    ];
    wanted.iter().flatten().try_for_each(|limit| limit.set(hosts, name))
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

    fn set(&self, hosts: &Cgroups, name: &str) -> Result<()> {
        let failed = |error| Error::io(format!("setting {} to {}", self.v2_file, self.value), error);
        if let Some((_, mount)) = hosts.v1().iter().find(|(controller, _)| controller == self.controller) {
            let group = mount.join(name);
            std::fs::create_dir_all(&group).map_err(failed)?;
            return put(&group.join(self.v1_file), &self.value).map_err(failed);
        }
        let offered = std::fs::read_to_string(hosts.root().join("cgroup.controllers")).map_err(failed)?;
        if !offered.split_whitespace().any(|controller| controller == self.controller) {
            let what = format!("setting {}: this host has no cgroup controller {}", self.v2_file, self.controller);
            return Err(Error::new(Kind::Unsupported, what));
        }
        // A controller reaches a group when every group above hands it down.
        let mut above = hosts.root().to_owned();
        for part in name.split('/') {
            put(&above.join("cgroup.subtree_control"), &format!("+{}", self.controller)).map_err(failed)?;
            above.push(part);
        }
        put(&above.join(self.v2_file), &self.value).map_err(failed)
    }
}

/// The kernel's files take one write as one command.
fn put(path: &Path, value: &str) -> io::Result<()> {
    io::Write::write_all(&mut std::fs::OpenOptions::new().write(true).open(path)?, value.as_bytes())
}
