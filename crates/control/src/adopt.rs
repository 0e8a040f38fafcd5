//! At start: read every record, give each VM its runner, show what cannot be read, and keep away from what nobody knows.

use std::sync::Arc;

use clawpot_types::Result;
use tracing::{error, info};

use crate::records::{Records, Row};
use crate::service::Service;
use crate::{Deps, keep};

/// Brings control up over what the store says. VMs that ran go on running; each runner finds its machine by name.
pub async fn start(deps: Deps) -> Result<Service> {
    let records = Arc::new(Records::load(deps.store.clone()).await?);
    let service = Service::new(deps, records);
    // Before anything can be asked for: no new VM gets a slot of which something is left.
    let strays = keep::stray_slots(&service).await;
    service.block(&strays);
    keep::look_for_strays(&service).await;
    service.recover_volumes().await;
    let rows = service.records.rows_after(None);
    for (id, row) in &rows {
        match row {
            Row::Known { .. } => service.run(id),
            Row::Unreadable { why, .. } => error!(vm = %id, why, "quarantined: its record cannot be read"),
        }
    }
    info!(vms = rows.len(), "records read");
    service.keep_house(strays);
    service.warm().await;
    Ok(service)
}
