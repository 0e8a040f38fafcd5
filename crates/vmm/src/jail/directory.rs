//! A machine's directory. Everything here blocks, for well under a millisecond.

use std::fs::Permissions;
use std::io;
use std::os::unix::fs::{PermissionsExt, chown, lchown};
use std::path::Path;

use clawpot_core::MachineId;
use clawpot_core::ports::{DiskFile, Machine};
use clawpot_failpoint::{self as failpoint, Point};
use clawpot_host::fs::{ensure_dir, hard_link, remove_tree_if_exists, replace_unsynced};
use clawpot_types::guest::{MAX_EXTRA_DISKS, disk_device};
use clawpot_types::{Error, Kind, Result};
use rustix::fs::{CWD, FileType, Mode};
use serde::{Deserialize, Serialize};

use super::{DISK, INITRAMFS, Jail, KERNEL, ROOTFS};

/// `machine.json`.
#[derive(Debug, Serialize, Deserialize)]
struct Manifest {
    version: u32,
    /// Of the host, when it was prepared.
    boot_id: String,
    /// The machine, for whoever reads the directory.
    vm: String,
    name: String,
    uid: u32,
}

const MANIFEST_VERSION: u32 = 1;

/// How far a directory has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    Absent,
    HalfMade,
    Stale,
    Prepared,
    Started,
}

impl State {
    pub(super) const fn explain(self) -> &'static str {
        match self {
            Self::Absent => "its directory is gone",
            Self::HalfMade => "its preparation was interrupted",
            Self::Stale => "the host was rebooted",
            // Not said of this one: it has not ended.
            Self::Prepared => "it was not started",
            Self::Started => "it ended while no server watched",
        }
    }
}

pub(super) fn look(jail: &Jail) -> Result<State> {
    let what = || format!("looking at {}", jail.dir().display());
    let text = match std::fs::read(jail.manifest()) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return match jail.dir().try_exists() {
                Ok(true) => Ok(State::HalfMade),
                Ok(false) => Ok(State::Absent),
                Err(error) => Err(Error::io(what(), error)),
            };
        }
        Err(error) => return Err(Error::io(what(), error)),
    };
    // It is written whole by us; what cannot be read is of no use to anyone, and no process is at stake here.
    let Ok(manifest) = serde_json::from_slice::<Manifest>(&text) else { return Ok(State::HalfMade) };
    if manifest.boot_id != clawpot_host::boot_id()? {
        return Ok(State::Stale);
    }
    match jail.process().try_exists() {
        Ok(true) => Ok(State::Started),
        Ok(false) => Ok(State::Prepared),
        Err(error) => Err(Error::io(what(), error)),
    }
}

/// Whose its VMM is, which nobody else on the host is; `None`: it has no manifest, or none that can be read.
pub(super) fn user(jail: &Jail) -> Result<Option<u32>> {
    match std::fs::read(jail.manifest()) {
        Ok(text) => Ok(serde_json::from_slice::<Manifest>(&text).ok().map(|manifest| manifest.uid)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::io(format!("looking at {}", jail.dir().display()), error)),
    }
}

pub(super) fn make(base: &Path, jail: &Jail, machine: &Machine) -> Result<()> {
    let seat = &machine.seat;
    make_parents(base)?;
    ensure_dir(jail.dir(), 0o700)?;
    let root = jail.root();
    ensure_dir(&root, 0o755)?;
    failpoint::reached(Point::JailRootMade);
    for (from, name) in
        [(&machine.files.kernel, KERNEL), (&machine.files.initramfs, INITRAMFS), (&machine.files.rootfs, ROOTFS)]
    {
        hard_link(from, &jail.file(name))?;
        failpoint::reached(Point::JailLinked);
    }
    // By its own name, which nobody but us can change, before it lies where the VMM could.
    give(&machine.disk, 0o600, (seat.uid, seat.gid))?;
    failpoint::reached(Point::JailDiskGiven);
    hard_link(&machine.disk, &jail.file(DISK))?;
    failpoint::reached(Point::JailDiskLinked);
    attach(jail, machine)?;
    make_fifo(&jail.console())?;
    failpoint::reached(Point::JailConsoleMade);
    Ok(())
}

