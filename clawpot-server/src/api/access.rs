//! Who may call. One table says what each call needs; who is at the other end says what they may.
//!
//! Today there is one way in, a Unix socket. The kernel tells who opened it (`SO_PEERCRED`, `SO_PEERGROUPS`): root, the server's
//! own user and members of the socket's group may do everything; the file's mode (0660) keeps others out before that. Tokens
//! and roles of remote callers will be further kinds of [`Caller`], over the same table.

use std::sync::Arc;

use clawpot_types::{Error, Kind};
use tokio::net::UnixStream;
use tonic::Request;
use tracing::warn;

/// What a caller must be allowed for a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Need {
    /// Tells nothing of any VM.
    Nothing,
    /// Looks.
    View,
    /// Changes what is, or gets into a guest.
    Operate,
}

/// Every call there is. A test fails for one of `proto/clawpot/v1` that is not here; at run time it is refused.
const TABLE: &[(&str, Need)] = &[
    // Runs what it is given, in a VM of its own.
    ("/clawpot.v1.BuildService/Build", Need::Operate),
    ("/clawpot.v1.BuildService/GetBuildLog", Need::Operate),
    ("/clawpot.v1.EventService/ListEvents", Need::View),
    ("/clawpot.v1.EventService/WatchEvents", Need::View),
    ("/clawpot.v1.HostService/GetHost", Need::View),
    ("/clawpot.v1.ImageService/CollectImages", Need::Operate),
    // All that is in an image, and what its commands are given.
    ("/clawpot.v1.ImageService/ExportImage", Need::Operate),
    ("/clawpot.v1.ImageService/GetImage", Need::View),
    ("/clawpot.v1.ImageService/ImportImage", Need::Operate),
    ("/clawpot.v1.ImageService/ListImages", Need::View),
    ("/clawpot.v1.ImageService/PullImage", Need::Operate),
    ("/clawpot.v1.ImageService/RemoveImage", Need::Operate),
    ("/clawpot.v1.ImageService/TagImage", Need::Operate),
    ("/clawpot.v1.VmService/CreateVm", Need::Operate),
    ("/clawpot.v1.VmService/DeleteVm", Need::Operate),
    ("/clawpot.v1.VmService/Exec", Need::Operate),
    // What a guest prints is as private as its disk.
    ("/clawpot.v1.VmService/GetConsole", Need::Operate),
    ("/clawpot.v1.VmService/GetVm", Need::View),
    ("/clawpot.v1.VmService/ListVms", Need::View),
    ("/clawpot.v1.VmService/SetTtl", Need::Operate),
    ("/clawpot.v1.VmService/StartVm", Need::Operate),
    ("/clawpot.v1.VmService/StopVm", Need::Operate),
    ("/clawpot.v1.VmService/WatchVms", Need::View),
    ("/clawpot.v1.VolumeService/CheckVolume", Need::Operate),
    ("/clawpot.v1.VolumeService/CopyVolume", Need::Operate),
    ("/clawpot.v1.VolumeService/CreateVolume", Need::Operate),
    ("/clawpot.v1.VolumeService/DeleteVolume", Need::Operate),
    ("/clawpot.v1.VolumeService/GetVolume", Need::View),
    ("/clawpot.v1.VolumeService/ListVolumes", Need::View),
    ("/clawpot.v1.VolumeService/ResizeVolume", Need::Operate),
    ("/grpc.health.v1.Health/Check", Need::Nothing),
    ("/grpc.health.v1.Health/List", Need::Nothing),
    ("/grpc.health.v1.Health/Watch", Need::Nothing),
    ("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", Need::Nothing),
];

/// `None`: no such call.
fn need(path: &str) -> Option<Need> {
    TABLE.iter().find(|(known, _)| *known == path).map(|(_, need)| *need)
}

/// Who is at the other end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Caller {
    /// Of this host, by the kernel's word.
    Local { uid: u32, groups: Arc<[u32]> },
    /// The kernel would not say.
    Unknown,
}

