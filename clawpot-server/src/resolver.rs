//! Keeps the guests' resolver alive: a process of its own that goes on while no server runs.

use std::path::PathBuf;
use std::time::Duration;

use clawpot_edge::keeper::{Kept, Resolver};
use clawpot_host::cgroup::Cgroups;
use clawpot_host::process::{User, find_program};
use clawpot_net::ResolverSeat;
use clawpot_types::{Error, InstanceId, Result};
use tokio::task::JoinHandle;
use tracing::warn;

use crate::config::Config;

/// How soon a resolver that died is missed. Guests ask again after some seconds by themselves.
const EVERY: Duration = Duration::from_secs(2);

#[derive(Debug)]
pub struct Keeper {
    resolver: Resolver,
    task: JoinHandle<()>,
}

impl Keeper {
    /// The resolver runs when this returns. Without one VMs still run, and reach addresses though not names.
    pub async fn start(config: &Config, instance: &InstanceId, seat: ResolverSeat) -> Result<Self> {
        let resolver = resolver(config, instance, seat)?;
        resolver.ensure().await?;
        let kept = resolver.clone();
        let task = tokio::spawn(async move {
            loop {
                tokio::time::sleep(EVERY).await;
                match kept.ensure().await {
                    Ok(Kept::Running) => {}
                    Ok(Kept::Started) => warn!("the resolver had ended; another one runs"),
                    Err(error) => warn!(error = error.chain(), "no resolver: VMs resolve no names"),
                }
            }
        });
        Ok(Self { resolver, task })
    }

    /// It goes on without this server.
    pub fn leave(&self) {
        self.task.abort();
    }

    /// Nothing of it is left.
    pub async fn remove(&mut self) -> Result<()> {
        self.task.abort();
        // A start that was under way is over before its traces are looked for; it ends by being aborted.
        (&mut self.task).await.unwrap_or_default();
        self.resolver.remove().await
    }
}

/// Ends one that a server has left, where no server runs.
pub async fn remove(config: &Config, instance: &InstanceId, seat: ResolverSeat) -> Result<()> {
    resolver(config, instance, seat)?.remove().await
}

fn resolver(config: &Config, instance: &InstanceId, seat: ResolverSeat) -> Result<Resolver> {
    Ok(Resolver {
        program: program(config)?,
        user: User { uid: seat.uid, gid: seat.gid },
        address: seat.address,
        cgroup: Cgroups::find()?.group(&format!("clawpot/{instance}/resolver"))?,
        log: config.state_dir.join("resolver.log"),
        resolv_conf: config.resolv_conf.clone(),
    })
}

/// Beside this program, where both were installed or built; else in `PATH`.
fn program(config: &Config) -> Result<PathBuf> {
    if let Some(edge) = &config.edge {
        return Ok(edge.clone());
    }
    let own = std::env::current_exe().map_err(|error| Error::io("finding this program", error))?;
    let beside = own.with_file_name("clawpot-edge");
    if beside.is_file() {
        return Ok(beside);
    }
    find_program("clawpot-edge", std::env::var_os("PATH").as_deref())
        .map_err(|error| error.hint("build it: cargo build -p clawpot-edge; or name it with --edge"))
}
