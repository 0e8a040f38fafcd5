//! A VM.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use clawpot_common::v1::exit::Reason;
use clawpot_common::v1::{Desired, EnvVar, Exit, Network, Phase, PhaseTiming, RestartPolicy, Vm, VmSpec, VolumeMount};
use serde::Serialize;

use super::{known, or_dash};
use crate::failure::Failure;
use crate::output::{table, time};

/// A VM as `-o json` shows it. Times are RFC 3339 in UTC, sizes are in the unit of their name.
#[derive(Debug, Serialize)]
pub struct VmView {
    pub id: String,
    pub name: String,
    pub labels: BTreeMap<String, String>,
    pub phase: String,
    /// "running", "stopped" or "deleted": what the owner wants.
    pub desired: String,
    /// Who said so last: "uid=1000", "server".
    pub desired_by: Option<String>,
    pub revision: u64,
    pub generation: u64,
    pub incarnation: u64,
    pub image: String,
    pub image_digest: Option<String>,
    pub vcpus: u32,
    pub memory_mib: u64,
    pub disk_mib: u64,
    /// Bytes that are not UTF-8 are shown as U+FFFD.
    pub env: BTreeMap<String, String>,
    pub cwd: Option<String>,
    pub user: Option<String>,
    /// "default" or "none".
    pub network: String,
    pub volumes: Vec<MountView>,
    pub address: Option<String>,
    pub vmm: Option<String>,
    pub vmm_version: Option<String>,
    pub remove_when_done: bool,
    pub created_at: Option<String>,
    pub phase_changed_at: Option<String>,
    /// The last boot, in order; a name with a dot is a step within the one before the dot.
    pub timings: Vec<TimingView>,
    pub failure: Option<FailureView>,
    /// How the last incarnation ended that did.
    pub last_exit: Option<ExitView>,
    pub restart: RestartView,
    /// From a create, start or keep-alive.
    pub ttl_ms: Option<u64>,
    /// When that is over.
    pub expires_at: Option<String>,
}

#[derive(Debug, Serialize)]
pub struct ExitView {
    /// "powered-off", "guest-panicked", "vmm-died", "host-rebooted", "boot-timeout", "failed", "stopped", "ttl-over", "deleted".
    pub reason: String,
    /// "uid=1000", "guest", "host" or "server".
    pub by: String,
    pub message: String,
    pub incarnation: u64,
    pub happened_at: Option<String>,
}

#[derive(Debug, Serialize)]
pub struct RestartView {
    /// "never", "on-failure" or "always".
    pub policy: String,
    /// Starts by policy since it was last well.
    pub attempts: u32,
    /// While a start by policy is waited for.
    pub due_at: Option<String>,
}

#[derive(Debug, Serialize)]
pub struct TimingView {
    pub name: String,
    pub duration_us: u64,
}

#[derive(Debug, Serialize)]
pub struct FailureView {
    pub during: String,
    pub message: String,
    pub hint: Option<String>,
    pub retryable: bool,
    pub cleanup: Option<String>,
    pub console_tail: Vec<String>,
}

#[derive(Debug, Serialize)]
pub struct MountView {
    pub volume: String,
    pub path: String,
    pub read_only: bool,
}

impl From<&VolumeMount> for MountView {
    fn from(mount: &VolumeMount) -> Self {
        Self { volume: mount.volume.clone(), path: mount.path.clone(), read_only: mount.read_only }
    }
}