impl Caller {
    pub fn of(stream: &UnixStream) -> Self {
        match stream.peer_cred().and_then(|peer| {
            let mut groups = clawpot_host::unix::peer_groups(stream)?;
            groups.push(peer.gid());
            Ok((peer.uid(), groups))
        }) {
            Ok((uid, groups)) => Self::Local { uid, groups: groups.into() },
            Err(error) => {
                warn!(%error, "asking the kernel who has connected");
                Self::Unknown
            }
        }
    }

    /// Whose share it takes of what callers share; an unknown one's is a user's whom there cannot be.
    #[must_use]
    pub const fn uid(&self) -> u32 {
        match self {
            Self::Local { uid, .. } => *uid,
            Self::Unknown => u32::MAX,
        }
    }

    /// "uid=1000", as events show it.
    #[must_use]
    pub fn name(&self) -> String {
        match self {
            Self::Local { uid, .. } => format!("uid={uid}"),
            Self::Unknown => "unknown".to_owned(),
        }
    }
}

/// Whom the socket is for.
#[derive(Clone, Copy, Debug)]
pub struct Doors {
    /// The server's own user.
    pub own: u32,
    /// Beside root: the socket's group.
    pub group: Option<u32>,
}

impl Doors {
    /// Whether `caller` may make the call at `path`. `PermissionDenied` says who it was and what to do.
    pub fn check(&self, caller: &Caller, path: &str) -> Result<(), Error> {
        let Some(need) = need(path) else {
            let shown: String = path.chars().take(100).collect();
            return Err(Error::new(Kind::Unsupported, format!("{shown}: this server knows no such call")));
        };
        let call = super::guard::call(path);
        match caller {
            _ if need == Need::Nothing => Ok(()),
            Caller::Local { uid, groups }
                if *uid == 0 || *uid == self.own || self.group.is_some_and(|group| groups.contains(&group)) =>
            {
                Ok(())
            }
            _ => Err(Error::new(Kind::PermissionDenied, format!("{call}: {} may not", caller.name())).hint(match self
                .group
            {
                Some(_) => "use sudo, or join the socket's group (`sudo usermod -aG clawpot $USER`) and log in again",
                None => {
                    "use sudo, or make a group of callers: `sudo groupadd --system clawpot`, then restart the server"
                }
            })),
        }
    }
}

