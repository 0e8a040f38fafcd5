//! Telling one process from another across restarts of the daemon and of the host.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;

use clawpot_types::{Error, Kind, Result};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags};
use serde::{Deserialize, Serialize};

/// Which process was meant. Taken while it lives, kept on disk, proven later.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    pub boot_id: String,
    pub pid: u32,
    /// Start time in clock ticks since the host's boot (field 22 of `/proc/PID/stat`).
    pub start_ticks: u64,
    /// Device and inode of its program. A jailed process's `/proc/PID/exe` names a path inside its jail, so paths tell nothing.
    pub exe: (u64, u64),
    /// In the version-2 hierarchy, as `/proc/PID/cgroup` says it.
    pub cgroup: String,
}

#[derive(Debug)]
pub enum Proof {
    /// It is that process, held by this descriptor, and it lives.
    Alive(OwnedFd),
    Gone,
    /// It is that process, and it is about to be gone: its main thread has ended, another has not.
    Ending,
    /// The same process as far as its number and its start tell, in another cgroup: somebody moved it.
    Moved {
        pidfd: OwnedFd,
        how: String,
    },
    /// The same process, which has executed another program since.
    OtherProgram(String),
}

impl Identity {
    /// Of a living process. `NotFound`: there is none of this number.
    pub fn of(pid: u32) -> Result<Self> {
        let gone = || Error::new(Kind::NotFound, format!("identifying process {pid}: it is gone"));
        let pidfd = hold(pid)?.ok_or_else(gone)?;
        let read = Self::read(pid)?;
        let alive = super::is_alive(&pidfd).map_err(|errno| crate::failed(identifying(pid), errno))?;
        read.filter(|_| alive).ok_or_else(gone)
    }

    /// What `/proc` says of this number; `None` when it says nothing (any more), or of a zombie.
    fn read(pid: u32) -> Result<Option<Self>> {
        let Some(stat) = read_proc(pid, "stat")? else { return Ok(None) };
        let start_ticks = start_ticks(&stat)
            .ok_or_else(|| Error::new(Kind::Internal, format!("{}: unreadable stat {stat:?}", identifying(pid))))?;
        let exe = match std::fs::metadata(format!("/proc/{pid}/exe")) {
            Ok(meta) => (meta.dev(), meta.ino()),
            Err(error) if is_gone(&error) => return Ok(None),
            Err(error) => return Err(Error::io(identifying(pid), error)),
        };
        let Some(cgroup) = cgroup_of(pid)? else { return Ok(None) };
        Ok(Some(Self { boot_id: crate::boot_id()?, pid, start_ticks, exe, cgroup }))
    }

    /// Whether it lives: hold whoever has the number now, compare, look whether it is still there. An error means that
    /// nothing is known, not that it is gone.
    pub fn prove(&self) -> Result<Proof> {
        if self.boot_id != crate::boot_id()? {
            return Ok(Proof::Gone);
        }
        let Some(pidfd) = hold(self.pid)? else { return Ok(Proof::Gone) };
        let Some(now) = Self::read(self.pid)? else { return self.prove_ending(&pidfd) };
        let alive = super::is_alive(&pidfd).map_err(|errno| crate::failed(identifying(self.pid), errno))?;
        if !alive || now.start_ticks != self.start_ticks {
            return Ok(Proof::Gone);
        }
        if now.cgroup != self.cgroup {
            let how = format!("its cgroup is {:?}, not {:?}", now.cgroup, self.cgroup);
            return Ok(Proof::Moved { pidfd, how });
        }
        if now.exe != self.exe {
            return Ok(Proof::OtherProgram(format!("its program is {:?}, not {:?}", now.exe, self.exe)));
        }
        Ok(Proof::Alive(pidfd))
    }

    /// Of a process whose program cannot be told any more.
    fn prove_ending(&self, pidfd: &OwnedFd) -> Result<Proof> {
        let began = read_proc(self.pid, "stat")?.and_then(|stat| start_ticks(&stat));
        let alive = super::is_alive(pidfd).map_err(|errno| crate::failed(identifying(self.pid), errno))?;
        Ok(if alive && began == Some(self.start_ticks) { Proof::Ending } else { Proof::Gone })
    }
}

fn identifying(pid: u32) -> String {
    format!("identifying process {pid}")
}

fn hold(pid: u32) -> Result<Option<OwnedFd>> {
    let Some(raw) = i32::try_from(pid).ok().and_then(Pid::from_raw) else { return Ok(None) };
    match rustix::process::pidfd_open(raw, PidfdFlags::empty()) {
        Ok(pidfd) => Ok(Some(pidfd)),
        Err(Errno::SRCH) => Ok(None),
        Err(errno) => Err(crate::failed(identifying(pid), errno)),
    }
}