impl From<&Vm> for VmView {
    fn from(vm: &Vm) -> Self {
        let spec = vm.spec.clone().unwrap_or_default();
        let network = network(&spec);
        Self {
            id: vm.id.clone(),
            name: vm.name.clone(),
            labels: vm.labels.clone().into_iter().collect(),
            phase: phase(vm),
            desired: desired(vm),
            desired_by: known(&vm.desired_by),
            revision: vm.revision,
            generation: vm.generation,
            incarnation: vm.incarnation,
            image: spec.image,
            image_digest: known(&vm.image_digest),
            vcpus: spec.vcpus,
            memory_mib: spec.memory_mib,
            disk_mib: spec.disk_mib,
            env: spec.env.iter().map(env_pair).collect(),
            cwd: known(&spec.cwd),
            user: known(&spec.user),
            network: network.to_owned(),
            volumes: spec.volumes.iter().map(MountView::from).collect(),
            address: known(&vm.address),
            vmm: known(&vm.vmm),
            vmm_version: known(&vm.vmm_version),
            remove_when_done: vm.remove_when_done,
            created_at: vm.created_at.as_ref().map(time::rfc3339),
            phase_changed_at: vm.phase_changed_at.as_ref().map(time::rfc3339),
            timings: vm.timings.iter().map(TimingView::from).collect(),
            failure: vm.failure.as_ref().map(|failure| FailureView {
                during: phase_name(failure.during()).to_owned(),
                message: failure.message.clone(),
                hint: known(&failure.hint),
                retryable: failure.retryable,
                cleanup: known(&failure.cleanup),
                console_tail: failure.console_tail.clone(),
            }),
            last_exit: vm.last_exit.as_ref().map(ExitView::from),
            restart: RestartView {
                policy: policy(vm),
                attempts: vm.restart_attempts,
                due_at: vm.restart_at.as_ref().map(time::rfc3339),
            },
            ttl_ms: (vm.ttl_ms > 0).then_some(vm.ttl_ms),
            expires_at: vm.expires_at.as_ref().map(time::rfc3339),
        }
    }
}

impl From<&Exit> for ExitView {
    fn from(exit: &Exit) -> Self {
        Self {
            reason: reason(exit),
            by: exit.by.clone(),
            message: exit.message.clone(),
            incarnation: exit.incarnation,
            happened_at: exit.at.as_ref().map(time::rfc3339),
        }
    }
}

fn reason(exit: &Exit) -> String {
    let name = match Reason::try_from(exit.reason) {
        Ok(Reason::Unspecified) => "unknown",
        Ok(Reason::PoweredOff) => "powered-off",
        Ok(Reason::GuestPanicked) => "guest-panicked",
        Ok(Reason::VmmDied) => "vmm-died",
        Ok(Reason::HostRebooted) => "host-rebooted",
        Ok(Reason::BootTimeout) => "boot-timeout",
        Ok(Reason::Failed) => "failed",
        Ok(Reason::Stopped) => "stopped",
        Ok(Reason::TtlOver) => "ttl-over",
        Ok(Reason::Deleted) => "deleted",
        Err(_) => return format!("unknown({})", exit.reason),
    };
    name.to_owned()
}

fn policy(vm: &Vm) -> String {
    match RestartPolicy::try_from(vm.restart) {
        Ok(RestartPolicy::RestartUnspecified | RestartPolicy::RestartNever) => "never".to_owned(),
        Ok(RestartPolicy::RestartOnFailure) => "on-failure".to_owned(),
        Ok(RestartPolicy::RestartAlways) => "always".to_owned(),
        Err(_) => format!("unknown({})", vm.restart),
    }
}

impl From<&PhaseTiming> for TimingView {
    fn from(timing: &PhaseTiming) -> Self {
        let us = u64::try_from(duration(timing).as_micros()).unwrap_or(u64::MAX);
        Self { name: timing.name.clone(), duration_us: us }
    }
}

fn env_pair(var: &EnvVar) -> (String, String) {
    let text = |bytes: &Bytes| String::from_utf8_lossy(bytes).into_owned();
    (text(&var.name), text(&var.value))
}

fn duration(timing: &PhaseTiming) -> Duration {
    // A negative duration is a clock that was set back.
    timing.duration.and_then(|wire| Duration::try_from(wire).ok()).unwrap_or_default()
}

/// `web`, or the id of a VM without a name.
pub fn called(vm: &Vm) -> &str {
    if vm.name.is_empty() { &vm.id } else { &vm.name }
}

