//! `clawpot.v1.ImageService`.

use std::collections::BTreeSet;

use clawpot_common::v1;
use clawpot_common::v1::image_service_server::ImageService;
use clawpot_control::{Library, Row, Service};
use clawpot_core::ports::{
    BoxStream, Collect, Credentials, ImageDetail, ImageInfo, ImageProgress, Import, Pull, UnreadableImage,
};
use clawpot_types::{Digest, Error, ImageRef, Kind, Result};
use futures_util::StreamExt as _;
use tonic::{Code, Request, Response, Status, Streaming};

use super::access::actor;
use super::convert;
use super::status::status;
use crate::limits;

pub struct ImageApi {
    pub library: Library,
}

impl std::fmt::Debug for ImageApi {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ImageApi").finish_non_exhaustive()
    }
}

type Answer<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl ImageService for ImageApi {
    type PullImageStream = BoxStream<Result<v1::ImageProgress, Status>>;
    type ImportImageStream = BoxStream<Result<v1::ImageProgress, Status>>;
    type ExportImageStream = BoxStream<Result<v1::ImageChunk, Status>>;

    async fn list_images(&self, _: Request<v1::ListImagesRequest>) -> Answer<v1::ListImagesResponse> {
        let (good, bad) = self.library.read().list().await.map_err(status)?;
        let mut images: Vec<v1::Image> = good.into_iter().map(info).chain(bad.into_iter().map(unreadable)).collect();
        images.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(Response::new(v1::ListImagesResponse { images }))
    }

    async fn get_image(&self, request: Request<v1::GetImageRequest>) -> Answer<v1::ImageDetail> {
        let image = at("image", request.into_inner().image.parse()).map_err(status)?;
        Ok(Response::new(detail(self.library.read().describe(&image).await.map_err(status)?)))
    }

    async fn pull_image(&self, request: Request<v1::PullImageRequest>) -> Answer<Self::PullImageStream> {
        let actor = actor(&request);
        let request = request.into_inner();
        let pull = pull(request).map_err(status)?;
        Ok(Response::new(progress(self.library.pull(pull, &actor))))
    }

    async fn import_image(
        &self,
        request: Request<Streaming<v1::ImportImageRequest>>,
    ) -> Answer<Self::ImportImageStream> {
        use v1::import_image_request::Part;
        let actor = actor(&request);
        let mut parts = request.into_inner();
        let Some(Part::Start(start)) = parts.message().await?.and_then(|first| first.part) else {
            return Err(status(Error::new(Kind::InvalidArgument, "import: the first message must be start")));
        };
        let import = Import {
            name: name("start.name", &start.name).map_err(status)?,
            replace: start.replace,
            select: text("start.select", start.select).map_err(status)?,
        };
        let archive = parts.map(|part| match part.map(|part| part.part) {
            Ok(Some(Part::Data(bytes))) => Ok(bytes),
            Ok(_) => Err(Error::new(Kind::InvalidArgument, "import: after the first message all must be data")),
            Err(broken) => Err(no_more("import", broken)),
        });
        Ok(Response::new(progress(self.library.import(import, Box::pin(archive), &actor))))
    }

    async fn export_image(&self, request: Request<v1::ExportImageRequest>) -> Answer<Self::ExportImageStream> {
        let image = at("image", request.into_inner().image.parse()).map_err(status)?;
        let chunks = self.library.read().export(&image).await.map_err(status)?;
        Ok(Response::new(Box::pin(chunks.map(|chunk| Ok(v1::ImageChunk { data: chunk.map_err(status)? })))))
    }

    async fn tag_image(&self, request: Request<v1::TagImageRequest>) -> Answer<v1::TagImageResponse> {
        let actor = actor(&request);
        let request = request.into_inner();
        let image = at("image", request.image.parse()).map_err(status)?;
        let name = at("name", request.name.parse()).map_err(status)?;
        let digest = self.library.tag(image, name, request.replace, &actor).await.map_err(status)?;
        Ok(Response::new(v1::TagImageResponse { digest: digest.to_string() }))
    }

    async fn remove_image(&self, request: Request<v1::RemoveImageRequest>) -> Answer<v1::RemoveImageResponse> {
        let actor = actor(&request);
        let name = at("name", request.into_inner().name.parse()).map_err(status)?;
        let digest = self.library.untag(name, &actor).await.map_err(status)?;
        Ok(Response::new(v1::RemoveImageResponse { digest: digest.to_string() }))
    }

    async fn collect_images(&self, request: Request<v1::CollectImagesRequest>) -> Answer<v1::CollectImagesResponse> {
        let actor = actor(&request);
        let v1::CollectImagesRequest { dry_run, all } = request.into_inner();
        let gc = Collect { dry_run, all, live: live(self.library.service()) };
        let collected = self.library.gc(gc, &actor).await.map_err(status)?;
        let garbage = |one: clawpot_core::ports::Garbage| v1::ImageGarbage {
            kind: one.kind,
            name: one.name,
            size_bytes: one.bytes,
        };
        let removed = collected.removed.into_iter().map(garbage).collect();
        Ok(Response::new(v1::CollectImagesResponse { removed, kept_bytes: collected.kept_bytes }))
    }
}

