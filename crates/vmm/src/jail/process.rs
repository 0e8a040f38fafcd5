//! A machine's process. Everything here blocks, for the time of a fork and an exec.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use clawpot_core::VmmFact;
use clawpot_failpoint::{self as failpoint, Point};
use clawpot_host::cgroup::Limits;
use clawpot_host::fs::replace_unsynced;
use clawpot_host::process::{Identity, Output, Proof, Spawn};
use clawpot_types::{Error, Kind, Result};
use rustix::io::Errno;
use rustix::process::Signal;

use super::{Jail, Jails, directory};

pub(super) fn start<F>(jails: &Jails, jail: &Jail, limits: &Limits, spawn: F) -> Result<()>
where
    F: FnOnce(&Jail) -> Result<Spawn>,
{
    match jails.look(jail)? {
        Some(VmmFact::Running { .. }) => return Ok(()),
        Some(VmmFact::Unproven { why }) => return Err(Error::new(Kind::FailedPrecondition, why)),
        Some(VmmFact::Prepared) => {}
        Some(VmmFact::Exited { how }) => {
            return Err(Error::new(Kind::FailedPrecondition, format!("{how}; it cannot be started again")));
        }
        None => return Err(Error::new(Kind::FailedPrecondition, "it is not prepared")),
    }
    jail.cgroup().create(&limits.without(&jails.inner.unlimited))?;
    failpoint::reached(Point::VmmGrouped);
    jails.inner.consoles.begin(jail.id())?;
    failpoint::reached(Point::VmmConsoleBegun);
    let output = || crate::console::open(&jail.console()).map(Output::To);
    let child = spawn(jail)?.stdout(output()?).stderr(output()?).cgroup(jail.cgroup())?.spawn()?;
    failpoint::reached(Point::VmmForked);
    let pid = child.pid();
    jails.children().insert(jail.id().clone(), Arc::new(child));
    // A crash before this line leaves a process in the group: see `identify`.
    match Identity::of(pid) {
        Ok(identity) => write_down(jail, &identity)?,
        // It ended at once; that it was there is what must be known.
        Err(error) if error.kind() == Kind::NotFound => replace_unsynced(&jail.process(), b"", 0o600)?,
        Err(error) => return Err(error),
    }
    failpoint::reached(Point::VmmIdentified);
    Ok(())
}

fn write_down(jail: &Jail, identity: &Identity) -> Result<()> {
    let text = serde_json::to_vec_pretty(identity)
        .map_err(|error| Error::new(Kind::Internal, "writing a process's identity").because(error))?;
    replace_unsynced(&jail.process(), &text, 0o600)
}

/// The daemon that started it died before it wrote down whom. From now on it is known wherever somebody moves it; before, out of
/// its group it would be nobody's, and another started on the same disk.
pub(super) fn identify(jail: &Jail) -> Result<()> {
    if !matches!(identity(jail)?, Written::Nobody) {
        return Ok(());
    }
    let members = jail.cgroup().members()?;
    // Of several none can be told to be the first.
    let [member] = members.as_slice() else { return Ok(()) };
    match Identity::of(member.pid) {
        // Else the number is another's by now.
        Ok(identity) if jail.cgroup().holds(member.pid)? => write_down(jail, &identity),
        Ok(_) => Ok(()),
        Err(error) if error.kind() == Kind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

/// Why what lives in the machine's group is not the machine; `None`: it is, or is ending. It is somebody else's, who came by
/// its number or was put there; nobody but its owner may end that.
pub(super) fn strange(jail: &Jail) -> Result<Option<String>> {
    let path = jail.process();
    let why = match identity(jail)? {
        // The daemon died between fork and writing: whoever is in a group of this name was born into it.
        Written::Nobody => return Ok(None),
        Written::Unreadable => format!("{} cannot be read", path.display()),
        Written::By(identity) => match identity.prove()? {
            // A jailer has become its VMM: the same process.
            Proof::Alive(_) | Proof::OtherProgram(_) | Proof::Ending => return Ok(None),
            Proof::Moved { how, .. } => format!("process {}: {how}", identity.pid),
            Proof::Gone => format!("process {} has ended, and another is in its cgroup", identity.pid),
        },
    };
    // What was there a moment ago may have been its last.
    let others = jail.cgroup().members()?;
    Ok((!others.is_empty()).then(|| {
        let pids: Vec<_> = others.iter().map(|member| member.pid).collect();
        format!("machine {}: its process cannot be told from others' ({pids:?}): {why}", jail.id())
    }))
}

/// A machine's process that lives outside its cgroup: somebody moved it, and no limit and no kill of the group reaches it.
pub(super) struct Outside {
    pub(super) pidfd: OwnedFd,
    /// In one line.
    pub(super) why: String,
}

/// The number and the start of what was written down may by ill luck be another's; the machine's user is nobody else's.
pub(super) fn outside(jail: &Jail) -> Result<Option<Outside>> {
    let Written::By(identity) = identity(jail)? else { return Ok(None) };
    let Proof::Moved { pidfd, how } = identity.prove()? else { return Ok(None) };
    let user = directory::user(jail)?;
    let its = user.is_some() && user == clawpot_host::process::user_of(identity.pid)?;
    let alive = clawpot_host::process::is_alive(&pidfd);
    let alive = alive.map_err(|errno| Error::io(format!("looking at process {}", identity.pid), errno.into()))?;
    let why = format!("machine {}: its process {} lives and is not in its cgroup: {how}", jail.id(), identity.pid);
    Ok((its && alive).then_some(Outside { pidfd, why }))
}

/// Ends it wherever it is. The descriptor is the process that was proven, whatever becomes of the number.
pub(super) fn kill_outside(jail: &Jail) -> Result<()> {
    let Some(Outside { pidfd, why }) = outside(jail)? else { return Ok(()) };
    match rustix::process::pidfd_send_signal(&pidfd, Signal::KILL) {
        Ok(()) | Err(Errno::SRCH) => Ok(()),
        Err(errno) => Err(Error::io(format!("killing it: {why}"), errno.into())),
    }
}

enum Written {
    By(Identity),
    Nobody,
    Unreadable,
}

/// Who was started.
fn identity(jail: &Jail) -> Result<Written> {
    let path = jail.process();
    match std::fs::read(&path) {
        Ok(text) => Ok(serde_json::from_slice(&text).map_or(Written::Unreadable, Written::By)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Written::Nobody),
        Err(error) => Err(Error::io(format!("reading {}", path.display()), error)),
    }
}
