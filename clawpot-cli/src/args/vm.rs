//! What `run` and `create` say about the new VM.

use std::time::Duration;

use clap::builder::NonEmptyStringValueParser;
use clap::{Args, ValueEnum};
use clawpot_common::v1::{CreateVmRequest, EnvVar, Network, RestartPolicy, VmSpec, VolumeMount};
use clawpot_types::{ImageRef, Label, MiB, Vcpus, VmName};

use super::{env, labels, size, time, volume};
use crate::failure::Failure;

#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "The VM")]
pub struct VmArgs {
    /// Name of the VM, its hostname too [default: chosen by the server]
    #[arg(long, value_name = "NAME", value_parser = |text: &str| said(text.parse::<VmName>()))]
    name: Option<VmName>,
    /// Label of the VM; may be repeated
    #[arg(short, long = "label", value_name = "KEY=VALUE", value_parser = labels::label)]
    labels: Vec<(Label, Label)>,
    /// Virtual CPUs, 1 to 32 [default: the server's]
    #[arg(long, value_name = "N", value_parser = vcpus, allow_negative_numbers = true)]
    cpus: Option<Vcpus>,
    /// Memory: MiB, or like 512M, 2G [default: the server's]
    #[arg(long, value_name = "SIZE", value_parser = size::memory, allow_negative_numbers = true)]
    memory: Option<MiB>,
    /// Writable disk: MiB, or like 512M, 20G [default: the server's]
    #[arg(long, value_name = "SIZE", value_parser = size::disk, allow_negative_numbers = true)]
    disk: Option<MiB>,
    /// Volume, and where it is mounted; `ro`: only to read, as any number of VMs may at once; may be repeated
    #[arg(short, long = "volume", value_name = "NAME:/PATH[:ro]", value_parser = volume::mount)]
    volumes: Vec<VolumeMount>,
    /// Environment variable of every command in it, or its NAME alone to take the value from here; may be repeated
    #[arg(short, long, value_name = "NAME=VALUE", value_parser = env::parser())]
    env: Vec<EnvVar>,
    /// Working directory of its commands
    #[arg(short, long, value_name = "DIR", value_parser = NonEmptyStringValueParser::new())]
    workdir: Option<String>,
    /// User of its commands: NAME, UID, NAME:GROUP or UID:GID
    #[arg(short, long, value_name = "USER", value_parser = NonEmptyStringValueParser::new())]
    user: Option<String>,
    /// Whom it reaches: default, the world but no private address; none, nobody
    #[arg(long, value_enum, value_name = "REACH", default_value = "default")]
    network: Reach,
    /// Stop it after this long (one of `run --rm`: delete it): seconds, or like 90s, 30m, 12h; `clawpot ttl` puts it off [default: never]
    #[arg(long, value_name = "TIME", value_parser = time::positive, allow_negative_numbers = true)]
    ttl: Option<Duration>,
    /// Start it again when it ended unasked: on-failure when it failed, its VMM died or the host was rebooted, always also
    /// when the guest powered itself off; not with `run --rm`
    #[arg(long, value_enum, value_name = "POLICY", default_value = "never")]
    restart: Restart,
}

/// Whom a VM reaches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Reach {
    Default,
    None,
}

impl From<Reach> for Network {
    fn from(reach: Reach) -> Self {
        match reach {
            Reach::Default => Self::Default,
            Reach::None => Self::None,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Restart {
    Never,
    OnFailure,
    Always,
}

impl From<Restart> for RestartPolicy {
    fn from(restart: Restart) -> Self {
        match restart {
            Restart::Never => Self::RestartNever,
            Restart::OnFailure => Self::RestartOnFailure,
            Restart::Always => Self::RestartAlways,
        }
    }
}

impl VmArgs {
    /// The request to create it. `request_id` makes repeating it harmless.
    pub fn request(&self, image: &ImageRef, request_id: String) -> Result<CreateVmRequest, Failure> {
        let spec = VmSpec {
            image: image.to_string(),
            vcpus: self.cpus.map(u32::from).unwrap_or_default(),
            memory_mib: self.memory.map(|size| size.0).unwrap_or_default(),
            disk_mib: self.disk.map(|size| size.0).unwrap_or_default(),
            env: self.env.clone(),
            cwd: self.workdir.clone().unwrap_or_default(),
            user: self.user.clone().unwrap_or_default(),
            network: Network::from(self.network).into(),
            volumes: self.volumes.clone(),
        };
        Ok(CreateVmRequest {
            request_id,
            name: self.name.as_ref().map(ToString::to_string).unwrap_or_default(),
            labels: labels::wire(&self.labels)?,
            spec: Some(spec),
            remove_when_done: false,
            ttl_ms: self.ttl.map(time::millis).unwrap_or_default(),
            restart: RestartPolicy::from(self.restart).into(),
        })
    }
}

/// The parser of IMAGE.
pub fn image(text: &str) -> Result<ImageRef, String> {
    said(text.parse())
}

/// The parser of --cpus.
pub fn vcpus(text: &str) -> Result<Vcpus, String> {
    let refuse = || format!("{text} vCPUs: must be 1 to {}", Vcpus::MAX);
    // What does not fit 32 bits is refused in the same words.
    text.parse::<u32>().ok().and_then(|count| Vcpus::try_from(count).ok()).ok_or_else(refuse)
}

fn said<T>(result: clawpot_types::Result<T>) -> Result<T, String> {
    result.map_err(|error| error.to_string())
}
