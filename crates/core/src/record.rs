//! What is on disk of a VM before anything of it exists. From it alone every name on the host can be computed.

use std::collections::BTreeMap;
use std::fmt;
use std::net::Ipv4Addr;
use std::path::PathBuf;

use clawpot_types::{
    Digest, Error, Generation, GuestPath, ImageRef, Incarnation, Kind, Label, MiB, Millis, Slot, Timestamp, Vcpus,
    VmId, VmName, VolumeName,
};
use serde::{Deserialize, Serialize};

use crate::{Exit, Phase, Restart};

/// Version of the record's JSON that this build writes. Newer is refused, older migrated.
pub const RECORD_VERSION: u32 = 5;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmRecord {
    pub version: u32,
    pub id: VmId,
    pub name: VmName,
    pub labels: BTreeMap<Label, Label>,
    pub spec: VmSpec,
    pub image: ImagePin,
    pub desired: Desired,
    /// Who changed what is wanted last: "uid=1000", "server", "guest".
    pub intent_by: String,
    /// Changes of intent.
    pub generation: Generation,
    /// Boots, restores and rollbacks; 0 before the first.
    pub incarnation: Incarnation,
    pub phase: Phase,
    pub phase_since: Timestamp,
    /// When the current phase has taken too long (Booting) or is over (Stopping: the grace given to the guest).
    pub deadline: Option<Timestamp>,
    pub slot: Slot,
    /// Which VMM the current incarnation runs under, chosen as it is prepared.
    pub vmm: Option<VmmChoice>,
    /// The host's boot in which the current incarnation was prepared (`/proc/sys/kernel/random/boot_id`).
    pub boot_id: String,
    pub address: Option<Ipv4Addr>,
    pub created_at: Timestamp,
    /// Its disk was made once: from then on it holds the owner's data, and its loss is not mended by an empty one.
    pub disk_made: bool,
    /// The last boot, in order.
    pub timings: Vec<Timing>,
    /// The last failure, kept until the next start.
    pub failure: Option<Failure>,
    /// In Quarantined, and only there: why, and where it came from.
    pub quarantine: Option<Quarantine>,
    /// How the last incarnation that ended did so.
    pub exit: Option<Exit>,
    pub restart: Restart,
    /// How long it may go on after a create, a start or a keep-alive. `None`: for ever.
    pub ttl: Option<Millis>,
    /// When that is over. `None`: never, or it was over already.
    pub expires_at: Option<Timestamp>,
    /// Delete the VM when its first exec has ended or no client has been attached for a while.
    pub remove_when_done: bool,
    /// How long the guest gets for an orderly shutdown.
    pub stop_grace: Millis,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmSpec {
    pub image: ImageRef,
    pub vcpus: Vcpus,
    pub memory: MiB,
    pub disk: MiB,
    /// Defaults of every exec.
    pub env: Vec<(String, String)>,
    pub cwd: String,
    pub user: String,
    /// Disks beside its own, in the order in which the guest numbers them.
    pub extra_disks: Vec<ExtraDisk>,
    /// Whom the guest reaches.
    pub reach: Reach,
}

impl VmSpec {
    /// Whether what its guest writes is to outlive the VM.
    #[must_use]
    pub fn writes_volumes(&self) -> bool {
        self.extra_disks.iter().any(|disk| !disk.read_only && matches!(disk.source, DiskSource::Volume(_)))
    }
}

/// Whom a guest reaches over its network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reach {
    /// The world, and names; no private address, no other VM.
    Default,
    /// Nobody. The host still reaches the guest's agent, which takes another way.
    None,
}

impl Reach {
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Default => "default",
            Self::None => "none",
        }
    }
}

/// A disk that outlives the VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExtraDisk {
    pub source: DiskSource,
    pub read_only: bool,
    /// Where the guest mounts it; `None`: a block device, left as it is.
    pub mount: Option<GuestPath>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DiskSource {
    Volume(VolumeName),
    /// One that the server itself keeps below its state directory; no client can ask for it. Where the guest may write, it
    /// is as large as the VM's own disk.
    File(PathBuf),
}

/// The image as it was when the VM was accepted, whatever its name means later.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImagePin {
    /// Of the image's manifest.
    pub digest: Digest,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmmChoice {
    pub kind: VmmKind,
    pub version: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VmmKind {
    Firecracker,
    Qemu,
}

impl VmmKind {
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Firecracker => "firecracker",
            Self::Qemu => "qemu",
        }
    }
}

impl fmt::Display for VmmKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What the owner wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Desired {
    Running,
    Stopped,
    Deleted,
}

impl Desired {
    pub const ALL: [Self; 3] = [Self::Running, Self::Stopped, Self::Deleted];
}

/// One boot of one VM: names its cgroup, its directory, its Hello.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct MachineId {
    pub vm: VmId,
    pub incarnation: Incarnation,
}

impl fmt::Display for MachineId {
    /// `<vm>-<incarnation>`, as in the names of cgroup and jail.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.vm, self.incarnation)
    }
}