/// The extra disks, by the names that the guest's kernel gives them.
fn attach(jail: &Jail, machine: &Machine) -> Result<()> {
    let extra_disks = &machine.extra_disks;
    if extra_disks.len() > MAX_EXTRA_DISKS {
        let what = format!("{} extra disks: a machine has at most {MAX_EXTRA_DISKS}", extra_disks.len());
        return Err(Error::new(Kind::InvalidArgument, what));
    }
    for (index, DiskFile { file, read_only, .. }) in extra_disks.iter().enumerate() {
        let (mode, owner) = match read_only {
            true => (0o444, (0, 0)),
            false => (0o600, (machine.seat.uid, machine.seat.gid)),
        };
        give(file, mode, owner)?;
        hard_link(file, &jail.file(&disk_device(index)))?;
        failpoint::reached(Point::JailAttached);
    }
    Ok(())
}

/// The extra disks are root's again: they outlive the machine, and another VM gets its user.
fn take_back(jail: &Jail) -> Result<()> {
    for index in 0..MAX_EXTRA_DISKS {
        let path = jail.file(&disk_device(index));
        let what = || format!("taking {} back", path.display());
        match lchown(&path, Some(0), Some(0)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(Error::io(what(), error)),
            _ => {}
        }
    }
    Ok(())
}

/// What is prepared is prepared from here on.
pub(super) fn complete(jail: &Jail, machine: &Machine) -> Result<()> {
    let manifest = Manifest {
        version: MANIFEST_VERSION,
        boot_id: clawpot_host::boot_id()?,
        vm: machine.id.to_string(),
        name: machine.name.to_string(),
        uid: machine.seat.uid,
    };
    let text = serde_json::to_vec_pretty(&manifest)
        .map_err(|error| Error::new(Kind::Internal, "writing a machine's manifest").because(error))?;
    replace_unsynced(&jail.manifest(), &text, 0o600)?;
    failpoint::reached(Point::JailComplete);
    Ok(())
}

/// `STATE/jail` and `STATE/jail/<vmm>`.
fn make_parents(base: &Path) -> Result<()> {
    if let Some(jails) = base.parent() {
        ensure_dir(jails, 0o700)?;
    }
    ensure_dir(base, 0o700)
}

fn give(path: &Path, mode: u32, (uid, gid): (u32, u32)) -> Result<()> {
    std::fs::set_permissions(path, Permissions::from_mode(mode))
        .map_err(|error| Error::io(format!("giving {} its mode", path.display()), error))?;
    chown(path, Some(uid), Some(gid)).map_err(|error| {
        let error = Error::io(format!("giving {} to uid {uid}", path.display()), error);
        if error.kind() == Kind::PermissionDenied { error.hint("run clawpot-server as root") } else { error }
    })
}

fn make_fifo(path: &Path) -> Result<()> {
    match rustix::fs::mknodat(CWD, path, FileType::Fifo, Mode::from_raw_mode(0o600), 0) {
        Ok(()) | Err(rustix::io::Errno::EXIST) => Ok(()),
        Err(errno) => Err(Error::io(format!("making the FIFO {}", path.display()), errno.into())),
    }
}

/// The manifest goes first: what is left of an interrupted removal is not taken for a prepared machine.
pub(super) fn remove(jail: &Jail) -> Result<()> {
    clawpot_host::fs::remove_file_if_exists(&jail.manifest())?;
    failpoint::reached(Point::JailManifestGone);
    take_back(jail)?;
    remove_tree_if_exists(jail.dir())?;
    failpoint::reached(Point::JailGone);
    Ok(())
}

pub(super) fn list(base: &Path) -> Result<Vec<MachineId>> {
    let what = || format!("listing {}", base.display());
    let entries = match std::fs::read_dir(base) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Error::io(what(), error)),
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry.map_err(|error| Error::io(what(), error))?;
        found.extend(entry.file_name().to_str().and_then(|name| name.parse().ok()));
    }
    Ok(found)
}
