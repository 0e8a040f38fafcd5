//! Firecracker's API as far as it is used: what is sent, and what is read of the answers.
//! Field names are Firecracker's; unknown fields of an answer are ignored.

use std::time::Duration;

use clawpot_types::{Error, Kind, MiB, Result, Vcpus, guest};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::version::Version;
use crate::jail::{DISK, INITRAMFS, KERNEL, ROOTFS, VSOCK};

/// How long an ordinary call may take; nine of them with the spawn take 30–45 ms, under emulation 0.7–1.2 s.
/// There with a tenth of a core, while the guest boots, one took longer than 5 s.
const CALL_LIMIT: Duration = Duration::from_secs(20);
/// Reads kernel and initramfs into the guest's memory before it answers.
const START_LIMIT: Duration = Duration::from_secs(20);

/// Bytes per second that a guest's console may bring; above it Firecracker drops them. A boot prints 60 KiB at most, and
/// without a limit a guest that prints all day keeps a core of the host busy with copying.
const CONSOLE_RATE: u64 = 1 << 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Method {
    Get,
    Put,
}

/// One request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Call {
    pub method: Method,
    pub path: String,
    #[serde(skip_serializing_if = "Value::is_null")]
    pub body: Value,
}

impl Call {
    #[must_use]
    pub fn get(path: &str) -> Self {
        Self { method: Method::Get, path: path.to_owned(), body: Value::Null }
    }

    fn put(path: impl Into<String>, body: &impl Serialize) -> Result<Self> {
        let path = path.into();
        let body = serde_json::to_value(body)
            .map_err(|error| Error::new(Kind::Internal, format!("Firecracker's {path}: writing it")).because(error))?;
        Ok(Self { method: Method::Put, path, body })
    }

    /// Starts the guest: the last call of a boot.
    pub fn start() -> Result<Self> {
        Self::put("/actions", &Action { action_type: "InstanceStart" })
    }

    #[must_use]
    pub fn limit(&self) -> Duration {
        if self.path == "/actions" { START_LIMIT } else { CALL_LIMIT }
    }
}

#[derive(Serialize)]
struct Action {
    action_type: &'static str,
}

#[derive(Serialize)]
struct MachineConfig {
    vcpu_count: u8,
    mem_size_mib: u64,
    /// The guest is not told of siblings: its scheduler could do nothing with what is not pinned.
    smt: bool,
    track_dirty_pages: bool,
}

#[derive(Serialize)]
struct BootSource<'a> {
    kernel_image_path: &'a str,
    initrd_path: &'a str,
    boot_args: &'a str,
}

#[derive(Serialize)]
struct Drive<'a> {
    drive_id: &'a str,
    path_on_host: &'a str,
    /// Never: it would put `root=` on the command line, and the initramfs mounts the image itself.
    is_root_device: bool,
    is_read_only: bool,
    /// `Writeback` makes a guest's fsync reach the host's disk; `Unsafe` ignores it, which is right where nothing is written.
    cache_type: &'static str,
    io_engine: &'static str,
}

#[derive(Serialize)]
struct NetworkInterface<'a> {
    iface_id: &'a str,
    host_dev_name: &'a str,
    guest_mac: String,
}

#[derive(Serialize)]
struct Vsock<'a> {
    guest_cid: u32,
    uds_path: &'a str,
}

/// No limiter: the device is capped at 64 KiB a request since 1.15.1.
#[derive(Serialize)]
struct Entropy {}

#[derive(Serialize)]
struct Serial {
    rate_limiter: TokenBucket,
}

#[derive(Serialize)]
struct TokenBucket {
    /// Bytes.
    size: u64,
    /// Milliseconds in which the bucket fills up.
    refill_time: u64,
}

/// What a guest is booted with. Kept beside the jail, so that another daemon can finish what one began.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Boot {
    pub vcpus: Vcpus,
    pub memory: MiB,
    pub boot_args: String,
    /// The image, the VM's disk, the slot's tap and the vsock are there (a probe has none of them).
    pub devices: bool,
    /// Of each extra disk. An earlier server, which wrote none, gave none.
    #[serde(default)]
    pub read_only: Vec<bool>,
}

