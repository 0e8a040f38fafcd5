//! Drain: the other way to go. Every VM is stopped in an orderly way before the daemon leaves.

use std::collections::BTreeSet;
use std::sync::atomic::Ordering;
use std::time::Duration;

use clawpot_core::{Desired, Phase};
use clawpot_types::{Error, Kind, Millis, Result, VmId};
use tracing::warn;

use super::Service;
use crate::records::Row;

/// Beyond the grace that each guest gets.
const SLACK: Duration = Duration::from_secs(15);

/// Between two looks, at most: what a VM that failed has left is seen by its runner, and is no change of its record.
const LOOK: Duration = Duration::from_millis(100);

impl Service {
    /// Stops every VM and waits until none has a process; from now on none is made or started. `Timeout` names one that has.
    pub async fn drain(&self, actor: &str) -> Result<()> {
        self.shared.draining.store(true, Ordering::SeqCst);
        let graces = self.records.rows_after(None).into_iter().filter_map(|(_, row)| match row {
            Row::Known { record, .. } => Some(Duration::from(record.stop_grace)),
            Row::Unreadable { .. } => None,
        });
        let patience = SLACK + graces.max().unwrap_or_default();
        match tokio::time::timeout(patience, self.until_quiet(actor)).await {
            Ok(()) => Ok(()),
            Err(_) => Err(Error::new(Kind::Timeout, format!("drain: {} still runs", self.noisy().unwrap_or_default()))),
        }
    }

    /// `Unavailable` once the server stops its VMs before it goes.
    pub(super) fn check_stays(&self, what: &str) -> Result<()> {
        if !self.shared.draining.load(Ordering::SeqCst) {
            return Ok(());
        }
        Err(Error::new(Kind::Unavailable, format!("{what}: the server is going, and stops its VMs"))
            .hint("ask again when it is back"))
    }

    async fn until_quiet(&self, actor: &str) {
        let mut changes = self.records.subscribe();
        let mut told = BTreeSet::new();
        loop {
            // Also what was being made or started when the drain began.
            self.stop_all(actor, &mut told).await;
            if self.noisy().is_none() {
                return;
            }
            // Lagged or not, or nothing at all: look again.
            tokio::time::timeout(LOOK, changes.recv()).await.map_or_else(drop, drop);
        }
    }

    async fn stop_all(&self, actor: &str, told: &mut BTreeSet<VmId>) {
        for (id, row) in self.records.rows_after(None) {
            if let Row::Known { record, .. } = row
                && record.desired == Desired::Running
                && let Err(error) = self.stop(id.as_str(), Millis(0), actor).await
                && told.insert(id.clone())
            {
                warn!(vm = %id, error = error.chain(), "drain: cannot stop it");
            }
        }
    }

    /// One VM that is not at rest.
    fn noisy(&self) -> Option<String> {
        let at_rest = |id: &VmId, row: &Row| match row.phase() {
            Phase::Stopped | Phase::Quarantined => true,
            // What failed may have its machine still.
            Phase::Failed => self.lives.is_bare(id),
            _ => false,
        };
        let mut rows = self.records.rows_after(None).into_iter();
        rows.find(|(id, row)| !at_rest(id, row)).map(|(id, row)| format!("VM {id} ({})", row.phase()))
    }
}
