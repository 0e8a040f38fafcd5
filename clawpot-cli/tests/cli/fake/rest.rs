//! Host, images, events.

use std::sync::Arc;

use clawpot_common::v1::event_service_server::EventService;
use clawpot_common::v1::host_service_server::HostService;
use clawpot_common::v1::image_service_server::ImageService;
use clawpot_common::v1::{self, *};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

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
                memory_mib: Some(Budget { limit: 21_600, used: 1_416, free: 20_184 }),
                disk_mib: Some(Budget { limit: 400_000, used: 12_288, free: 387_712 }),
                vcpus: Some(Budget { limit: 32, used: 3, free: 29 }),
                slots: Some(Budget { limit: 1_024, used: 3, free: 1_021 }),
                low_disk_mib: 10_000,
                vmm_memory_mib: 648,
                vmm_memory_each_mib: 216,
                vmm_memory_vcpu_mib: 16,
            }),
        }))
    }
}

#[tonic::async_trait]
impl ImageService for Service {
    type PullImageStream = Frames<v1::ImageProgress>;
    type ImportImageStream = Frames<v1::ImageProgress>;
    type ExportImageStream = Frames<v1::ImageChunk>;

    /// `app` has an entrypoint and a command, and is what VMs are made of; `moved` meant another when it was asked for; `arm` cannot
    /// be described, any other says nothing.
    async fn get_image(&self, request: Request<v1::GetImageRequest>) -> Answer<v1::ImageDetail> {
        match request.get_ref().image.as_str() {
            "app" => Ok(Response::new(app())),
            digest if digest == OF_VMS => Ok(Response::new(app())),
            "moved" => {
                let mut before = app();
                before.image.as_mut().unwrap().digest = format!("sha256:{}", "12".repeat(32));
                before.config.as_mut().unwrap().cmd = vec!["before".into()];
                Ok(Response::new(before))
            }
            "arm" => Err(Status::unimplemented("image arm: its version is 9")),
            _ => Ok(Response::new(v1::ImageDetail::default())),
        }
    }

    async fn pull_image(&self, request: Request<v1::PullImageRequest>) -> Answer<Self::PullImageStream> {
        use v1::image_progress::Event;
        let request = request.into_inner();
        if let Some(given) = request.credentials
            && given.password != "secret"
        {
            return Err(Status::permission_denied("registry localhost:5000: it refuses demo/app:1.0"));
        }
        let step = v1::ImageStep {
            id: "image".into(),
            doing: "downloading".into(),
            bytes: 1,
            total_bytes: 2,
            bytes_per_second: 1,
        };
        let events = [Event::Step(step), Event::Done(app())].map(|event| Ok(v1::ImageProgress { event: Some(event) }));
        Ok(Response::new(Box::pin(tokio_stream::iter(events))))
    }

    /// Tells how many bytes came as the image's size.
    async fn import_image(
        &self,
        request: Request<Streaming<v1::ImportImageRequest>>,
    ) -> Answer<Self::ImportImageStream> {
        use v1::import_image_request::Part;
        let mut parts = request.into_inner();
        let (mut bytes, mut name) = (0, String::new());
        while let Some(part) = parts.message().await? {
            match part.part {
                Some(Part::Start(start)) => name = start.name,
                Some(Part::Data(data)) => bytes += data.len() as u64,
                None => {}
            }
        }
        let mut detail = app();
        if let Some(image) = &mut detail.image {
            (image.name, image.size_bytes) = (name, bytes);
        }
        let done = v1::ImageProgress { event: Some(v1::image_progress::Event::Done(detail)) };
        Ok(Response::new(Box::pin(tokio_stream::iter([Ok(done)]))))
    }

    async fn export_image(&self, _: Request<v1::ExportImageRequest>) -> Answer<Self::ExportImageStream> {
        let chunks = ["one ", "two"].map(|data| Ok(v1::ImageChunk { data: data.into() }));
        Ok(Response::new(Box::pin(tokio_stream::iter(chunks))))
    }

    async fn tag_image(&self, request: Request<v1::TagImageRequest>) -> Answer<v1::TagImageResponse> {
        if request.get_ref().name == "taken" && !request.get_ref().replace {
            return Err(Status::already_exists("image name taken: it means another already"));
        }
        Ok(Response::new(v1::TagImageResponse { digest: format!("sha256:{}", "ab".repeat(32)) }))
    }

    async fn remove_image(&self, _: Request<v1::RemoveImageRequest>) -> Answer<v1::RemoveImageResponse> {
        Ok(Response::new(v1::RemoveImageResponse { digest: format!("sha256:{}", "ab".repeat(32)) }))
    }

    async fn collect_images(&self, _: Request<v1::CollectImagesRequest>) -> Answer<v1::CollectImagesResponse> {
        let one = |kind: &str, size_bytes| v1::ImageGarbage { kind: kind.into(), name: "ab".repeat(32), size_bytes };
        let removed = vec![one("image file", 300 << 20), one("layer", 100 << 20)];
        Ok(Response::new(v1::CollectImagesResponse { removed, kept_bytes: 1 << 30 }))
    }

    async fn list_images(&self, _: Request<ListImagesRequest>) -> Answer<ListImagesResponse> {
        let image = Image {
            name: "debian".into(),
            digest: format!("sha256:{}", "ab".repeat(32)),
            size_bytes: 350 << 20,
            created_at: Some(prost_types::Timestamp { seconds: 0, nanos: 0 }),
            format: "erofs".into(),
            problem: String::new(),
        };
        let torn = Image {
            name: "torn".into(),
            format: "unreadable".into(),
            problem: "image manifest torn.json: not JSON".into(),
            ..Image::default()
        };
        Ok(Response::new(ListImagesResponse { images: vec![image, torn] }))
    }
}

/// Of the image that every VM here was made of.
pub const OF_VMS: &str = "sha256:abababababababababababababababababababababababababababababababab";

fn app() -> v1::ImageDetail {
    let image = Image {
        name: "app".into(),
        digest: OF_VMS.into(),
        size_bytes: 350 << 20,
        created_at: Some(prost_types::Timestamp { seconds: 0, nanos: 0 }),
        format: "ext4".into(),
        problem: String::new(),
    };
    let words = |words: &[&str]| words.iter().map(ToString::to_string).collect();
    v1::ImageDetail {
        image: Some(image),
        names: words(&["app", "localhost:5000/demo/app:1.0"]),
        config: Some(v1::ImageConfig {
            env: vec![v1::EnvVar { name: "PATH".into(), value: "/bin".into() }],
            entrypoint: words(&["echo"]),
            cmd: words(&["one"]),
            cwd: "/srv".into(),
            user: "app".into(),
        }),
        machine: Some(v1::MachineDefaults { vcpus: 2, memory_mib: 512, disk_mib: 0 }),
        kernel_digest: String::new(),
        revision: None,
        source: Some(v1::ImageSource {
            kind: "registry".into(),
            reference: "localhost:5000/demo/app:1.0".into(),
            digest: format!("sha256:{}", "cd".repeat(32)),
            architecture: "amd64".into(),
            layers: vec![v1::ImageLayer { digest: format!("sha256:{}", "ef".repeat(32)), size_bytes: 100 << 20 }],
        }),
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
        ..Event::default()
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