impl Boot {
    /// The calls, in order, up to but without [`Call::start`]. Drives get their device names by that order.
    pub fn calls(&self, version: &Version) -> Result<Vec<Call>> {
        let machine = MachineConfig {
            vcpu_count: self.vcpus.get(),
            mem_size_mib: self.memory.0,
            smt: false,
            track_dirty_pages: false,
        };
        let boot_source = BootSource { kernel_image_path: KERNEL, initrd_path: INITRAMFS, boot_args: &self.boot_args };
        let mut calls = vec![Call::put("/machine-config", &machine)?, Call::put("/boot-source", &boot_source)?];
        if self.devices {
            calls.push(drive(ROOTFS, true)?);
            for (index, read_only) in self.read_only.iter().enumerate() {
                calls.push(drive(&guest::disk_device(index), *read_only)?);
            }
            calls.push(drive(DISK, false)?);
            let guest_mac = guest::mac_text(guest::GUEST_MAC);
            let net = NetworkInterface { iface_id: "eth0", host_dev_name: guest::TAP, guest_mac };
            calls.push(Call::put("/network-interfaces/eth0", &net)?);
            calls.push(Call::put("/vsock", &Vsock { guest_cid: guest::CID, uds_path: VSOCK })?);
        }
        calls.push(Call::put("/entropy", &Entropy {})?);
        if version.limits_serial() {
            let rate_limiter = TokenBucket { size: CONSOLE_RATE, refill_time: 1000 };
            calls.push(Call::put("/serial", &Serial { rate_limiter })?);
        }
        Ok(calls)
    }
}

fn drive(id: &str, is_read_only: bool) -> Result<Call> {
    let cache_type = if is_read_only { "Unsafe" } else { "Writeback" };
    let drive =
        Drive { drive_id: id, path_on_host: id, is_root_device: false, is_read_only, cache_type, io_engine: "Sync" };
    Call::put(format!("/drives/{id}"), &drive)
}

/// `GET /version`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct VersionAnswer {
    pub firecracker_version: String,
}

/// `GET /`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct InstanceInfo {
    pub id: String,
    pub state: InstanceState,
    pub vmm_version: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub enum InstanceState {
    #[serde(rename = "Not started")]
    NotStarted,
    Running,
    Paused,
}

/// What Firecracker says with a status of 4xx or 5xx.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Fault {
    pub fault_message: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(calls: &[Call]) -> String {
        let line = |call: &Call| serde_json::to_string(call).expect("JSON");
        calls.iter().map(line).collect::<Vec<_>>().join("\n")
    }

    fn boot(devices: bool) -> Boot {
        let boot_args = "console=ttyS0 clawpot.transport=vsock".to_owned();
        Boot { vcpus: Vcpus::try_from(2).unwrap(), memory: MiB(4096), boot_args, devices, read_only: Vec::new() }
    }

    fn version(text: &str) -> Version {
        text.parse().unwrap()
    }

    #[test]
    fn a_boot() {
        let mut calls = boot(true).calls(&version("1.16.1")).unwrap();
        calls.push(Call::start().unwrap());
        insta::assert_snapshot!(lines(&calls));
    }

    #[test]
    fn extra_disks_come_between_the_image_and_the_own_one() {
        let calls = Boot { read_only: vec![false, true], ..boot(true) }.calls(&version("1.16.1")).unwrap();
        let drives: Vec<Call> = calls.into_iter().filter(|call| call.path.starts_with("/drives/")).collect();
        insta::assert_snapshot!(lines(&drives));
    }

    #[test]
    fn a_probe_boot_on_1_15() {
        insta::assert_snapshot!(lines(&boot(false).calls(&version("1.15.1")).unwrap()));
    }

    #[test]
    fn a_boot_reads_back_as_written() {
        let text = serde_json::to_string(&boot(true)).unwrap();
        assert_eq!(serde_json::from_str::<Boot>(&text).unwrap(), boot(true));
    }

    #[test]
    fn the_rest() {
        insta::assert_snapshot!(lines(&[Call::get("/"), Call::get("/version")]));
    }

    #[test]
    fn unknown_fields_of_answers_are_ignored() {
        let text = r#"{"app_name":"Firecracker","id":"a-1","state":"Not started","vmm_version":"1.16.1","new":[1]}"#;
        let info: InstanceInfo = serde_json::from_str(text).unwrap();
        assert_eq!((info.id.as_str(), info.state), ("a-1", InstanceState::NotStarted));
    }
}