/// The images of this server's VMs. `None` where a record cannot be read: who knows what that VM is made of.
pub fn live(service: &Service) -> Option<BTreeSet<Digest>> {
    let rows = service.records().rows_after(None);
    let image = |row: &Row| match row {
        Row::Known { record, .. } => Some(record.image.digest.clone()),
        Row::Unreadable { .. } => None,
    };
    rows.iter().map(|(_, row)| image(row)).collect()
}

/// Why a client's archive ends in the middle: a piece over its limit is told as such.
pub fn no_more(doing: &str, broken: Status) -> Error {
    match broken.code() {
        Code::ResourceExhausted => Error::new(Kind::Exhausted, broken.message()),
        _ => Error::new(Kind::Cancelled, format!("{doing}: the client went away")).because(broken),
    }
}

fn pull(request: v1::PullImageRequest) -> Result<Pull> {
    let credentials = match request.credentials {
        Some(given) => Some(Credentials {
            user: text("credentials.user", given.user)?,
            password: text("credentials.password", given.password)?,
        }),
        None => None,
    };
    Ok(Pull {
        reference: text("reference", request.reference)?,
        name: name("name", &request.name)?,
        replace: request.replace,
        plain_http: request.plain_http,
        credentials,
    })
}

fn name(path: &str, text: &str) -> Result<Option<ImageRef>> {
    if text.is_empty() { Ok(None) } else { at(path, text.parse()).map(Some) }
}

fn text(path: &str, text: String) -> Result<String> {
    if text.len() <= limits::CREDENTIAL {
        return Ok(text);
    }
    Err(Error::new(Kind::InvalidArgument, format!("{path}: {} bytes, at most {}", text.len(), limits::CREDENTIAL)))
}

pub(super) fn at<T>(path: &str, parsed: Result<T>) -> Result<T> {
    parsed.map_err(|error| Error::new(Kind::InvalidArgument, format!("{path}: {}", error.chain())))
}

fn progress(steps: BoxStream<Result<ImageProgress>>) -> BoxStream<Result<v1::ImageProgress, Status>> {
    use v1::image_progress::Event;
    Box::pin(steps.map(|step| {
        let event = match step.map_err(status)? {
            ImageProgress::Done(image) => Event::Done(detail(*image)),
            ImageProgress::Step(step) => Event::Step(v1::ImageStep {
                id: step.id,
                doing: step.doing,
                bytes: step.bytes,
                total_bytes: step.total_bytes,
                bytes_per_second: step.bytes_per_second,
            }),
        };
        Ok(v1::ImageProgress { event: Some(event) })
    }))
}

fn info(image: ImageInfo) -> v1::Image {
    v1::Image {
        name: image.name,
        digest: image.digest.to_string(),
        size_bytes: image.size_bytes,
        created_at: Some(convert::timestamp(image.created_at)),
        format: image.format,
        problem: String::new(),
    }
}

/// Shown, so that whoever looks for it, or is told that a collection stops at it, finds it.
fn unreadable(image: UnreadableImage) -> v1::Image {
    v1::Image {
        name: image.name,
        format: "unreadable".to_owned(),
        problem: image.error.chain(),
        ..v1::Image::default()
    }
}

fn revision(revision: clawpot_core::ports::Revision) -> v1::ImageRevision {
    let digest = |digest: Option<Digest>| digest.map(|digest| digest.to_string()).unwrap_or_default();
    v1::ImageRevision {
        flake: revision.flake,
        attr: revision.attr,
        lock_digest: digest(revision.lock),
        source_digest: digest(revision.source),
        builder_digest: revision.builder.to_string(),
        network: revision.network,
        kernel_release: revision.kernel_release.unwrap_or_default(),
        out_path: revision.out_path,
        started_at: Some(convert::timestamp(revision.started_at)),
        finished_at: Some(convert::timestamp(revision.finished_at)),
        build: revision.build.map(|build| clawpot_control::build_name(&build)).unwrap_or_default(),
    }
}

pub(super) fn detail(image: ImageDetail) -> v1::ImageDetail {
    let env = |(name, value): (String, String)| v1::EnvVar { name: name.into(), value: value.into() };
    let config = image.config;
    let source = image.source.map(|source| v1::ImageSource {
        kind: source.kind,
        reference: source.reference,
        digest: source.digest.to_string(),
        architecture: source.architecture,
        layers: source
            .layers
            .into_iter()
            .map(|(digest, size_bytes)| v1::ImageLayer { digest: digest.to_string(), size_bytes })
            .collect(),
    });
    v1::ImageDetail {
        image: Some(info(image.info)),
        names: image.names,
        config: Some(v1::ImageConfig {
            env: config.env.into_iter().map(env).collect(),
            entrypoint: config.entrypoint,
            cmd: config.cmd,
            cwd: config.cwd,
            user: config.user,
        }),
        machine: Some(v1::MachineDefaults {
            vcpus: image.machine.vcpus.map(u32::from).unwrap_or_default(),
            memory_mib: image.machine.memory.map(|size| size.0).unwrap_or_default(),
            disk_mib: image.machine.disk.map(|size| size.0).unwrap_or_default(),
        }),
        kernel_digest: image.kernel.map(|digest| digest.to_string()).unwrap_or_default(),
        source,
        revision: image.revision.map(revision),
    }
}
