//! What makes a guest a builder: `clawpot_common::builder`'s protocol, on a port of its own, for the host alone.
//!
//! In order of a request's way: [`connection`] lines in and out → `build` one build from its disks to its end, which uses
//! `disks` what is mounted, `log` a bounded log, and `collect` the result onto the output disk. [`config`] says whether this
//! guest is a builder at all.

mod build;
mod collect;
pub mod config;
pub mod connection;
mod disks;
mod log;

use std::sync::Arc;

use tokio::sync::Semaphore;

use crate::exec::Shared;
pub use config::Config;
pub use connection::serve;

/// Connections at once; one more is closed. The host needs one for a build and one to ask how it is.
const CONNECTIONS: usize = 16;

/// What all connections share.
#[derive(Debug)]
pub struct Builder {
    config: Config,
    execs: Arc<Shared>,
    /// Its one permit is the running build's, until everything of it is cleared away.
    building: Arc<Semaphore>,
    connections: Arc<Semaphore>,
}

impl Builder {
    #[must_use]
    pub fn new(config: Config, execs: Arc<Shared>) -> Arc<Self> {
        let (building, connections) = (Arc::new(Semaphore::new(1)), Arc::new(Semaphore::new(CONNECTIONS)));
        Arc::new(Self { config, execs, building, connections })
    }
}

/// What could not be done, in words for the host.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Failure(String);

/// Says what was being done when an error came.
trait Context<T> {
    fn context(self, doing: impl std::fmt::Display) -> Result<T, Failure>;
}

impl<T, E: std::error::Error + 'static> Context<T> for Result<T, E> {
    fn context(self, doing: impl std::fmt::Display) -> Result<T, Failure> {
        self.map_err(|error| Failure(format!("{doing}: {}", crate::console::chain(&error))))
    }
}
