//! Drain: the other way to go. Every VM is stopped in an orderly way before the daemon leaves.

use std::time::Duration;

use clawpot_core::{Desired, Phase};
use clawpot_types::{Error, Kind, Millis, Result};
use tracing::warn;

use super::Service;
use crate::records::Row;

/// Beyond the grace that each guest gets.
const SLACK: Duration = Duration::from_secs(15);

impl Service {
    /// Stops every VM and waits until none has a process. `Timeout` names one that has.
    pub async fn drain(&self, actor: &str) -> Result<()> {
        let mut patience = SLACK;
        for (id, row) in self.records.rows_after(None) {
            let Row::Known { record, .. } = row else { continue };
            patience = patience.max(SLACK + record.stop_grace.into());
            if record.desired == Desired::Running
                && let Err(error) = self.stop(id.as_str(), Millis(0), actor).await
            {
                warn!(vm = %id, error = error.chain(), "drain: cannot stop it");
            }
        }
        match tokio::time::timeout(patience, self.until_quiet()).await {
            Ok(()) => Ok(()),
            Err(_) => Err(Error::new(Kind::Timeout, format!("drain: {} still runs", self.noisy().unwrap_or_default()))),
        }
    }

    async fn until_quiet(&self) {
        let mut changes = self.records.subscribe();
        while self.noisy().is_some() {
            // Lagged or not: look again.
            changes.recv().await.map_or_else(drop, drop);
        }
    }

    /// One VM that is not at rest.
    fn noisy(&self) -> Option<String> {
        let at_rest = |phase| matches!(phase, Phase::Stopped | Phase::Failed | Phase::Quarantined);
        let mut rows = self.records.rows_after(None).into_iter();
        rows.find(|(_, row)| !at_rest(row.phase())).map(|(id, row)| format!("VM {id} ({})", row.phase()))
    }
}
