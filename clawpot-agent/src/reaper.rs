//! The one owner of `waitpid`.
//!
//! A process is started and entered into the table under one lock, and children are waited for under the same lock: an exit
//! can neither be missed nor be taken for that of a later process with the same number.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use rustix::process::{Pid, WaitOptions, WaitStatus, wait, waitpid};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

use crate::lock;

/// Whose deaths are ours to collect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// PID 1: orphans too.
    Everyone,
    /// A process with children of others (a test): only those started here.
    Started,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    Code(i32),
    /// Linux signal number.
    Signal(i32),
}

#[derive(Clone, Copy, Debug)]
pub struct Exit {
    pub end: End,
    /// When it was collected.
    pub at: Instant,
}

#[derive(Debug)]
pub struct Reaper {
    scope: Scope,
    waiting: Mutex<HashMap<i32, oneshot::Sender<Exit>>>,
}

impl Reaper {
    #[must_use]
    pub fn new(scope: Scope) -> Arc<Self> {
        Arc::new(Self { scope, waiting: Mutex::default() })
    }

    /// Runs `start`, which makes one child and returns it; the receiver gets its exit.
    /// On an error of `start` the child, if there was one, has been collected by it.
    pub fn spawn<E>(&self, start: impl FnOnce() -> Result<Pid, E>) -> Result<(Pid, oneshot::Receiver<Exit>), E> {
        let mut waiting = lock(&self.waiting);
        let pid = start()?;
        let (sender, receiver) = oneshot::channel();
        waiting.insert(pid.as_raw_nonzero().get(), sender);
        Ok((pid, receiver))
    }

    /// Sends `number` to a process started here, or to its group. `false`: it has ended.
    pub fn signal(&self, pid: Pid, group: bool, number: i32) -> io::Result<bool> {
        let waiting = lock(&self.waiting);
        let raw = pid.as_raw_nonzero().get();
        if !waiting.contains_key(&raw) {
            return Ok(false);
        }
        // SAFETY: kill takes two integers and touches no memory of ours.
        if unsafe { libc::kill(if group { -raw } else { raw }, number) } == 0 {
            return Ok(true);
        }
        match io::Error::last_os_error() {
            gone if gone.raw_os_error() == Some(libc::ESRCH) => Ok(false),
            other => Err(other),
        }
    }

    /// Collects everyone who has ended by now.
    pub fn reap(&self) {
        let mut waiting = lock(&self.waiting);
        match self.scope {
            Scope::Everyone => {
                // An error means that there is no child at all.
                while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
                    tell(waiting.remove(&pid.as_raw_nonzero().get()), status);
                }
            }
            Scope::Started => {
                let started: Vec<Pid> = waiting.keys().filter_map(|raw| Pid::from_raw(*raw)).collect();
                for pid in started {
                    if let Ok(Some((pid, status))) = waitpid(Some(pid), WaitOptions::NOHANG) {
                        tell(waiting.remove(&pid.as_raw_nonzero().get()), status);
                    }
                }
            }
        }
    }

    /// Reaps at each SIGCHLD, for ever. The handler is installed before this returns.
    pub fn watch(self: &Arc<Self>) -> io::Result<impl Future<Output = ()> + Send + 'static> {
        let mut deaths = signal(SignalKind::child())?;
        let reaper = self.clone();
        Ok(async move {
            loop {
                reaper.reap();
                if deaths.recv().await.is_none() {
                    return;
                }
            }
        })
    }
}

fn tell(waiter: Option<oneshot::Sender<Exit>>, status: WaitStatus) {
    let Some(waiter) = waiter else { return };
    let end = match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => End::Code(code),
        (None, Some(signal)) => End::Signal(signal),
        // Neither can be: without WUNTRACED only ends are reported.
        (None, None) => return,
    };
    // Nobody waits any more for an exec that was given up.
    waiter.send(Exit { end, at: Instant::now() }).unwrap_or_default();
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The only test of this binary that makes children: it collects all of them.
    #[tokio::test]
    async fn everyone_is_collected_whatever_group_they_are_in() {
        let reaper = Reaper::new(Scope::Everyone);
        tokio::spawn(reaper.watch().unwrap());
        #[allow(clippy::disallowed_methods, reason = "a child that nobody but the reaper waits for")]
        let start = || -> io::Result<Pid> {
            use std::os::unix::process::CommandExt;
            let child = std::process::Command::new("sh").args(["-c", "exit 7"]).process_group(0).spawn()?;
            Ok(i32::try_from(child.id()).ok().and_then(Pid::from_raw).unwrap())
        };
        let (pid, exit) = reaper.spawn(start).unwrap();
        assert_eq!(exit.await.unwrap().end, End::Code(7));
        assert!(!reaper.signal(pid, false, libc::SIGKILL).unwrap());
    }
}
