//! At start: read every record, give each VM its runner, show what cannot be read, forget requests of days ago.

use std::sync::Arc;

use clawpot_core::ports::{Durability, Expect, Guard, Op, Txn};
use clawpot_types::Result;
use tracing::{error, info, warn};

use crate::Deps;
use crate::records::{Records, Row};
use crate::service::Service;
use crate::service::create::Request;

/// Brings control up over what the store says. VMs that ran go on running; each runner finds its machine by name.
pub async fn start(deps: Deps) -> Result<Service> {
    let records = Arc::new(Records::load(deps.store.clone()).await?);
    let service = Service::new(deps, records);
    let rows = service.records.rows_after(None);
    for (id, row) in &rows {
        match row {
            Row::Known { .. } => service.run(id),
            Row::Unreadable { why, .. } => error!(vm = %id, why, "quarantined: its record cannot be read"),
        }
    }
    info!(vms = rows.len(), "records read");
    if let Err(error) = forget_old_requests(&service).await {
        warn!(error = error.chain(), "forgetting old requests");
    }
    sweep_slots(&service).await;
    service.warm().await;
    Ok(service)
}

/// Slots of which something is on the host though no VM has them: left of a pool, or of a crash while one was made.
async fn sweep_slots(service: &Service) {
    let taken = service.records.slots_taken();
    let found = match service.deps.net.list().await {
        Ok(found) => found,
        Err(error) => return warn!(error = error.chain(), "looking for slots left behind"),
    };
    for slot in found.into_iter().filter(|slot| !taken.contains(slot)) {
        if let Err(error) = service.deps.net.remove(slot).await {
            warn!(%slot, error = error.chain(), "removing a slot that no VM has");
        }
    }
}

async fn forget_old_requests(service: &Service) -> Result<()> {
    let now = service.deps.clock.now();
    let store = service.records.store();
    for entry in store.list("requests/").await?.entries {
        // What cannot be read cannot make a create idempotent either.
        let old = serde_json::from_slice::<Request>(&entry.value)
            .map_or(true, |request| now.since(request.at) > service.deps.settings.request_memory);
        if old {
            let guards = vec![Guard { key: entry.key.clone(), expect: Expect::Revision(entry.revision) }];
            store.txn(Txn { guards, ops: vec![Op::Delete { key: entry.key }], durability: Durability::Normal }).await?;
        }
    }
    Ok(())
}
