//! What this host has.

use std::path::{Path, PathBuf};

use async_trait::async_trait;
use clawpot_core::admission::Room;
use clawpot_core::ports::HostRoom;
use clawpot_types::{Error, Kind, MiB, Result};

#[derive(Debug)]
pub struct ThisHost {
    state_dir: PathBuf,
}

impl ThisHost {
    pub fn new(state_dir: &Path) -> Self {
        Self { state_dir: state_dir.to_owned() }
    }
}

#[async_trait]
impl HostRoom for ThisHost {
    async fn look(&self) -> Result<Room> {
        let (memory, memory_available) = memory()?;
        let disk = rustix::fs::statvfs(&self.state_dir).map_err(|error| {
            Error::io(format!("{}: asking for its free space", self.state_dir.display()), error.into())
        })?;
        let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        Ok(Room {
            cpus: u32::try_from(cpus).unwrap_or(u32::MAX),
            memory,
            memory_available,
            disk: MiB::from_bytes(disk.f_blocks.saturating_mul(disk.f_frsize)),
            disk_free: MiB::from_bytes(disk.f_bavail.saturating_mul(disk.f_frsize)),
        })
    }
}

/// All memory and what may still be had of it (`MemAvailable`), from `/proc/meminfo`, in kB there.
fn memory() -> Result<(MiB, MiB)> {
    let text = std::fs::read_to_string("/proc/meminfo").map_err(|error| Error::io("reading /proc/meminfo", error))?;
    let field = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim_start_matches(':').split_whitespace().next()?.parse().ok().map(|kib: u64| MiB(kib >> 10))
    };
    field("MemTotal")
        .zip(field("MemAvailable"))
        .ok_or_else(|| Error::new(Kind::Internal, "/proc/meminfo: MemTotal or MemAvailable is missing"))
}

#[cfg(test)]
mod tests {
    use clawpot_core::admission::{Budgets, Claim, Policy, Resource};
    use rustix::mount::{MountFlags, MountPropagationFlags};

    use super::*;

    fn look(dir: &Path) -> Room {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(ThisHost::new(dir).look()).unwrap()
    }

    #[test]
    fn this_host_has_something() {
        let room = look(Path::new("/"));
        assert!(room.cpus > 0 && room.memory.0 > 0 && room.disk.0 > 0, "{room:?}");
        assert!(room.memory_available <= room.memory && room.disk_free <= room.disk, "{room:?}");
    }

    /// On a filesystem of 32 MiB, filled for real, in a mount namespace of this thread's own.
    #[test]
    fn a_full_disk_is_seen_and_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().to_owned();
        let test = move || {
            // SAFETY: it unshares this thread's mount namespace and working directory; no file descriptor is shared away.
            if unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNS) }.is_err() {
                eprintln!("SKIPPED: making a mount namespace needs CAP_SYS_ADMIN");
                return;
            }
            rustix::mount::mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
            rustix::mount::mount("tmpfs", &path, "tmpfs", MountFlags::empty(), c"size=32M").unwrap();
            let admitted = || {
                let budgets = Budgets::new(&Policy::default(), &look(&path), 8, Claim::default());
                budgets.admit(Claim { slots: 1, ..Claim::default() }).map_err(|short| short.resource)
            };
            assert_eq!(admitted(), Ok(()));
            std::io::Write::write_all(&mut std::fs::File::create(path.join("filler")).unwrap(), &vec![1u8; 30 << 20])
                .unwrap();
            assert_eq!(look(&path).disk_free, MiB(2));
            assert_eq!(admitted(), Err(Resource::FreeDisk));
            std::fs::remove_file(path.join("filler")).unwrap();
            assert_eq!(admitted(), Ok(()));
        };
        std::thread::spawn(test).join().unwrap();
    }
}
