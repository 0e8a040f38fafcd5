use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use clawpot_types::{Error, Result};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions};
use serde::{Deserialize, Serialize};

/// A child of this process. Dropping it neither kills nor loses it: the runtime goes on waiting, so that no zombie stays.
/// When this process ends first, init inherits it.
#[derive(Debug)]
pub struct Child {
    pid: Pid,
    pidfd: OwnedFd,
    /// Set once it is reaped; until then its number is not anyone else's.
    exit: Mutex<Option<Exit>>,
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Exit {
    Code(i32),
    Signal(i32),
}

impl Exit {
    #[must_use]
    pub const fn is_success(self) -> bool {
        matches!(self, Self::Code(0))
    }
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Code(code) => write!(f, "exit status {code}"),
            Self::Signal(signal) => write!(f, "killed by signal {signal}"),
        }
    }
}

impl Child {
    pub(super) fn new(pid: Pid, pidfd: OwnedFd) -> Self {
        Self { pid, pidfd, exit: Mutex::new(None) }
    }

    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid.as_raw_nonzero().get().unsigned_abs()
    }

    /// SIGKILL. Ended already is fine.
    pub fn kill(&self) -> Result<()> {
        self.tell(|| rustix::process::pidfd_send_signal(&self.pidfd, Signal::KILL))
    }

    /// SIGKILL to it and to whatever it started that has not left its session.
    pub fn kill_session(&self) -> Result<()> {
        self.tell(|| rustix::process::kill_process_group(self.pid, Signal::KILL))
    }

    fn tell(&self, how: impl FnOnce() -> Result<(), Errno>) -> Result<()> {
        let exit = self.exit();
        if exit.is_some() {
            return Ok(());
        }
        match how() {
            Ok(()) | Err(Errno::SRCH) => Ok(()),
            Err(errno) => Err(crate::failed(format!("killing process {}", self.pid()), errno)),
        }
    }

    /// Waits for its end and reaps it; again gives the same answer. Cancellation is harmless.
    pub async fn wait(&self) -> Result<Exit> {
        super::ended(&self.pidfd).await?;
        self.reap()
    }

    /// It has ended or is about to. Blocks until then.
    pub(super) fn reap(&self) -> Result<Exit> {
        let mut exit = self.exit();
        if let Some(exit) = *exit {
            return Ok(exit);
        }
        let reaped = reap(self.pidfd.as_fd(), self.pid)?;
        *exit = Some(reaped);
        Ok(reaped)
    }

    /// A panic while it was held left it whole: it is one assignment.
    fn exit(&self) -> MutexGuard<'_, Option<Exit>> {
        self.exit.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl AsFd for Child {
    /// Its pidfd.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

fn reap(pidfd: BorrowedFd<'_>, pid: Pid) -> Result<Exit> {
    let what = || format!("waiting for process {}", pid.as_raw_nonzero());
    let status = rustix::process::waitid(WaitId::PidFd(pidfd), WaitIdOptions::EXITED)
        .map_err(|errno| crate::failed(what(), errno))?
        .ok_or_else(|| Error::new(clawpot_types::Kind::Internal, format!("{}: nothing was told", what())))?;
    match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => Ok(Exit::Code(code)),
        (None, Some(signal)) => Ok(Exit::Signal(signal)),
        (None, None) => Err(Error::new(clawpot_types::Kind::Internal, format!("{}: {status:?}", what()))),
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // Without a runtime this process is about to end, and init reaps.
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        if self.exit().is_some() {
            return;
        }
        let pid = self.pid;
        let pidfd = self.pidfd.try_clone();
        drop(runtime.spawn(async move {
            if let Err(error) = outlive(pidfd, pid).await {
                tracing::warn!(pid = pid.as_raw_nonzero().get(), error = error.chain(), "child not reaped");
            }
        }));
    }
}

async fn outlive(pidfd: std::io::Result<OwnedFd>, pid: Pid) -> Result<Exit> {
    let pidfd = pidfd.map_err(|error| Error::io("keeping its pidfd", error))?;
    super::ended(&pidfd).await?;
    reap(pidfd.as_fd(), pid)
}
