//! `/metrics` (Prometheus text) on its own Unix socket. No VM's id is a label of anything.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::IntoResponse;
use axum::routing::get;
use clawpot_control::{Row, Service};
use clawpot_core::Phase;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};
use tokio::sync::broadcast::error::RecvError;
use tracing::warn;

use crate::entrance::Entrance;

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct InPhase {
    phase: &'static str,
}

pub struct Metrics {
    registry: Registry,
    vms: Family<InPhase, Gauge>,
    slots_used: Gauge,
    changes: Family<InPhase, Counter>,
    boots: Histogram,
    watch_lost: Counter,
    service: Service,
}

impl std::fmt::Debug for Metrics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Metrics").finish_non_exhaustive()
    }
}

impl Metrics {
    #[must_use]
    pub fn new(service: Service) -> Arc<Self> {
        let mut registry = Registry::with_prefix("clawpot");
        let vms = Family::<InPhase, Gauge>::default();
        registry.register("vms", "VMs by phase", vms.clone());
        let slots_used = Gauge::default();
        registry.register("slots_used", "Network slots that VMs have", slots_used.clone());
        let changes = Family::<InPhase, Counter>::default();
        registry.register("phase_changes", "Changes of phase, by the new one", changes.clone());
        // From Firecracker's 0.1 s to a TCG boot on a loaded host.
        let boots = Histogram::new([0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0]);
        registry.register_with_unit(
            "boot",
            "From accepted or started to the guest's hello",
            Unit::Seconds,
            boots.clone(),
        );
        let watch_lost = Counter::default();
        registry.register("metrics_lagged", "Changes that these metrics missed", watch_lost.clone());
        Arc::new(Self { registry, vms, slots_used, changes, boots, watch_lost, service })
    }

    /// Counts changes until the service ends.
    pub async fn follow(self: Arc<Self>) {
        let mut changes = self.service.records().subscribe();
        let mut last_phase = std::collections::BTreeMap::new();
        loop {
            match changes.recv().await {
                Ok(changed) => match &changed.row {
                    Some(row) if last_phase.insert(changed.id.clone(), row.phase()) != Some(row.phase()) => {
                        self.count(row)
                    }
                    Some(_) => {}
                    None => drop(last_phase.remove(&changed.id)),
                },
                Err(RecvError::Lagged(missed)) => drop(self.watch_lost.inc_by(missed)),
                Err(RecvError::Closed) => return,
            }
        }
    }

    fn count(&self, row: &Row) {
        self.changes.get_or_create(&InPhase { phase: row.phase().as_str() }).inc();
        if let Row::Known { record, .. } = row
            && record.phase == Phase::Running
            && !record.timings.is_empty()
        {
            let whole = record.timings.iter().filter(|timing| !timing.name.contains('.'));
            self.boots.observe(Duration::from_micros(whole.map(|timing| timing.micros).sum()).as_secs_f64());
        }
    }

    fn text(&self) -> Result<String, std::fmt::Error> {
        for phase in Phase::ALL {
            self.vms.get_or_create(&InPhase { phase: phase.as_str() }).set(0);
        }
        for (_, row) in self.service.records().rows_after(None) {
            self.vms.get_or_create(&InPhase { phase: row.phase().as_str() }).inc();
        }
        self.slots_used.set(i64::try_from(self.service.records().slots_taken().len()).unwrap_or(i64::MAX));
        let mut text = String::new();
        encode(&mut text, &self.registry)?;
        Ok(text)
    }
}

/// Serves until dropped.
pub async fn serve(listener: Entrance, metrics: Arc<Metrics>) {
    let app = Router::new().route("/metrics", get(scrape)).with_state(metrics);
    if let Err(error) = axum::serve(listener, app).await {
        warn!(%error, "metrics: no longer served");
    }
}

async fn scrape(State(metrics): State<Arc<Metrics>>) -> impl IntoResponse {
    match metrics.text() {
        Ok(text) => {
            ([(CONTENT_TYPE, "application/openmetrics-text; version=1.0.0; charset=utf-8")], text).into_response()
        }
        Err(error) => (axum::http::StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}