/// The phase in lower case; a number that only a newer server knows is shown as such.
pub fn phase(vm: &Vm) -> String {
    Phase::try_from(vm.phase).map_or_else(|_| format!("unknown({})", vm.phase), |phase| phase_name(phase).to_owned())
}

pub fn phase_name(phase: Phase) -> &'static str {
    match phase {
        Phase::Unspecified => "unknown",
        Phase::Accepted => "accepted",
        Phase::Preparing => "preparing",
        Phase::Booting => "booting",
        Phase::Restoring => "restoring",
        Phase::Running => "running",
        Phase::Paused => "paused",
        Phase::Sleeping => "sleeping",
        Phase::Asleep => "asleep",
        Phase::Waking => "waking",
        Phase::Stopping => "stopping",
        Phase::Stopped => "stopped",
        Phase::Deleting => "deleting",
        Phase::Failed => "failed",
        Phase::Quarantined => "quarantined",
    }
}

fn desired(vm: &Vm) -> String {
    match Desired::try_from(vm.desired) {
        Ok(Desired::Running) => "running".to_owned(),
        Ok(Desired::Stopped) => "stopped".to_owned(),
        Ok(Desired::Deleted) => "deleted".to_owned(),
        Ok(Desired::Unspecified) => "unknown".to_owned(),
        Err(_) => format!("unknown({})", vm.desired),
    }
}

/// `ls`.
pub fn list(vms: &[Vm], now: SystemTime) -> String {
    let headers = ["NAME", "ID", "PHASE", "IMAGE", "CPUS", "MEMORY", "ADDRESS", "AGE"];
    let rows = vms.iter().map(|vm| {
        let spec = vm.spec.clone().unwrap_or_default();
        [
            or_dash(&vm.name),
            vm.id.clone(),
            phase(vm),
            spec.image,
            spec.vcpus.to_string(),
            format!("{} MiB", spec.memory_mib),
            or_dash(&vm.address),
            time::age_of(vm.created_at.as_ref(), now),
        ]
    });
    table::rows(headers, rows)
}

/// Whom it reaches, as `--network` has it.
fn network(spec: &VmSpec) -> &'static str {
    match spec.network() {
        Network::None => "none",
        Network::Unspecified | Network::Default => "default",
    }
}

fn size(spec: &VmSpec) -> String {
    let plural = if spec.vcpus == 1 { "" } else { "s" };
    format!("{} vCPU{plural}, {} MiB memory, {} MiB disk", spec.vcpus, spec.memory_mib, spec.disk_mib)
}

/// As it was given: "NAME:/PATH:ro".
fn mounted(volume: &VolumeMount) -> String {
    format!("{}:{}{}", volume.volume, volume.path, if volume.read_only { ":ro" } else { "" })
}

