//! Host, images, events.

use std::sync::Arc;

use clawpot_common::v1::event_service_server::EventService;
use clawpot_common::v1::host_service_server::HostService;
use clawpot_common::v1::image_service_server::ImageService;
use clawpot_common::v1::*;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::vms::{Answer, Frames};
use super::{Service, State};

#[tonic::async_trait]
impl HostService for Service {
    async fn get_host(&self, _: Request<GetHostRequest>) -> Answer<Host> {
        Ok(Response::new(Host {
            version: env!("CARGO_PKG_VERSION").into(),
            instance: "3f7a".into(),
            vmm: "qemu".into(),
            vmm_version: "7.2.22".into(),
            vmm_reason: "no /dev/kvm on this host".into(),
            capacity: Some(Capacity {
                cpus: 2,
                memory_mib: 24_000,
                memory_available_mib: 22_000,
                disk_mib: 100_000,
                disk_free_mib: 80_000,
                slots: 1_024,
                slots_used: 3,
                vms: 3,
            }),
            started_at: Some(prost_types::Timestamp { seconds: 1_795_256_340, nanos: 0 }),
            budgets: Some(Budgets {
                memory_mib: Some(Budget { limit: 21_600, used: 768, free: 20_832 }),
                disk_mib: Some(Budget { limit: 400_000, used: 12_288, free: 387_712 }),
                vcpus: Some(Budget { limit: 32, used: 3, free: 29 }),
                slots: Some(Budget { limit: 1_024, used: 3, free: 1_021 }),
                low_disk_mib: 10_000,
            }),
        }))
    }
}

#[tonic::async_trait]
impl ImageService for Service {
    async fn list_images(&self, _: Request<ListImagesRequest>) -> Answer<ListImagesResponse> {
        let image = Image {
            name: "debian".into(),
            digest: format!("sha256:{}", "ab".repeat(32)),
            size_bytes: 350 << 20,
            created_at: Some(prost_types::Timestamp { seconds: 0, nanos: 0 }),
            format: "erofs".into(),
        };
        Ok(Response::new(ListImagesResponse { images: vec![image] }))
    }
}

pub fn event(id: u64, message: &str) -> Event {
    Event {
        id,
        time: Some(prost_types::Timestamp { seconds: 1_795_256_340, nanos: 120_000_000 }),
        vm_id: "web0000000000000".into(),
        vm_name: "web".into(),
        incarnation: 1,
        kind: "vm.phase".into(),
        message: message.into(),
        actor: "server".into(),
    }
}

#[tonic::async_trait]
impl EventService for Service {
    type WatchEventsStream = Frames<Event>;

    async fn list_events(&self, request: Request<ListEventsRequest>) -> Answer<ListEventsResponse> {
        let after = request.into_inner().after_id;
        let events = self.0.events.lock().unwrap().iter().filter(|event| event.id > after).take(2).cloned().collect();
        Ok(Response::new(ListEventsResponse { events }))
    }

    async fn watch_events(&self, request: Request<WatchEventsRequest>) -> Answer<Self::WatchEventsStream> {
        let (tx, rx) = mpsc::channel(4);
        tokio::spawn(feed(self.0.clone(), request.into_inner().after_id, tx));
        Ok(Response::new(Box::pin(ReceiverStream::new(rx))))
    }
}

async fn feed(state: Arc<State>, mut after: u64, tx: mpsc::Sender<Result<Event, Status>>) {
    let mut changed = state.watch();
    loop {
        changed.borrow_and_update();
        let new: Vec<Event> = state.events.lock().unwrap().iter().filter(|event| event.id > after).cloned().collect();
        for event in new {
            after = event.id;
            if tx.send(Ok(event)).await.is_err() {
                return;
            }
        }
        if changed.changed().await.is_err() {
            return;
        }
    }
}
