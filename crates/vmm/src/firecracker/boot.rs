//! From a process that has been spawned to a guest that runs, from wherever it stands: what a daemon that died half-way
//! began, the next one finishes.

use std::os::fd::AsFd;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::Path;
use std::time::Duration;

use clawpot_core::ports::Seat;
use clawpot_failpoint::{self as failpoint, Point};
use clawpot_host::cgroup::{Cgroup, Member};
use clawpot_host::fs::replace_unsynced;
use clawpot_types::{Error, Kind, Result};
use tokio::time::Instant;

use super::api::{Boot, Call, InstanceInfo, InstanceState};
use super::client::Client;
use super::version::Version;
use crate::jail::API_SOCKET;

/// From the spawn to an API that answers. 18–45 ms were measured on a loaded host; see also the limit of a call.
const API_LIMIT: Duration = Duration::from_secs(30);
/// Between two attempts to connect; one costs about 20 µs.
const API_INTERVAL: Duration = Duration::from_millis(1);
/// In the machine's directory, beside its root: what the guest is booted with.
const BOOT_FILE: &str = "boot.json";
/// What the jailer gives to the VMM's user inside the root; "" is the root itself.
const GIVEN: [&str; 4] = ["", "run", "dev", "dev/net"];

/// A machine's places, as far as booting it needs them.
#[derive(Clone, Copy, Debug)]
pub struct Site<'a> {
    /// As given to the jailer's `--id`.
    pub id: &'a str,
    /// Holds `boot.json` and `root/`.
    pub dir: &'a Path,
    pub cgroup: &'a Cgroup,
}

/// Writes down what the guest is booted with. Blocks for well under a millisecond.
pub fn write(dir: &Path, boot: &Boot) -> Result<()> {
    let text = serde_json::to_vec(boot)
        .map_err(|error| Error::new(Kind::Internal, "writing what a guest is booted with").because(error))?;
    replace_unsynced(&dir.join(BOOT_FILE), &text, 0o600)
}

fn read(dir: &Path) -> Result<Boot> {
    let path = dir.join(BOOT_FILE);
    let what = || format!("reading {}", path.display());
    let text = std::fs::read(&path).map_err(|error| Error::io(what(), error))?;
    serde_json::from_slice(&text).map_err(|error| Error::new(Kind::Corrupt, what()).because(error))
}

/// Tells Firecracker what to boot and to boot it, unless it has. Returns before the guest has run.
/// `FailedPrecondition`: it refused, in its own words; `Unavailable`: its process ended.
pub async fn boot(site: &Site<'_>, seat: &Seat) -> Result<()> {
    let root = site.dir.join("root");
    let client = Client::new(root.join(API_SOCKET));
    let process = process(site.cgroup)?;
    let info = first_answer(&client, &process).await?;
    if info.id != site.id {
        let what = format!("Firecracker: it says that it is {:?}, not {:?}", info.id, site.id);
        return Err(Error::new(Kind::FailedPrecondition, what));
    }
    if !site.cgroup.members()?.iter().any(|member| member.pid == process.pid) {
        let what = format!("Firecracker: process {} is not in the cgroup {} any more", process.pid, site.cgroup.name());
        return Err(Error::new(Kind::FailedPrecondition, what));
    }
    match info.state {
        InstanceState::Running | InstanceState::Paused => return Ok(()),
        InstanceState::NotStarted => {}
    }
    let boot = read(site.dir)?;
    let version: Version = client.version().await?.firecracker_version.parse()?;
    open(&root, seat)?;
    failpoint::reached(Point::FirecrackerOpened);
    for call in boot.calls(&version)? {
        client.tell(&call).await?;
        failpoint::reached(Point::FirecrackerTold);
    }
    close(&root)?;
    failpoint::reached(Point::FirecrackerClosed);
    client.tell(&Call::start()?).await?;
    failpoint::reached(Point::FirecrackerStarted);
    Ok(())
}

fn process(cgroup: &Cgroup) -> Result<Member> {
    cgroup.members()?.into_iter().next().ok_or_else(ended)
}

fn ended() -> Error {
    Error::new(Kind::Unavailable, "Firecracker: it ended before its API answered")
        .hint("see its last words in the console log: clawpot logs")
}

async fn first_answer(client: &Client, process: &Member) -> Result<InstanceInfo> {
    let deadline = Instant::now() + API_LIMIT;
    loop {
        let refused = match client.info().await {
            Ok(info) => return Ok(info),
            Err(error) => error,
        };
        // No socket yet, or one on which nobody listens yet.
        if !matches!(refused.kind(), Kind::NotFound | Kind::Unavailable) {
            return Err(refused);
        }
        let alive = clawpot_host::process::is_alive(&process.pidfd.as_fd())
            .map_err(|errno| Error::io("Firecracker: looking whether it lives", errno.into()))?;
        if !alive {
            return Err(ended());
        }
        if Instant::now() >= deadline {
            let what = format!("Firecracker: its API does not answer after {} s", API_LIMIT.as_secs());
            return Err(Error::new(Kind::Timeout, what).because(refused));
        }
        tokio::time::sleep(API_INTERVAL).await;
    }
}

/// Lets the VMM make its sockets in its root.
fn open(root: &Path, seat: &Seat) -> Result<()> {
    give(root, (seat.uid, seat.gid), 0o700)
}

/// Takes the directories back before the guest's first instruction: whoever captures the VMM from inside can then neither
/// fill the disk nor put something else where the daemon connects (`v.sock` → another program's socket).
fn close(root: &Path) -> Result<()> {
    GIVEN.iter().try_for_each(|dir| give(&root.join(dir), (0, 0), 0o755))
}

fn give(dir: &Path, (uid, gid): (u32, u32), mode: u32) -> Result<()> {
    chown(dir, Some(uid), Some(gid))
        .and_then(|()| std::fs::set_permissions(dir, std::fs::Permissions::from_mode(mode)))
        .map_err(|error| Error::io(format!("giving {} to uid {uid}", dir.display()), error))
}