/// `inspect`.
pub fn detail(vm: &Vm, now: SystemTime) -> String {
    let spec = vm.spec.clone().unwrap_or_default();
    let mut pairs = vec![
        ("Name", or_dash(&vm.name)),
        ("Id", vm.id.clone()),
        ("Phase", format!("{}, for {}", phase(vm), time::age_of(vm.phase_changed_at.as_ref(), now))),
        ("Desired", desired(vm)),
        ("Image", format!("{} {}", spec.image, vm.image_digest)),
        ("Size", size(&spec)),
        ("VMM", or_dash(format!("{} {}", vm.vmm, vm.vmm_version).trim())),
        ("Address", or_dash(&vm.address)),
        ("Created", format!("{} ago", time::age_of(vm.created_at.as_ref(), now))),
        ("Counters", format!("revision {}, generation {}, incarnation {}", vm.revision, vm.generation, vm.incarnation)),
    ];
    let labels: BTreeMap<_, _> = vm.labels.iter().collect();
    pairs.extend(labels.iter().map(|(key, value)| ("Label", format!("{key}={value}"))));
    pairs.extend(spec.env.iter().map(env_pair).map(|(name, value)| ("Env", format!("{name}={value}"))));
    pairs.extend(known(&spec.cwd).map(|cwd| ("Directory", cwd)));
    pairs.extend((network(&spec) == "none").then(|| ("Network", "none: it reaches nobody".to_owned())));
    pairs.extend(spec.volumes.iter().map(|volume| ("Volume", mounted(volume))));
    pairs.extend(known(&spec.user).map(|user| ("User", user)));
    pairs.extend(vm.remove_when_done.then(|| ("Remove", "when its first command has ended".to_owned())));
    pairs.extend(life(vm, now));
    if let Some(failure) = &vm.failure {
        let what = if vm.phase() == Phase::Quarantined { "Quarantined" } else { "Failed" };
        pairs.push((what, format!("{}: {}", phase_name(failure.during()), failure.message.replace('\n', ": "))));
        pairs.extend(known(&failure.cleanup).map(|cleanup| ("Clean-up", cleanup)));
        pairs.extend(known(&failure.hint).map(|hint| ("Hint", hint)));
    }
    let mut text = table::pairs(pairs.into_iter().map(|(key, value)| (key.to_owned(), value)));
    if !vm.timings.is_empty() {
        text.push_str("\n\n");
        text.push_str(&boot(&vm.timings));
    }
    text
}

/// When it ends, whether it is started again, and how it ended last.
fn life(vm: &Vm, now: SystemTime) -> Vec<(&'static str, String)> {
    let mut pairs = Vec::new();
    if vm.ttl_ms > 0 {
        let whole = time::age(Duration::from_millis(vm.ttl_ms));
        let left = vm.expires_at.as_ref().map(|at| format!(", over {}", time::until(at, now)));
        pairs.push(("Lives", format!("{whole}{}", left.unwrap_or_default())));
    }
    if vm.restart() != RestartPolicy::RestartUnspecified && vm.restart() != RestartPolicy::RestartNever {
        let due = vm.restart_at.as_ref().map(|at| format!(", next {}", time::until(at, now)));
        let tried = (vm.restart_attempts > 0).then(|| format!(", {} attempts", vm.restart_attempts));
        pairs.push(("Restart", format!("{}{}{}", policy(vm), tried.unwrap_or_default(), due.unwrap_or_default())));
    }
    pairs.extend(vm.last_exit.as_ref().map(|exit| {
        let ago = time::age_of(exit.at.as_ref(), now);
        ("Last exit", format!("{}, {ago} ago: {} (incarnation {})", reason(exit), exit.message, exit.incarnation))
    }));
    pairs
}

/// The last boot as a tree: `booting.kernel` is indented under `booting`.
fn boot(timings: &[PhaseTiming]) -> String {
    let total: Duration = timings.iter().filter(|timing| !timing.name.contains('.')).map(duration).sum();
    let steps = timings.iter().map(|timing| {
        let depth = timing.name.matches('.').count();
        let step = timing.name.rsplit('.').next().unwrap_or_default();
        [format!("{}{step}", "  ".repeat(depth.min(8))), time::duration(duration(timing))]
    });
    table::rows(["BOOT", "TOOK"], steps.chain([["total".to_owned(), time::duration(total)]]))
}

/// Why a VM in FAILED or QUARANTINED does not run.
pub fn failure(vm: &Vm) -> Failure {
    let told = vm.failure.clone().unwrap_or_default();
    let what = match vm.phase() {
        Phase::Quarantined => format!("VM {}: it is quarantined", called(vm)),
        _ => format!("VM {}: it failed while {}", called(vm), phase_name(told.during())),
    };
    let mut failure = told.message.lines().fold(Failure::new(what), Failure::because);
    if !told.cleanup.is_empty() {
        failure = failure.because(format!("and cleaning up failed too: {}", told.cleanup));
    }
    let hint = known(&told.hint).unwrap_or_else(|| format!("`clawpot logs {}` shows its console", called(vm)));
    failure.console(told.console_tail).hint(hint)
}
