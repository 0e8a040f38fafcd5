//! What happened, for people.

use clawpot_types::{Digest, Incarnation, Revision, Timestamp, VmId, VmName, VolumeId, VolumeName};
use serde::{Deserialize, Serialize};

/// Kind of the event of a command that is run in a guest. There may be thousands for each create and delete, so the log
/// keeps them apart: however many there are, they push out none of another kind.
pub const EXEC: &str = "vm.exec";
/// Of somebody who joins a command that runs already: who may type into it, end it and read what it says. As many as of
/// [`EXEC`], and kept with those.
pub const ATTACH: &str = "vm.attach";

/// Whether events of `kind` are kept apart from the others.
#[must_use]
pub fn is_of_a_command(kind: &str) -> bool {
    kind == EXEC || kind == ATTACH
}

/// What the log knows events of no single image by: of the form of a VM's id, as earlier servers read it as one.
const IMAGES: &str = "images0000000000";
/// Of a digest, what the log knows an image's events by: as many characters as a VM's id has, and of those that one may have.
const IMAGE_ID: usize = VmId::LEN;

/// Whom an event tells of. Each has its own fields in the event's JSON, so that events of VMs read as they always did.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum About {
    Vm {
        vm: VmId,
        name: VmName,
        incarnation: Incarnation,
    },
    Volume {
        volume: VolumeId,
        volume_name: VolumeName,
    },
    /// A name among images, and what it means, or meant until now.
    Image {
        image: Digest,
        image_name: String,
    },
    /// Images as a whole, of which so many files went.
    Images {
        images_removed: u64,
    },
}

impl About {
    /// The VM's or the volume's; what stands for it in the log for images, which have none.
    #[must_use]
    pub fn id(&self) -> &str {
        match self {
            Self::Vm { vm, .. } => vm.as_str(),
            Self::Volume { volume, .. } => volume.as_str(),
            Self::Image { image, .. } => &image.hex()[..IMAGE_ID],
            Self::Images { .. } => IMAGES,
        }
    }

    #[must_use]
    pub fn is_vm(&self, id: &VmId) -> bool {
        matches!(self, Self::Vm { vm, .. } if vm == id)
    }
}

impl std::fmt::Display for About {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Vm { vm, .. } => write!(f, "VM {vm}"),
            Self::Volume { volume_name, .. } => write!(f, "volume {volume_name}"),
            Self::Image { image_name, .. } => write!(f, "image {image_name}"),
            Self::Images { .. } => f.write_str("images"),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// The revision of the transaction that it is part of; ascending.
    pub id: Revision,
    pub time: Timestamp,
    #[serde(flatten)]
    pub about: About,
    /// "vm.create", "vm.phase", "volume.create", "image.tag", …
    pub kind: String,
    pub message: String,
    /// "uid=1000", or "server".
    pub actor: String,
}

/// An event before it is committed: the store gives it its id.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Draft {
    pub time: Timestamp,
    pub about: About,
    /// At most one of a kind for each VM, volume or image in one transaction.
    pub kind: &'static str,
    pub message: String,
    pub actor: String,
}

impl Draft {
    #[must_use]
    pub fn committed(&self, id: Revision) -> Event {
        Event {
            id,
            time: self.time,
            about: self.about.clone(),
            kind: self.kind.to_owned(),
            message: self.message.clone(),
            actor: self.actor.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(about: About) -> Event {
        Event {
            id: Revision(7),
            time: Timestamp(1),
            about,
            kind: "vm.phase".to_owned(),
            message: "running".to_owned(),
            actor: "server".to_owned(),
        }
    }

    /// Earlier versions wrote the VM's fields beside the others, and nothing of volumes.
    #[test]
    fn events_of_earlier_versions_read_back() {
        let (vm, volume) = (VmId::from_random([1; VmId::LEN]), VolumeId::from_random([2; VolumeId::LEN]));
        let old = format!(
            r#"{{"id":7,"time":1,"vm":"{vm}","name":"web","incarnation":3,"kind":"vm.phase","message":"running","actor":"server"}}"#
        );
        let told = event(About::Vm { vm, name: "web".parse().unwrap(), incarnation: Incarnation(3) });
        assert_eq!(serde_json::from_str::<Event>(&old).unwrap(), told);
        assert_eq!(serde_json::to_string(&told).unwrap(), old);
        let image = Digest::from_sha256(&[0xa7; 32]);
        for about in [
            About::Volume { volume, volume_name: "db".parse().unwrap() },
            About::Image { image, image_name: "docker.io/library/alpine:3".to_owned() },
            About::Images { images_removed: 0 },
        ] {
            let told = event(about);
            let text = serde_json::to_string(&told).unwrap();
            assert_eq!(serde_json::from_str::<Event>(&text).unwrap(), told, "{text}");
            // An earlier server, to which one goes back, shows what it cannot read under a VM's id, or shows nothing at all.
            assert!(told.about.id().parse::<VmId>().is_ok(), "{}", told.about.id());
        }
    }

    /// One whose body is broken is shown as such, not as another's.
    #[test]
    fn what_tells_of_nothing_is_no_event() {
        let broken = r#"{"id":7,"time":1,"vm":"?","name":"web","incarnation":3,"kind":"vm.phase","message":"","actor":"server"}"#;
        assert!(serde_json::from_str::<Event>(broken).is_err());
    }
}
