//! A volume.

use std::time::SystemTime;

use clawpot_common::v1::{Volume, VolumeUse};
use clawpot_types::MiB;
use serde::Serialize;

use super::known;
use crate::output::{table, time};

/// A volume as `-o json` shows it.
#[derive(Debug, Serialize)]
pub struct VolumeView {
    pub name: String,
    pub id: String,
    pub size_mib: u64,
    /// On the host's disk.
    pub used_bytes: u64,
    /// "ready", "making", "copying", "growing", "checking", "removing", "lost", "unreadable".
    pub state: String,
    /// Why its record cannot be read.
    pub problem: Option<String>,
    /// It is checked before a machine gets it again.
    pub unclean: bool,
    pub created_at: Option<String>,
    pub created_by: Option<String>,
    pub used_by: Vec<UseView>,
}

#[derive(Debug, Serialize)]
pub struct UseView {
    pub vm: String,
    pub vm_id: String,
    pub path: Option<String>,
    pub read_only: bool,
}

impl From<&VolumeUse> for UseView {
    fn from(one: &VolumeUse) -> Self {
        Self { vm: one.vm_name.clone(), vm_id: one.vm_id.clone(), path: known(&one.path), read_only: one.read_only }
    }
}

impl From<&Volume> for VolumeView {
    fn from(volume: &Volume) -> Self {
        Self {
            name: volume.name.clone(),
            id: volume.id.clone(),
            size_mib: volume.size_mib,
            used_bytes: volume.used_bytes,
            state: volume.state.clone(),
            problem: known(&volume.problem),
            unclean: volume.unclean,
            created_at: volume.created_at.as_ref().map(time::rfc3339),
            created_by: known(&volume.created_by),
            used_by: volume.used_by.iter().map(UseView::from).collect(),
        }
    }
}

impl UseView {
    fn told(&self) -> String {
        let mode = if self.read_only { " (ro)" } else { "" };
        format!("{}:{}{mode}", self.vm, self.path.as_deref().unwrap_or("-"))
    }
}

/// `volume ls`.
pub fn list(volumes: &[Volume], now: SystemTime) -> String {
    let rows = volumes.iter().map(|volume| {
        let users: Vec<String> = volume.used_by.iter().map(|one| UseView::from(one).told()).collect();
        let size = |size: MiB| if volume.problem.is_empty() { size.to_string() } else { "-".to_owned() };
        [
            volume.name.clone(),
            size(MiB(volume.size_mib)),
            size(MiB::from_bytes(volume.used_bytes)),
            state(volume),
            if users.is_empty() { "-".to_owned() } else { users.join(",") },
            time::age_of(volume.created_at.as_ref(), now),
        ]
    });
    table::rows(["NAME", "SIZE", "USED", "STATE", "VMS", "AGE"], rows)
}

/// That it is going to be checked matters where no VM is writing to it.
fn state(volume: &Volume) -> String {
    let written = volume.used_by.iter().any(|one| !one.read_only);
    if volume.unclean && !written && volume.state == "ready" { "unclean".to_owned() } else { volume.state.clone() }
}

/// `volume inspect`.
pub fn detail(view: &VolumeView) -> String {
    let or = |text: &Option<String>| text.clone().unwrap_or_else(|| "-".to_owned());
    let checked = match (view.unclean, view.used_by.iter().any(|one| !one.read_only)) {
        (false, _) => "clean",
        (true, true) => "may be written to: checked at the next start, unless it is unmounted in order",
        (true, false) => "not in order: checked before a VM gets it, or now: clawpot volume check",
    };
    let pairs = [
        ("Name", view.name.clone()),
        ("Id", view.id.clone()),
        ("Size", format!("{}, {} on the host", MiB(view.size_mib), MiB::from_bytes(view.used_bytes))),
        ("State", view.state.clone()),
        ("Content", checked.to_owned()),
        ("Created", format!("{} by {}", or(&view.created_at), or(&view.created_by))),
    ];
    let users = view.used_by.iter().map(|one| ("VM".to_owned(), one.told()));
    table::pairs(pairs.into_iter().map(|(key, value)| (key.to_owned(), value)).chain(users))
}
