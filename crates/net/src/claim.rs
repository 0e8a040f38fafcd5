//! An instance's claim to one block of slots: a file in a directory that all instances on the host share.
//!
//! The file bears the instance's id and its state directory. It is made whole under its name by `link(2)`, so it is never
//! seen half written, and all changes are made under one lock. A claim outlives its server and is given up only when asked.
//! Somebody else's is taken over only if nobody can come back for it: its state directory is gone (or is another instance
//! now) *and* nothing on the host bears its name.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use clawpot_types::{Error, InstanceId, Kind, Result};
use ipnet::Ipv4Net;
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use crate::address::{self, BLOCKS, Block};
use crate::instance;

/// Where the claims are; on a tmpfs, since what they claim is gone after a boot too.
pub const BLOCKS_DIR: &str = "/run/clawpot/blocks";

/// The instance's own copy, in its state directory: after a boot it asks for the same block again.
const COPY: &str = "block.json";

/// Among the claims, which are named by numbers.
const LOCK: &str = "lock";

const VERSION: u32 = 1;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Record {
    version: u32,
    instance: InstanceId,
    state_dir: PathBuf,
    block: Block,
}

/// What of the host a claim must respect.
#[derive(Clone, Debug, Default)]
pub struct HostFacts {
    /// Addresses and routes that are no instance's.
    pub taken: Vec<Ipv4Net>,
    /// Instances of which a link, a netns or an address exists.
    pub instances: BTreeSet<InstanceId>,
}

/// A block that is this instance's until it is given up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claim {
    record: Record,
    file: PathBuf,
}

impl Claim {
    /// The block that the instance holds, else the one it last had, else a free one.
    ///
    /// `Exhausted`: all blocks are somebody's; `FailedPrecondition`: another state directory bears the same instance id, or
    /// the host's routes leave no room.
    pub fn take(blocks_dir: &Path, instance: &InstanceId, state_dir: &Path, host: &HostFacts) -> Result<Self> {
        let state_dir = std::fs::canonicalize(state_dir)
            .map_err(|error| Error::io(format!("finding the state directory {}", state_dir.display()), error))?;
        let lock = lock(blocks_dir)?;
        let all = read_all(blocks_dir)?;
        let claim = match all.iter().find(|found| found.is_of(instance)) {
            Some(own) => {
                let claim = own.reclaim(blocks_dir, &state_dir)?;
                for route in address::overlaps(&claim.block(), &host.taken) {
                    tracing::warn!(%route, own = %claim.block().addresses(), "this host has come to route addresses of VMs");
                }
                claim
            }
            None => take_new(blocks_dir, instance, &state_dir, &all, host)?,
        };
        drop(lock);
        let copy = state_dir.join(COPY);
        let bytes = encode(&claim.record)?;
        if std::fs::read(&copy).ok().as_deref() != Some(&bytes[..]) {
            clawpot_host::fs::replace(&copy, &bytes, 0o644)?;
        }
        Ok(claim)
    }

    #[must_use]
    pub fn block(&self) -> Block {
        self.record.block
    }

    #[must_use]
    pub fn instance(&self) -> &InstanceId {
        &self.record.instance
    }

    /// Only after nothing of the instance is left on the host; [`crate::SlotNet::give_up`] sees to that.
    pub(crate) fn give_up(self) -> Result<()> {
        let dir = self.file.parent().unwrap_or(Path::new("/"));
        let lock = lock(dir)?;
        // Not ours any more: nothing to give up.
        if read_one(&self.file)?.is_some_and(|found| found.is_of(self.instance())) {
            clawpot_host::fs::remove_file_if_exists(&self.file)?;
        }
        drop(lock);
        Ok(())
    }
}

/// What stands under one of the names.
#[derive(Debug)]
enum Found {
    Read(Record),
    /// Somebody's all the same.
    Unreadable,
}

impl Found {
    fn is_of(&self, instance: &InstanceId) -> bool {
        matches!(self, Self::Read(record) if record.instance == *instance)
    }

    /// The instance's own claim again, also when its state directory was moved.
    fn reclaim(&self, blocks_dir: &Path, state_dir: &Path) -> Result<Claim> {
        let Self::Read(record) = self else { return Err(Error::new(Kind::Internal, "reclaiming an unreadable claim")) };
        let file = path(blocks_dir, record.block.number);
        if record.state_dir == state_dir {
            return Ok(Claim { record: record.clone(), file });
        }
        if instance::read(&record.state_dir)?.as_ref() == Some(&record.instance) {
            return Err(Error::new(
                Kind::FailedPrecondition,
                format!(
                    "state directory {} is a copy of {}: both are instance {}",
                    state_dir.display(),
                    record.state_dir.display(),
                    record.instance
                ),
            )
            .hint("remove the copy's file `instance`: it gets an id of its own"));
        }
        let record = Record { state_dir: state_dir.to_owned(), ..record.clone() };
        clawpot_host::fs::replace(&file, &encode(&record)?, 0o644)?;
        Ok(Claim { record, file })
    }

