//! `HostRoom` over the fake host.

use std::sync::Arc;

use async_trait::async_trait;
use clawpot_core::admission::Room;
use clawpot_core::ports::HostRoom;
use clawpot_types::Result;

use crate::faults::{Line, Method};
use crate::host::FakeHost;

#[derive(Debug)]
pub struct FakeRoom {
    host: Arc<FakeHost>,
    line: Line,
}

impl FakeRoom {
    /// Of the daemon that lives now.
    #[must_use]
    pub fn new(host: &Arc<FakeHost>) -> Self {
        Self { host: Arc::clone(host), line: host.faults.line() }
    }
}

#[async_trait]
impl HostRoom for FakeRoom {
    async fn look(&self) -> Result<Room> {
        self.line.call(Method::RoomLook, || Ok(self.host.lock().room)).await
    }
}
