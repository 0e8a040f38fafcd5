//! Settings: defaults < file < environment < flags. Unknown keys of the file are refused.

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use clawpot_core::admission::Policy;
use clawpot_types::{Error, Kind, MiB, Millis, Result, Vcpus};
use serde::Deserialize;

pub const DEFAULT_STATE_DIR: &str = "/var/lib/clawpot";
pub const DEFAULT_RUN_DIR: &str = "/run/clawpot";
pub const DEFAULT_FILE: &str = "/etc/clawpot/server.toml";

/// What may be set; the same names as flags (`--state-dir`), in the environment (`CLAWPOT_STATE_DIR`) and in the file
/// (`state_dir`).
#[derive(Args, Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Options {
    /// Where records, disks and logs are kept [default: /var/lib/clawpot]
    #[arg(long, global = true, env = "CLAWPOT_STATE_DIR", value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
    /// Images, kernel and initramfs; on the same filesystem as the state directory [default: <state-dir>/images]
    #[arg(long, global = true, env = "CLAWPOT_IMAGE_DIR", value_name = "DIR")]
    pub image_dir: Option<PathBuf>,
    /// What the image store may take on disk, MiB [default: what the disk has]
    #[arg(long, global = true, env = "CLAWPOT_IMAGE_QUOTA_MIB", value_name = "MIB")]
    pub image_quota_mib: Option<u64>,
    /// What stays free of images on their filesystem, MiB [default: 1024]
    #[arg(long, global = true, env = "CLAWPOT_IMAGE_RESERVE_MIB", value_name = "MIB")]
    pub image_reserve_mib: Option<u64>,
    /// Files, directories and links that an image may have, in all its layers [default: 800000]
    #[arg(long, global = true, env = "CLAWPOT_IMAGE_MAX_ENTRIES", value_name = "N")]
    pub image_max_entries: Option<u64>,
    /// Unix socket of the API [default: /run/clawpot/api.sock, with another state directory <state-dir>/api.sock]
    #[arg(long, global = true, env = "CLAWPOT_SOCKET", value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// Unix socket of /metrics [default: metrics.sock beside the API's]
    #[arg(long, global = true, env = "CLAWPOT_METRICS_SOCKET", value_name = "PATH")]
    pub metrics_socket: Option<PathBuf>,
    /// Group that may use the sockets, beside root [default: clawpot, where there is such a group]
    #[arg(long, global = true, env = "CLAWPOT_GROUP", value_name = "NAME")]
    pub group: Option<String>,
    /// Which VMM runs new VMs [default: auto]
    #[arg(long, global = true, env = "CLAWPOT_VMM", value_enum)]
    pub vmm: Option<VmmSetting>,
    /// The firecracker binary [default: from PATH]
    #[arg(long, global = true, env = "FIRECRACKER_BIN", value_name = "PATH")]
    pub firecracker: Option<PathBuf>,
    /// The jailer binary [default: beside firecracker]
    #[arg(long, global = true, env = "JAILER_BIN", value_name = "PATH")]
    pub jailer: Option<PathBuf>,
    /// The QEMU binary [default: qemu-system-x86_64 from PATH]
    #[arg(long, global = true, env = "CLAWPOT_QEMU", value_name = "PATH")]
    pub qemu: Option<PathBuf>,
    /// The clawpot-edge binary [default: beside the server's]
    #[arg(long, global = true, env = "CLAWPOT_EDGE", value_name = "PATH")]
    pub edge: Option<PathBuf>,
    /// Which name servers guests' names are asked of [default: /etc/resolv.conf]
    #[arg(long, global = true, env = "CLAWPOT_RESOLV_CONF", value_name = "FILE")]
    pub resolv_conf: Option<PathBuf>,
    /// vCPUs of a VM that asks for none [default: 1]
    #[arg(long, global = true, env = "CLAWPOT_DEFAULT_VCPUS", value_name = "N")]
    pub default_vcpus: Option<u32>,
    /// Memory of a VM that asks for none, MiB [default: 256]
    #[arg(long, global = true, env = "CLAWPOT_DEFAULT_MEMORY_MIB", value_name = "MIB")]
    pub default_memory_mib: Option<u64>,
    /// Disk of a VM that asks for none, MiB [default: 4096]
    #[arg(long, global = true, env = "CLAWPOT_DEFAULT_DISK_MIB", value_name = "MIB")]
    pub default_disk_mib: Option<u64>,
    /// How long a guest may take from the VMM's start to its hello, seconds [default: 120]
    #[arg(long, global = true, env = "CLAWPOT_BOOT_TIMEOUT_SECS", value_name = "SECS")]
    pub boot_timeout_secs: Option<u64>,
    /// How long a probe VM's kernel may take until it speaks, seconds; more on a host that is slow, not unable [default: 8]
    #[arg(long, global = true, env = "CLAWPOT_PROBE_TIMEOUT_SECS", value_name = "SECS")]
    pub probe_timeout_secs: Option<u64>,
    /// How long a guest gets for an orderly shutdown, milliseconds [default: 10000]
    #[arg(long, global = true, env = "CLAWPOT_STOP_GRACE_MS", value_name = "MS")]
    pub stop_grace_ms: Option<u64>,
    /// How long a --rm VM stays when no client is attached, seconds [default: 60]
    #[arg(long, global = true, env = "CLAWPOT_ABANDONED_SECS", value_name = "SECS")]
    pub abandoned_secs: Option<u64>,
    /// Network slots kept ready ahead of demand [default: 4]
    #[arg(long, global = true, env = "CLAWPOT_WARM_SLOTS", value_name = "N")]
    pub warm_slots: Option<usize>,
    /// How long machines and slots that no record knows are left alone after the server's start, seconds [default: 30]
    #[arg(long, global = true, env = "CLAWPOT_STRAY_GRACE_SECS", value_name = "SECS")]
    pub stray_grace_secs: Option<u64>,
    /// Memory that VMs may have in all, percent of the host's; over 100 is overcommitment [default: 90]
    #[arg(long, global = true, env = "CLAWPOT_MEMORY_PERCENT", value_name = "PERCENT")]
    pub memory_percent: Option<u32>,
    /// Virtual CPUs that VMs may have in all, percent of the host's CPUs [default: 1600]
    #[arg(long, global = true, env = "CLAWPOT_VCPU_PERCENT", value_name = "PERCENT")]
    pub vcpu_percent: Option<u32>,
    /// Disk that VMs may have in all, percent of the state directory's filesystem; disks are sparse [default: 400]
    #[arg(long, global = true, env = "CLAWPOT_DISK_PERCENT", value_name = "PERCENT")]
    pub disk_percent: Option<u32>,
    /// Free space of that filesystem under which no VM is created or started, percent; 0 for none [default: 10]
    #[arg(long, global = true, env = "CLAWPOT_LOW_DISK_PERCENT", value_name = "PERCENT")]
    pub low_disk_percent: Option<u32>,
    /// What becomes of the VMs when the server is asked to stop [default: leave]
    #[arg(long, global = true, env = "CLAWPOT_ON_STOP", value_enum)]
    pub on_stop: Option<OnStop>,
    /// Log as lines of JSON, or as text [default: text]
    #[arg(long, global = true, env = "CLAWPOT_LOG_FORMAT", value_enum)]
    pub log_format: Option<LogFormat>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum VmmSetting {
    /// Firecracker where a probe VM has run guest code, else QEMU.
    Auto,
    Firecracker,
    Qemu,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum OnStop {
    /// They run on, and the next server adopts them.
    Leave,
    /// They are stopped first, in an orderly way.
    Drain,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    Text,
    Json,
}

/// Every setting with its value, checked.
#[derive(Clone, Debug)]
pub struct Config {
    pub state_dir: PathBuf,
    pub image_dir: PathBuf,
    pub image_room: clawpot_image::Room,
    pub socket: PathBuf,
    pub metrics_socket: PathBuf,
    pub group: Option<String>,
    pub vmm: VmmSetting,
    pub firecracker: Option<PathBuf>,
    pub jailer: Option<PathBuf>,
    pub qemu: Option<PathBuf>,
    pub edge: Option<PathBuf>,
    pub resolv_conf: PathBuf,
    pub probe_limit: Option<std::time::Duration>,
    pub control: clawpot_control::Settings,
    pub on_stop: OnStop,
    pub log_format: LogFormat,
}

/// Reads `file` (absent and not asked for by name: no settings) and lays `flags`, which clap filled from flags and
/// environment, over it.
pub fn load(file: Option<&Path>, flags: Options) -> Result<Config> {
    let from_file = match read(file.unwrap_or(Path::new(DEFAULT_FILE))) {
        Err(error) if file.is_none() && error.kind() == Kind::NotFound => Options::default(),
        other => other?,
    };
    resolve(overlay(flags, from_file))
}

fn read(path: &Path) -> Result<Options> {
    let text = std::fs::read_to_string(path)
        .map_err(|error| Error::io(format!("settings file {}: reading it", path.display()), error))?;
    toml::from_str(&text).map_err(|error| {
        Error::new(Kind::InvalidArgument, format!("settings file {}: not valid", path.display()))
            .because(error)
            .hint("`clawpot-server --help` names every setting")
    })
}

fn overlay(over: Options, under: Options) -> Options {
    Options {
        state_dir: over.state_dir.or(under.state_dir),
        image_dir: over.image_dir.or(under.image_dir),
        image_quota_mib: over.image_quota_mib.or(under.image_quota_mib),
        image_reserve_mib: over.image_reserve_mib.or(under.image_reserve_mib),
        image_max_entries: over.image_max_entries.or(under.image_max_entries),
        socket: over.socket.or(under.socket),
        metrics_socket: over.metrics_socket.or(under.metrics_socket),
        group: over.group.or(under.group),
        vmm: over.vmm.or(under.vmm),
        firecracker: over.firecracker.or(under.firecracker),
        jailer: over.jailer.or(under.jailer),
        qemu: over.qemu.or(under.qemu),
        edge: over.edge.or(under.edge),
        resolv_conf: over.resolv_conf.or(under.resolv_conf),
        default_vcpus: over.default_vcpus.or(under.default_vcpus),
        default_memory_mib: over.default_memory_mib.or(under.default_memory_mib),
        default_disk_mib: over.default_disk_mib.or(under.default_disk_mib),
        boot_timeout_secs: over.boot_timeout_secs.or(under.boot_timeout_secs),
        probe_timeout_secs: over.probe_timeout_secs.or(under.probe_timeout_secs),
        stop_grace_ms: over.stop_grace_ms.or(under.stop_grace_ms),
        abandoned_secs: over.abandoned_secs.or(under.abandoned_secs),
        warm_slots: over.warm_slots.or(under.warm_slots),
        stray_grace_secs: over.stray_grace_secs.or(under.stray_grace_secs),
        memory_percent: over.memory_percent.or(under.memory_percent),
        vcpu_percent: over.vcpu_percent.or(under.vcpu_percent),
        disk_percent: over.disk_percent.or(under.disk_percent),
        low_disk_percent: over.low_disk_percent.or(under.low_disk_percent),
        on_stop: over.on_stop.or(under.on_stop),
        log_format: over.log_format.or(under.log_format),
    }
}

fn image_room(quota: Option<u64>, reserve: Option<u64>, entries: Option<u64>) -> Result<clawpot_image::Room> {
    let bytes = |mib: u64, field: &str| {
        let none = || Error::new(Kind::InvalidArgument, format!("{field}: {mib} MiB is more than there is"));
        MiB(mib).bytes().ok_or_else(none)
    };
    let usual = clawpot_image::Room::default();
    Ok(clawpot_image::Room {
        quota: quota.map(|mib| bytes(mib, "image_quota_mib")).transpose()?,
        reserve: reserve.map_or(Ok(usual.reserve), |mib| bytes(mib, "image_reserve_mib"))?,
        entries: entries.map_or(Ok(usual.entries), clawpot_image::Room::entries)?,
    })
}

fn resolve(options: Options) -> Result<Config> {
    let state_dir = options.state_dir.unwrap_or_else(|| DEFAULT_STATE_DIR.into());
    let run_dir = if state_dir == Path::new(DEFAULT_STATE_DIR) { DEFAULT_RUN_DIR.into() } else { state_dir.clone() };
    let socket = options.socket.unwrap_or_else(|| run_dir.join("api.sock"));
    let metrics_socket = options.metrics_socket.unwrap_or_else(|| socket.with_file_name("metrics.sock"));
    let mut control = clawpot_control::Settings::default();
    let seconds = std::time::Duration::from_secs;
    if let Some(count) = options.default_vcpus {
        control.default_vcpus = Vcpus::try_from(count).map_err(|error| error.context("default_vcpus"))?;
    }
    if let Some(mib) = options.default_memory_mib {
        control.default_memory = MiB::memory(mib).map_err(|error| error.context("default_memory_mib"))?;
    }
    if let Some(mib) = options.default_disk_mib {
        control.default_disk = MiB::disk(mib).map_err(|error| error.context("default_disk_mib"))?;
    }
    control.limits.boot = options.boot_timeout_secs.map_or(control.limits.boot, seconds);
    control.limits.abandoned = options.abandoned_secs.map_or(control.limits.abandoned, seconds);
    control.stop_grace = options.stop_grace_ms.map_or(control.stop_grace, Millis);
    if let Some(count) = options.warm_slots {
        control.warm_slots = warm_slots(count)?;
    }
    control.stray_grace = options.stray_grace_secs.map_or(control.stray_grace, seconds);
    admission(
        &mut control.admission,
        [options.memory_percent, options.vcpu_percent, options.disk_percent, options.low_disk_percent],
    )?;
    Ok(Config {
        image_dir: options.image_dir.unwrap_or_else(|| state_dir.join("images")),
        image_room: image_room(options.image_quota_mib, options.image_reserve_mib, options.image_max_entries)?,
        state_dir,
        socket,
        metrics_socket,
        group: options.group,
        vmm: options.vmm.unwrap_or(VmmSetting::Auto),
        firecracker: options.firecracker,
        jailer: options.jailer,
        qemu: options.qemu,
        edge: options.edge,
        resolv_conf: options.resolv_conf.unwrap_or_else(|| "/etc/resolv.conf".into()),
        probe_limit: options.probe_timeout_secs.map(seconds),
        control,
        on_stop: options.on_stop.unwrap_or(OnStop::Leave),
        log_format: options.log_format.unwrap_or(LogFormat::Text),
    })
}

/// Of the slots that an instance has.
fn warm_slots(count: usize) -> Result<usize> {
    let most = clawpot_net::address::RESOLVER_SLOT.0;
    if u32::try_from(count).is_ok_and(|count| count <= most) {
        return Ok(count);
    }
    Err(Error::new(Kind::InvalidArgument, format!("warm_slots: {count}: must be 0 to {most}")))
}

/// Most that may be promised, percent: a hundred times what there is, above which it is a slip of the pen.
const MAX_PERCENT: u32 = 10_000;

fn admission(policy: &mut Policy, [memory, vcpu, disk, low_disk]: [Option<u32>; 4]) -> Result<()> {
    for (name, place, asked, range) in [
        ("memory_percent", &mut policy.memory_percent, memory, 1..=MAX_PERCENT),
        ("vcpu_percent", &mut policy.vcpu_percent, vcpu, 1..=MAX_PERCENT),
        ("disk_percent", &mut policy.disk_percent, disk, 1..=MAX_PERCENT),
        ("low_disk_percent", &mut policy.low_disk_percent, low_disk, 0..=99),
    ] {
        let Some(percent) = asked else { continue };
        if !range.contains(&percent) {
            let what = format!("{name}: {percent}: must be {} to {}", range.start(), range.end());
            return Err(Error::new(Kind::InvalidArgument, what));
        }
        *place = percent;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(text: &str) -> tempfile::NamedTempFile {
        use std::io::Write as _;
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        file
    }

    #[test]
    fn flags_win_over_the_file_and_the_file_over_defaults() {
        let file = file("state_dir = \"/srv/a\"\nwarm_slots = 9\nvmm = \"qemu\"\n");
        let flags = Options { state_dir: Some("/srv/b".into()), ..Options::default() };
        let config = load(Some(file.path()), flags).unwrap();
        assert_eq!(config.state_dir, Path::new("/srv/b"));
        assert_eq!(config.socket, Path::new("/srv/b/api.sock"));
        assert_eq!(config.metrics_socket, Path::new("/srv/b/metrics.sock"));
        assert_eq!(config.control.warm_slots, 9);
        assert_eq!(config.vmm, VmmSetting::Qemu);
        assert_eq!(config.control.default_memory, MiB(256));
    }

    #[test]
    fn unknown_keys_and_bad_values_are_refused_by_name() {
        for (text, word) in [
            ("statedir = \"/a\"", "statedir"),
            ("default_vcpus = 33", "default_vcpus"),
            ("vmm = \"xen\"", "xen"),
            ("warm_slots = -1", "warm_slots"),
            ("warm_slots = 1024", "warm_slots: 1024: must be 0 to 1023"),
            ("memory_percent = 0", "memory_percent: 0: must be 1 to 10000"),
            ("disk_percent = 10001", "disk_percent"),
            ("low_disk_percent = 100", "low_disk_percent: 100: must be 0 to 99"),
        ] {
            let error = load(Some(file(text).path()), Options::default()).unwrap_err().chain();
            assert!(error.contains(word), "{error}");
        }
        assert!(load(Some(Path::new("/nonexistent.toml")), Options::default()).is_err());
    }
}