/// Who calls, for the events.
pub fn actor<T>(request: &Request<T>) -> String {
    request.extensions().get::<Caller>().map_or_else(|| Caller::Unknown.name(), Caller::name)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use prost::Message as _;

    use super::*;

    /// Every call that the proto files of the public API describe.
    fn described() -> BTreeSet<String> {
        let files = prost_types::FileDescriptorSet::decode(clawpot_common::DESCRIPTORS).unwrap();
        let public = files.file.iter().filter(|file| file.package() == "clawpot.v1");
        let calls = public.flat_map(|file| &file.service).flat_map(|service| {
            service.method.iter().map(|method| format!("/clawpot.v1.{}/{}", service.name(), method.name()))
        });
        calls.collect()
    }

    #[test]
    fn every_call_is_in_the_table_and_nothing_else() {
        let known: BTreeSet<String> =
            TABLE.iter().map(|(path, _)| (*path).to_owned()).filter(|path| path.starts_with("/clawpot.")).collect();
        assert_eq!(known, described(), "left: the table, right: proto/clawpot/v1");
        assert!(TABLE.is_sorted_by_key(|(path, _)| *path), "in order, so that it can be read");
        assert!(known.len() > 10);
    }

    /// What is written down of each call that changes something or gets into a guest. No kind: it only looks.
    const EVENTS: &[(&str, &[&str])] = &[
        ("BuildService/Build", &["image.build"]),
        ("BuildService/GetBuildLog", &[]),
        ("ImageService/CollectImages", &["image.gc"]),
        ("ImageService/ExportImage", &[]),
        ("ImageService/ImportImage", &["image.import"]),
        ("ImageService/PullImage", &["image.pull"]),
        ("ImageService/RemoveImage", &["image.rm"]),
        ("ImageService/TagImage", &["image.tag"]),
        ("VmService/CreateVm", &["vm.create"]),
        ("VmService/DeleteVm", &["vm.delete", "vm.gone"]),
        ("VmService/Exec", &["vm.exec", "vm.attach"]),
        ("VmService/GetConsole", &[]),
        ("VmService/SetTtl", &["vm.ttl"]),
        ("VmService/StartVm", &["vm.start"]),
        ("VmService/StopVm", &["vm.stop"]),
        ("VolumeService/CheckVolume", &["volume.check"]),
        ("VolumeService/CopyVolume", &["volume.copy"]),
        ("VolumeService/CreateVolume", &["volume.create"]),
        ("VolumeService/DeleteVolume", &["volume.delete", "volume.gone"]),
        ("VolumeService/ResizeVolume", &["volume.resize"]),
    ];

    /// All there is of Rust under `dir`.
    fn source(dir: &std::path::Path, into: &mut String) {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                source(&path, into);
            } else if path.extension().is_some_and(|end| end == "rs") {
                into.push_str(&std::fs::read_to_string(&path).unwrap());
            }
        }
    }

    #[test]
    fn every_call_that_changes_something_has_its_event() {
        let operating: Vec<&str> = TABLE
            .iter()
            .filter(|(_, need)| *need == Need::Operate)
            .map(|(path, _)| path.strip_prefix("/clawpot.v1.").unwrap())
            .collect();
        let told: Vec<&str> = EVENTS.iter().map(|(path, _)| *path).collect();
        assert_eq!(told, operating, "left: what is told, right: what changes something");
        // What only looks says so by its name.
        for (path, kinds) in EVENTS {
            let (_, call) = path.split_once('/').unwrap();
            assert_eq!(kinds.is_empty(), call.starts_with("Get") || call.starts_with("Export"), "{path}: {kinds:?}");
        }
        let mut written = String::new();
        for room in ["../crates/control/src", "../crates/core/src/event.rs"] {
            let at = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(room);
            if at.is_dir() {
                source(&at, &mut written)
            } else {
                written.push_str(&std::fs::read_to_string(&at).unwrap())
            }
        }
        let docs = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/cli.md")).unwrap();
        for kind in EVENTS.iter().flat_map(|(_, kinds)| *kinds) {
            assert!(written.contains(&format!("\"{kind}\"")), "nothing writes {kind}");
            assert!(docs.contains(&format!("`{kind}`")), "docs/cli.md does not tell of {kind}");
        }
    }

    fn local(uid: u32, groups: &[u32]) -> Caller {
        Caller::Local { uid, groups: groups.into() }
    }

    #[test]
    fn root_the_server_itself_and_the_group_may() {
        let doors = Doors { own: 990, group: Some(44) };
        for path in described() {
            for caller in [local(0, &[]), local(990, &[]), local(1000, &[1000, 44])] {
                assert!(doors.check(&caller, &path).is_ok(), "{caller:?} {path}");
            }
            for caller in [local(1000, &[1000]), local(1000, &[]), Caller::Unknown] {
                let error = doors.check(&caller, &path).unwrap_err();
                assert_eq!(error.kind(), Kind::PermissionDenied, "{caller:?} {path}");
                assert!(error.to_string().ends_with(&format!("{} may not", caller.name())), "{error}");
                assert!(error.next_step().unwrap().contains("usermod -aG clawpot"));
            }
        }
        let alone = Doors { own: 0, group: None };
        let error = alone.check(&local(1000, &[44]), "/clawpot.v1.VmService/GetVm").unwrap_err();
        assert_eq!(error.to_string(), "GetVm: uid=1000 may not");
        assert!(error.next_step().unwrap().contains("groupadd"), "{:?}", error.next_step());
    }

    #[test]
    fn what_is_not_in_the_table_is_refused_to_everyone() {
        let doors = Doors { own: 0, group: None };
        for path in ["/clawpot.v1.VmService/Format", "/clawpot.agent.v1.Agent/Exec", "/", ""] {
            assert_eq!(doors.check(&local(0, &[]), path).unwrap_err().kind(), Kind::Unsupported, "{path}");
        }
        assert!(doors.check(&Caller::Unknown, "/grpc.health.v1.Health/Check").is_ok());
    }
}
