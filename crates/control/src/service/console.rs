//! The console of a VM, living or not.

use bytes::Bytes;
use clawpot_core::ports::BoxStream;
use clawpot_types::Result;

use super::Service;

impl Service {
    /// What is kept (the last `lines` lines, 0: all), then what comes.
    pub async fn console(&self, vm: &str, lines: usize, follow: bool) -> Result<BoxStream<Result<Bytes>>> {
        let (id, _) = self.get(vm)?;
        self.deps.console.read(&id, lines, follow).await
    }
}
