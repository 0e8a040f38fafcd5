use std::net::SocketAddrV4;
use std::path::PathBuf;

use async_trait::async_trait;
use clawpot_types::{Millis, Result};

use super::BoxStream;
use crate::exec::{ExecInput, ExecOutput};
use crate::{MachineId, Timing};

/// The agent in a guest. Hostile: whatever comes from it is bounded and checked here.
#[async_trait]
pub trait Guest: Send + Sync {
    /// One attempt, at most a second. `Unavailable`/`Timeout`: not up yet; `FailedPrecondition`: another machine answers.
    async fn hello(&self, id: &MachineId, endpoint: &GuestEndpoint) -> Result<Hello>;

    /// One attachment to one exec; the first input is `Start` or `Attach`. Dropping the output ends the attachment, not the exec.
    async fn exec(
        &self,
        id: &MachineId,
        endpoint: &GuestEndpoint,
        input: BoxStream<ExecInput>,
    ) -> Result<BoxStream<Result<ExecOutput>>>;

    /// Asks for an orderly shutdown; the machine ends by itself within about `grace`.
    async fn shutdown(&self, id: &MachineId, endpoint: &GuestEndpoint, grace: Millis) -> Result<()>;

    /// Closes whatever connection is kept.
    fn forget(&self, id: &MachineId);
}

/// How the host reaches the agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GuestEndpoint {
    /// A Unix socket that speaks `CONNECT <port>\n`.
    Vsock(PathBuf),
    /// TCP, dialled from inside the netns.
    Tcp { netns: PathBuf, address: SocketAddrV4 },
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    pub protocol: u32,
    pub agent_version: String,
    pub kernel_release: String,
    /// Stretches of the boot on the guest's own clock: "booting.kernel", "booting.rootfs", "booting.agent".
    pub timings: Vec<Timing>,
}