    /// Nobody can come back for it.
    fn is_stale(&self, host: &HostFacts) -> bool {
        let Self::Read(record) = self else { return false };
        // A directory that cannot be read is not gone.
        let gone = instance::read(&record.state_dir).is_ok_and(|id| id.as_ref() != Some(&record.instance));
        gone && !host.instances.contains(&record.instance)
    }
}

fn take_new(
    blocks_dir: &Path,
    instance: &InstanceId,
    state_dir: &Path,
    all: &[Found],
    host: &HostFacts,
) -> Result<Claim> {
    let previous = match read_one(&state_dir.join(COPY))? {
        Some(Found::Read(record)) if record.instance == *instance => Some(record.block),
        _ => None,
    };
    let numbers = previous.iter().map(|block| block.number).filter(|number| *number < BLOCKS).chain(0..BLOCKS);
    for number in numbers {
        let file = path(blocks_dir, number);
        if let Some(found) = read_one(&file)? {
            if !found.is_stale(host) {
                continue;
            }
            tracing::info!(file = %file.display(), "taking over a block whose instance is gone");
            clawpot_host::fs::remove_file_if_exists(&file)?;
        }
        let block = address::choose(number, previous.map(|block| block.range), &host.taken)?;
        let record = Record { version: VERSION, instance: instance.clone(), state_dir: state_dir.to_owned(), block };
        if place(&file, &record)? {
            return Ok(Claim { record, file });
        }
    }
    let unreadable = all.iter().filter(|found| matches!(found, Found::Unreadable)).count();
    Err(Error::new(
        Kind::Exhausted,
        format!(
            "claiming a block of network slots: all {BLOCKS} in {} are taken, {unreadable} of them unreadable",
            blocks_dir.display()
        ),
    )
    .hint("stop another server and let it give up its block, or remove the file of one that is gone"))
}

/// Whether the file was made; not if there is one.
fn place(file: &Path, record: &Record) -> Result<bool> {
    let temp = clawpot_host::fs::temp_name(file)?;
    clawpot_host::fs::replace(&temp, &encode(record)?, 0o644)?;
    let linked = std::fs::hard_link(&temp, file);
    clawpot_host::fs::remove_file_if_exists(&temp)?;
    match linked {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Ok(false),
        Err(error) => Err(Error::io(format!("claiming {}", file.display()), error)),
    }
}

fn path(dir: &Path, number: u32) -> PathBuf {
    dir.join(number.to_string())
}

fn encode(record: &Record) -> Result<Vec<u8>> {
    serde_json::to_vec(record).map_err(|error| Error::new(Kind::Internal, "writing a block claim").because(error))
}

/// Held until dropped. Another server holds it for milliseconds. Whoever can open what is locked can hold it for ever, so that nobody
/// but root can; the claims themselves are for all to read (`clawpot doctor`).
fn lock(dir: &Path) -> Result<File> {
    let what = || format!("locking {}", dir.display());
    std::fs::create_dir_all(dir).map_err(|error| Error::io(format!("making {}", dir.display()), error))?;
    let file = File::options().write(true).create(true).truncate(false).mode(0o600).open(dir.join(LOCK));
    let file = file.map_err(|error| Error::io(what(), error))?;
    flock(&file, FlockOperation::LockExclusive).map_err(|errno| Error::io(what(), errno.into()))?;
    Ok(file)
}

fn read_all(dir: &Path) -> Result<Vec<Found>> {
    (0..BLOCKS).filter_map(|number| read_one(&path(dir, number)).transpose()).collect()
}

fn read_one(file: &Path) -> Result<Option<Found>> {
    let bytes = match std::fs::read(file) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::io(format!("reading {}", file.display()), error)),
    };
    let record = serde_json::from_slice::<Record>(&bytes).ok().filter(|record| record.version == VERSION);
    if record.is_none() {
        tracing::warn!(file = %file.display(), "a block claim that cannot be read: taken for somebody else's");
    }
    Ok(Some(record.map_or(Found::Unreadable, Found::Read)))
}

#[cfg(test)]
mod tests {
    use super::*;

