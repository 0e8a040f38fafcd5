//! Disks that outlive VMs: what is on disk of a volume, and who may have it.
//!
//! ```text
//! Making ─► Ready ◄─► Copying        another volume is made of it
//!             │ ◄───► Growing
//!             │ ◄───► Checking           because somebody asked
//!             └─────► Removing ─► gone
//! ```
//!
//! One VM that writes, or any number that read. A VM has its volumes from create until it is gone, also while it is stopped: so no
//! start fails because somebody else was faster.

use std::collections::BTreeMap;

use clawpot_types::{Error, GuestPath, Kind, MiB, Timestamp, VmId, VmName, VolumeId, VolumeName};
use serde::{Deserialize, Serialize};

/// Version of [`VolumeRecord`]'s JSON that this build writes. Newer is refused.
pub const VOLUME_VERSION: u32 = 1;

/// `volumes/<name>`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeRecord {
    pub version: u32,
    pub id: VolumeId,
    pub name: VolumeName,
    pub size: MiB,
    pub created_at: Timestamp,
    /// Who made it: "uid=1000".
    pub created_by: String,
    pub state: VolumeState,
    pub attached: BTreeMap<VmId, Lease>,
    /// A machine may write to it, or did and nobody has seen that it was unmounted: it is checked before the next one gets it.
    pub unclean: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VolumeState {
    /// Its file is not whole yet. After a crash it goes.
    Making,
    Ready,
    /// It is being copied: it may be read.
    Copying,
    /// After a crash it goes on.
    Growing,
    /// After a crash it counts as unclean.
    Checking,
    /// Likewise.
    Removing,
}

/// A VM's hold on a volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    pub vm: VmName,
    pub read_only: bool,
    pub path: Option<GuestPath>,
}

impl VolumeRecord {
    #[must_use]
    pub fn key(name: &VolumeName) -> String {
        format!("volumes/{name}")
    }

    pub fn encode(&self) -> Result<Vec<u8>, Error> {
        serde_json::to_vec(self).map_err(|error| {
            Error::new(Kind::Internal, format!("volume {}: writing its record", self.name)).because(error)
        })
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, Error> {
        #[derive(Deserialize)]
        struct Head {
            version: u32,
        }
        let corrupt = |error| Error::new(Kind::Corrupt, "volume record: not readable").because(error);
        let head: Head = serde_json::from_slice(bytes).map_err(corrupt)?;
        if head.version != VOLUME_VERSION {
            let what = format!("volume record: version {}, and this server knows {VOLUME_VERSION}", head.version);
            return Err(Error::new(Kind::Unsupported, what).hint("run the newer clawpot-server that wrote it"));
        }
        serde_json::from_slice(bytes).map_err(corrupt)
    }

    /// Gives `vm` its hold, if it may have one: one that writes, or any number that read.
    pub fn attach(&mut self, vm: VmId, lease: Lease) -> Result<(), Error> {
        self.may_be_used(lease.read_only)?;
        let in_the_way = self.attached.values().find(|other| !other.read_only || !lease.read_only);
        if let Some(other) = in_the_way {
            let (how, hint) = match other.read_only {
                true => ("reads it", "detach it by deleting that VM"),
                false => ("writes to it", "delete that VM first, or copy the volume: clawpot volume cp"),
            };
            let wanted = if lease.read_only { "be read" } else { "be written to" };
            let what = format!("volume {}: cannot {wanted} while VM {} {how}", self.name, other.vm);
            return Err(Error::new(Kind::FailedPrecondition, what).hint(hint));
        }
        self.attached.insert(vm, lease);
        Ok(())
    }

    /// Whether a machine may be given its file now.
    pub fn may_be_used(&self, read_only: bool) -> Result<(), Error> {
        let doing = match self.state {
            VolumeState::Ready => return Ok(()),
            VolumeState::Copying if read_only => return Ok(()),
            VolumeState::Making => "made",
            VolumeState::Copying => "copied",
            VolumeState::Growing => "resized",
            VolumeState::Checking => "checked",
            VolumeState::Removing => "removed",
        };
        Err(Error::new(Kind::FailedPrecondition, format!("volume {}: it is being {doing}", self.name))
            .hint("try again when that is done: clawpot volume ls"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn volume() -> VolumeRecord {
        VolumeRecord {
            version: VOLUME_VERSION,
            id: VolumeId::from_random([1; VolumeId::LEN]),
            name: "db".parse().unwrap(),
            size: MiB(64),
            created_at: Timestamp(1),
            created_by: "uid=0".to_owned(),
            state: VolumeState::Ready,
            attached: BTreeMap::new(),
            unclean: false,
        }
    }

    fn lease(read_only: bool) -> Lease {
        Lease { vm: "web".parse().unwrap(), read_only, path: Some("/data".parse().unwrap()) }
    }

    fn vm(n: u8) -> VmId {
        VmId::from_random([n; VmId::LEN])
    }

    #[test]
    fn one_writes_or_many_read() {
        for (first, second, fine) in
            [(false, false, false), (false, true, false), (true, false, false), (true, true, true)]
        {
            let mut volume = volume();
            volume.attach(vm(1), lease(first)).unwrap();
            let answer = volume.attach(vm(2), lease(second));
            assert_eq!(answer.is_ok(), fine, "{first} {second}");
            if let Err(error) = answer {
                assert_eq!(error.kind(), Kind::FailedPrecondition);
                assert!(error.chain().contains("VM web"), "{}", error.chain());
                assert_eq!(volume.attached.len(), 1);
            }
        }
    }

    #[test]
    fn what_is_worked_on_is_given_to_nobody() {
        use VolumeState::{Checking, Copying, Growing, Making, Ready, Removing};
        for (state, reads, writes) in [
            (Ready, true, true),
            (Copying, true, false),
            (Making, false, false),
            (Growing, false, false),
            (Checking, false, false),
            (Removing, false, false),
        ] {
            let volume = VolumeRecord { state, ..volume() };
            assert_eq!(
                (volume.may_be_used(true).is_ok(), volume.may_be_used(false).is_ok()),
                (reads, writes),
                "{state:?}"
            );
        }
    }

    #[test]
    fn it_reads_back_and_a_newer_one_is_refused() {
        let mut volume = volume();
        volume.attach(vm(1), lease(true)).unwrap();
        let bytes = volume.encode().unwrap();
        assert_eq!(VolumeRecord::decode(&bytes).unwrap(), volume);
        let newer = String::from_utf8(bytes).unwrap().replace("\"version\":1", "\"version\":2");
        assert_eq!(VolumeRecord::decode(newer.as_bytes()).unwrap_err().kind(), Kind::Unsupported);
        assert_eq!(VolumeRecord::decode(b"{}").unwrap_err().kind(), Kind::Corrupt);
    }
}