/// The version-2 cgroup of a process, as the reader's cgroup namespace sees it.
pub(crate) fn cgroup_of(pid: u32) -> Result<Option<String>> {
    let text = read_proc(pid, "cgroup")?;
    Ok(text.and_then(|text| text.lines().find_map(|line| line.strip_prefix("0::").map(str::to_owned))))
}

/// The user whose process it is (the real one); `None`: it is gone.
pub fn user_of(pid: u32) -> Result<Option<u32>> {
    let Some(status) = read_proc(pid, "status")? else { return Ok(None) };
    let user = status.lines().find_map(|line| line.strip_prefix("Uid:")?.split_whitespace().next()?.parse().ok());
    let unreadable = || Error::new(Kind::Internal, format!("{}: its status names no user", identifying(pid)));
    user.map(Some).ok_or_else(unreadable)
}

/// Whether it is a thread of the kernel's; `None`: it is gone. KVM (Linux 6.1 seen) puts one, `kvm-nx-lpage-recovery`, into
/// the cgroup of whoever makes a virtual machine. It is root's, cannot be killed, and ends with that machine.
pub(crate) fn is_kernel_thread(pid: u32) -> Result<Option<bool>> {
    let Some(stat) = read_proc(pid, "stat")? else { return Ok(None) };
    let unreadable = || Error::new(Kind::Internal, format!("{}: unreadable stat {stat:?}", identifying(pid)));
    kernel_thread(&stat).map(Some).ok_or_else(unreadable)
}

/// `PF_KTHREAD` of `include/linux/sched.h`, in the flags (field 9).
fn kernel_thread(stat: &str) -> Option<bool> {
    const KERNEL_THREAD: u64 = 0x0020_0000;
    let (_, rest) = stat.rsplit_once(')')?;
    let flags: u64 = rest.split_whitespace().nth(6)?.parse().ok()?;
    Some(flags & KERNEL_THREAD != 0)
}

fn read_proc(pid: u32, file: &str) -> Result<Option<String>> {
    match std::fs::read(format!("/proc/{pid}/{file}")) {
        Ok(bytes) => Ok(Some(String::from_utf8_lossy(&bytes).into_owned())),
        Err(error) if is_gone(&error) => Ok(None),
        Err(error) => Err(Error::io(identifying(pid), error)),
    }
}

fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(Errno::SRCH.raw_os_error())
}

/// The program's name, field 2, stands in parentheses and may hold anything: fields are counted after the last one.
fn start_ticks(stat: &str) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_start_time_is_found_behind_any_name() {
        let stat = "42 (a) b) c) S 1 42 42 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 987654 1000 10 18446744073709551615";
        assert_eq!(start_ticks(stat), Some(987_654));
        assert_eq!(kernel_thread(stat), Some(false));
        let kernels = "367 (kvm-nx-lpage-recovery-1) S 2 0 0 0 -1 2097216 0 0 0 0 0 0 0 0 20 0 1 0 987654 0 0 184";
        assert_eq!(kernel_thread(kernels), Some(true));
        assert_eq!(is_kernel_thread(std::process::id()).unwrap(), Some(false));
        assert_eq!(start_ticks("42 (a"), None);
        assert_eq!(user_of(std::process::id()).unwrap(), Some(rustix::process::getuid().as_raw()));
        assert_eq!(user_of(u32::MAX).unwrap(), None);
    }

    #[test]
    fn this_process_is_itself_and_no_other() {
        let own = Identity::of(std::process::id()).unwrap();
        assert!(matches!(own.prove().unwrap(), Proof::Alive(_)));
        let earlier = Identity { start_ticks: own.start_ticks - 1, ..own.clone() };
        assert!(matches!(earlier.prove().unwrap(), Proof::Gone));
        let other_boot = Identity { boot_id: "another".to_owned(), ..own.clone() };
        assert!(matches!(other_boot.prove().unwrap(), Proof::Gone));
        let other_program = Identity { exe: (0, 0), ..own.clone() };
        assert!(matches!(other_program.prove().unwrap(), Proof::OtherProgram(_)));
        let moved = Identity { cgroup: "/elsewhere".to_owned(), ..own };
        assert!(matches!(moved.prove().unwrap(), Proof::Moved { .. }));
        assert_eq!(Identity::of(u32::MAX).unwrap_err().kind(), Kind::NotFound);
    }
}