impl std::str::FromStr for MachineId {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let parse = || {
            let (vm, incarnation) = text.rsplit_once('-')?;
            Some(Self { vm: vm.parse().ok()?, incarnation: Incarnation(incarnation.parse().ok()?) })
        };
        parse().ok_or_else(|| Error::new(Kind::InvalidArgument, format!("{text:?} is not a machine's name")))
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timing {
    /// A phase ("booting") or a stretch in it ("booting.kernel").
    pub name: String,
    pub micros: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    pub during: Phase,
    /// The generation that failed; a later one starts afresh.
    pub generation: Generation,
    pub kind: Kind,
    /// Which thing, doing what, why.
    pub message: String,
    pub hint: Option<String>,
    /// A clean-up that failed too.
    pub cleanup: Option<String>,
    /// The console's last lines.
    pub console_tail: Vec<String>,
}

/// A machine's identity could not be proven.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Quarantine {
    /// The phase that it goes back to.
    pub from: Phase,
    /// Which thing, doing what, why.
    pub message: String,
}

impl VmRecord {
    /// The server's own: it has a disk that no client can ask for, as a build has. No later server has a use for it.
    #[must_use]
    pub fn is_servers(&self) -> bool {
        self.spec.extra_disks.iter().any(|disk| matches!(disk.source, DiskSource::File(_)))
    }

    /// In quarantine, where nothing is done to it. It stays under the deadlines that it had.
    #[must_use]
    pub fn quarantined(&self, message: String, now: Timestamp) -> Self {
        let quarantine = Some(Quarantine { from: self.phase, message });
        Self { phase: Phase::Quarantined, phase_since: now, quarantine, ..self.clone() }
    }

    /// Out of quarantine: where it was. One that is not in it stays as it is.
    #[must_use]
    pub fn released(&self, now: Timestamp) -> Self {
        match &self.quarantine {
            Some(Quarantine { from, .. }) => Self { phase: *from, phase_since: now, quarantine: None, ..self.clone() },
            None => self.clone(),
        }
    }

    /// Whether its owner has asked for a start since it failed.
    #[must_use]
    pub fn asked_since_failure(&self) -> bool {
        self.failure.as_ref().is_none_or(|failure| failure.generation < self.generation)
    }

    #[must_use]
    pub fn machine(&self) -> MachineId {
        MachineId { vm: self.id.clone(), incarnation: self.incarnation }
    }

    /// JSON, as the store keeps it.
    pub fn encode(&self) -> Result<Vec<u8>, Error> {
        serde_json::to_vec(self)
            .map_err(|error| Error::new(Kind::Internal, format!("VM {}: writing its record", self.id)).because(error))
    }

    /// Reads what [`Self::encode`] wrote, of this version or an older one. A newer version and anything unreadable are errors
    /// that say so.
    pub fn decode(bytes: &[u8]) -> Result<Self, Error> {
        let corrupt = |error| Error::new(Kind::Corrupt, "VM record: not readable").because(error);
        #[derive(Deserialize)]
        struct Head {
            version: u32,
        }
        let head: Head = serde_json::from_slice(bytes).map_err(corrupt)?;
        if head.version > RECORD_VERSION {
            let what = format!("VM record: version {} is newer than this server's {RECORD_VERSION}", head.version);
            return Err(Error::new(Kind::Unsupported, what).hint("run the newer clawpot-server that wrote it"));
        }
        if head.version == RECORD_VERSION {
            let record: Self = serde_json::from_slice(bytes).map_err(corrupt)?;
            return record.whole();
        }
        let mut fields: Fields = serde_json::from_slice(bytes).map_err(corrupt)?;
        let older = usize::try_from(head.version).ok().and_then(|version| MIGRATIONS.get(version.checked_sub(1)?..));
        let older = older.ok_or_else(|| Error::new(Kind::Corrupt, "VM record: version 0 was never written"))?;
        older.iter().for_each(|migrate| migrate(&mut fields));
        fields.insert("version".to_owned(), RECORD_VERSION.into());
        let record: Self = serde_json::from_value(fields.into()).map_err(corrupt)?;
        record.whole()
    }

    /// What must go together does.
    fn whole(self) -> Result<Self, Error> {
        if (self.phase == Phase::Quarantined) == self.quarantine.is_some() {
            return Ok(self);
        }
        Err(Error::new(Kind::Corrupt, format!("VM record: not readable: it is {}, and why is not", self.phase)))
    }
}

type Fields = serde_json::Map<String, serde_json::Value>;

/// Entry n takes a record of version n + 1 to n + 2. Never edit one that was released.
const MIGRATIONS: [fn(&mut Fields); 4] = [to_2, to_3, to_4, to_5];

/// Version 2 knows who asked, how it ended, whether it is started again, and how long it lives.
fn to_2(fields: &mut Fields) {
    use serde_json::Value;
    fields.insert("intent_by".to_owned(), "unknown".into());
    fields.insert("exit".to_owned(), Value::Null);
    fields.insert("restart".to_owned(), serde_json::json!({ "policy": "never", "attempts": 0, "at": null }));
    fields.insert("ttl".to_owned(), Value::Null);
    fields.insert("expires_at".to_owned(), Value::Null);
}

/// Version 3 has extra disks.
fn to_3(fields: &mut Fields) {
    if let Some(spec) = fields.get_mut("spec").and_then(serde_json::Value::as_object_mut) {
        spec.insert("extra_disks".to_owned(), serde_json::json!([]));
    }
}

/// Version 4 says whom the guest reaches.
fn to_4(fields: &mut Fields) {
    if let Some(spec) = fields.get_mut("spec").and_then(serde_json::Value::as_object_mut) {
        spec.insert("reach".to_owned(), "default".into());
    }
}

/// Version 5 knows why a VM is quarantined. No older one was ever written in that phase.
fn to_5(fields: &mut Fields) {
    fields.insert("quarantine".to_owned(), serde_json::Value::Null);
}