    struct World {
        root: tempfile::TempDir,
        host: HostFacts,
    }

    impl World {
        fn new() -> Self {
            Self { root: tempfile::tempdir().unwrap(), host: HostFacts::default() }
        }

        fn blocks(&self) -> PathBuf {
            self.root.path().join("run/blocks")
        }

        fn state(&self, name: &str) -> (PathBuf, InstanceId) {
            let dir = self.root.path().join(name);
            std::fs::create_dir_all(&dir).unwrap();
            let id = instance::read_or_create(&dir).unwrap();
            (dir, id)
        }

        fn take(&self, (dir, id): &(PathBuf, InstanceId)) -> Result<Claim> {
            Claim::take(&self.blocks(), id, dir, &self.host)
        }
    }

    #[test]
    fn each_instance_has_its_own_and_finds_it_again() {
        let world = World::new();
        let (a, b) = (world.state("a"), world.state("b"));
        let (first, second) = (world.take(&a).unwrap(), world.take(&b).unwrap());
        assert_eq!((first.block().number, second.block().number), (0, 1));
        assert_eq!(world.take(&a).unwrap(), first);
        // After a boot /run is empty; b comes first and still gets its own.
        std::fs::remove_dir_all(world.blocks()).unwrap();
        assert_eq!(world.take(&b).unwrap().block(), second.block());
        assert_eq!(world.take(&a).unwrap().block(), first.block());
        first.give_up().unwrap();
        assert!(!world.blocks().join("0").exists() && world.blocks().join("1").exists());
    }

    /// A user of the host who locks what he can open keeps no server from its start.
    #[test]
    fn what_all_can_read_is_not_what_is_locked() {
        use std::os::unix::fs::PermissionsExt as _;

        let world = World::new();
        let a = world.state("a");
        world.take(&a).unwrap();
        let directory = File::open(world.blocks()).unwrap();
        let claim = File::open(path(&world.blocks(), 0)).unwrap();
        for held in [&directory, &claim] {
            flock(held, FlockOperation::LockExclusive).unwrap();
        }
        world.take(&a).unwrap();
        let mode = std::fs::metadata(world.blocks().join(LOCK)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn a_claim_keeps_its_range_while_it_is_held() {
        let mut world = World::new();
        let a = world.state("a");
        let first = world.take(&a).unwrap();
        world.host.taken.push("10.201.0.0/16".parse().unwrap());
        assert_eq!(world.take(&a).unwrap(), first);
        first.give_up().unwrap();
        assert_eq!(world.take(&a).unwrap().block().range, "10.202.0.0/16".parse().unwrap());
    }

    #[test]
    fn nothing_is_stolen() {
        let mut world = World::new();
        let (a, b) = (world.state("a"), world.state("b"));
        world.take(&a).unwrap();
        std::fs::remove_dir_all(&a.0).unwrap();
        // Gone, but its machines may still run.
        world.host.instances.insert(a.1.clone());
        let claim = world.take(&b).unwrap();
        assert_eq!(claim.block().number, 1);
        claim.give_up().unwrap();
        std::fs::remove_file(b.0.join(COPY)).unwrap();
        world.host.instances.clear();
        assert_eq!(world.take(&b).unwrap().block().number, 0);
    }

    #[test]
    fn unreadable_is_somebodys() {
        let world = World::new();
        let a = world.state("a");
        std::fs::create_dir_all(world.blocks()).unwrap();
        for number in 0..BLOCKS {
            let text: &[u8] = if number % 2 == 0 { b"" } else { b"{\"version\":2}" };
            clawpot_host::fs::replace(&path(&world.blocks(), number), text, 0o644).unwrap();
        }
        let error = world.take(&a).unwrap_err();
        assert_eq!(error.kind(), Kind::Exhausted);
        assert!(error.what().contains("32 of them unreadable"), "{}", error.what());
    }

    #[test]
    fn a_copied_state_directory_is_refused_a_moved_one_is_not() {
        let world = World::new();
        let a = world.state("a");
        let first = world.take(&a).unwrap();
        let copy = world.root.path().join("copy");
        std::fs::create_dir(&copy).unwrap();
        clawpot_host::fs::replace(&copy.join("instance"), a.1.as_str().as_bytes(), 0o644).unwrap();
        let refused = world.take(&(copy.clone(), a.1.clone())).unwrap_err();
        assert_eq!(refused.kind(), Kind::FailedPrecondition);
        std::fs::remove_dir_all(&a.0).unwrap();
        assert_eq!(world.take(&(copy, a.1.clone())).unwrap().block(), first.block());
    }
}
