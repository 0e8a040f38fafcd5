//! `clawpot.v1.BuildService`.

use clawpot_common::builder;
use clawpot_common::v1;
use clawpot_common::v1::build_service_server::BuildService;
use clawpot_control::{Build, BuildProgress, Builds};
use clawpot_core::Reach;
use clawpot_core::ports::{BoxStream, BuildName, FlakeSource};
use clawpot_types::{Error, ImageRef, Kind, MiB, Result, Vcpus};
use futures_util::StreamExt as _;
use tonic::{Request, Response, Status, Streaming};
use tracing::info;

use super::access::actor;
use super::image::{at, detail, no_more};
use super::status::status;
use super::validate;

/// Of a builder that nothing was said of: nix itself takes some 300 MiB, a small image some hundred.
const VCPUS: u32 = 2;
const MEMORY: MiB = MiB(1024);
const DISK: MiB = MiB(4096);
const BUILDER: &str = "builder";
/// Lines in one message; each has at most some kilobytes.
const LINES: usize = 64;
/// Of what the user typed, bytes.
const MAX_SHOWN: usize = 4096;

pub struct BuildApi {
    pub builds: Builds,
}

impl std::fmt::Debug for BuildApi {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BuildApi").finish_non_exhaustive()
    }
}

#[tonic::async_trait]
impl BuildService for BuildApi {
    type BuildStream = BoxStream<Result<v1::BuildProgress, Status>>;
    type GetBuildLogStream = BoxStream<Result<v1::BuildLogChunk, Status>>;

    async fn build(
        &self,
        request: Request<Streaming<v1::BuildRequest>>,
    ) -> Result<Response<Self::BuildStream>, Status> {
        use v1::build_request::Part;
        let actor = actor(&request);
        let mut parts = request.into_inner();
        let Some(Part::Start(start)) = parts.message().await?.and_then(|first| first.part) else {
            return Err(status(Error::new(Kind::InvalidArgument, "build: the first message must be start")));
        };
        let build = form(start).map_err(status)?;
        info!(actor, image = %build.name.name, flake = build.shown, attr = build.attr, "building an image");
        let archive = parts.map(|part| match part.map(|part| part.part) {
            Ok(Some(Part::Data(bytes))) => Ok(bytes),
            Ok(_) => Err(Error::new(Kind::InvalidArgument, "build: after the first message all must be data")),
            Err(broken) => Err(no_more("build", broken)),
        });
        let said = self.builds.build(build, Box::pin(archive), &actor);
        // What is there already goes together.
        let messages = said.ready_chunks(LINES).flat_map(|said| futures_util::stream::iter(messages(said)));
        Ok(Response::new(Box::pin(messages)))
    }

    async fn get_build_log(
        &self,
        request: Request<v1::GetBuildLogRequest>,
    ) -> Result<Response<Self::GetBuildLogStream>, Status> {
        let pieces = self.builds.log(&request.into_inner().of).await.map_err(status)?;
        Ok(Response::new(Box::pin(pieces.map(|data| Ok(v1::BuildLogChunk { data: data.map_err(status)? })))))
    }
}

fn form(start: v1::BuildStart) -> Result<Build> {
    let name: ImageRef = at("start.name", start.name.parse())?;
    let reach = match v1::Network::try_from(start.network) {
        Ok(v1::Network::Unspecified) => Reach::None,
        _ => validate::reach("start.network", start.network)?,
    };
    let timeout_secs = match start.timeout_secs {
        0 => builder::DEFAULT_TIMEOUT_SECS,
        given => given,
    };
    // As the guest will check it again: said before anything is sent or made.
    let flake_ref = if start.flake_ref.is_empty() { builder::INPUT.to_owned() } else { start.flake_ref.clone() };
    let request = builder::Request::Build {
        flake_ref,
        attr: start.attr.clone(),
        timeout_secs: Some(timeout_secs),
        substitute: false,
    };
    request.check().map_err(|refused| Error::new(Kind::InvalidArgument, format!("start.{refused}")))?;
    let flake = match start.flake_ref.as_str() {
        "" => FlakeSource::Local,
        _ if reach == Reach::None => {
            let what =
                "start.network: a flake that is not of this host must be fetched, and the builder reaches nobody";
            return Err(Error::new(Kind::InvalidArgument, what).hint("allow it with --network default"));
        }
        _ => FlakeSource::Remote(start.flake_ref),
    };
    if start.shown.len() > MAX_SHOWN || start.shown.chars().any(char::is_control) {
        return Err(Error::new(Kind::InvalidArgument, format!("start.shown: over {MAX_SHOWN} bytes, or no text")));
    }
    let vcpus = if start.vcpus == 0 { VCPUS } else { start.vcpus };
    Ok(Build {
        flake,
        shown: start.shown,
        attr: start.attr,
        name: BuildName { name, replace: start.replace },
        builder: at("start.builder", if start.builder.is_empty() { BUILDER } else { &start.builder }.parse())?,
        reach,
        vcpus: at("start.vcpus", Vcpus::try_from(vcpus))?,
        memory: if start.memory_mib == 0 { MEMORY } else { at("start.memory_mib", MiB::memory(start.memory_mib))? },
        disk: if start.disk_mib == 0 { DISK } else { at("start.disk_mib", MiB::disk(start.disk_mib))? },
        timeout_secs,
        cache: !start.no_cache,
    })
}

/// Lines that follow each other in one message.
fn messages(said: Vec<Result<BuildProgress>>) -> Vec<Result<v1::BuildProgress, Status>> {
    use v1::build_progress::Event;
    let mut messages: Vec<Result<v1::BuildProgress, Status>> = Vec::new();
    for one in said {
        let event = match one {
            Ok(BuildProgress::Log(line)) => {
                if let Some(Ok(v1::BuildProgress { event: Some(Event::Log(log)) })) = messages.last_mut() {
                    log.lines.push(line);
                    continue;
                }
                Event::Log(v1::BuildLog { lines: vec![line] })
            }
            Ok(BuildProgress::Step(step)) => Event::Step(step),
            Ok(BuildProgress::Done { image, cached }) => {
                Event::Done(v1::BuildDone { image: Some(detail(*image)), cached })
            }
            Err(error) => {
                messages.push(Err(status(error)));
                continue;
            }
        };
        messages.push(Ok(v1::BuildProgress { event: Some(event) }));
    }
    messages
}

#[cfg(test)]
mod tests {
    use super::*;

    fn start() -> v1::BuildStart {
        v1::BuildStart { name: "app".into(), shown: ".".into(), ..Default::default() }
    }

    #[test]
    fn what_is_not_said_is_the_least() {
        let build = form(start()).unwrap();
        assert_eq!((build.reach, build.flake, build.cache), (Reach::None, FlakeSource::Local, true));
        assert_eq!((u32::from(build.vcpus), build.memory, build.disk, build.timeout_secs), (2, MEMORY, DISK, 1800));
        assert_eq!(build.builder, "builder".parse().unwrap());
    }

    #[test]
    fn every_error_begins_with_its_field() {
        type Change = fn(&mut v1::BuildStart);
        let cases: [(&str, Change); 9] = [
            ("start.name", |start| start.name = "no such/../name!".into()),
            ("start.attr", |start| start.attr = "--impure".into()),
            ("start.flake_ref", |start| start.flake_ref = "a#b".into()),
            ("start.network", |start| start.flake_ref = "github:a/b".into()),
            ("start.network", |start| start.network = 9),
            ("start.vcpus", |start| start.vcpus = 1000),
            ("start.memory_mib", |start| start.memory_mib = 1),
            ("start.timeout_secs", |start| start.timeout_secs = 1_000_000),
            ("start.shown", |start| start.shown = "a\nb".into()),
        ];
        for (field, change) in cases {
            let mut start = start();
            change(&mut start);
            let error = form(start).unwrap_err();
            assert!(error.to_string().starts_with(field), "{field}: {error}");
            assert_eq!(error.kind(), Kind::InvalidArgument);
        }
        let remote = v1::BuildStart { flake_ref: "github:a/b".into(), network: v1::Network::Default.into(), ..start() };
        assert_eq!(form(remote).unwrap().flake, FlakeSource::Remote("github:a/b".to_owned()));
    }

    #[test]
    fn lines_that_follow_each_other_are_one_message() {
        let log = |line: &str| Ok(BuildProgress::Log(line.to_owned()));
        let said = vec![log("a"), log("b"), Ok(BuildProgress::Step("stopping".to_owned())), log("c")];
        let messages: Vec<_> = messages(said).into_iter().map(Result::unwrap).collect();
        assert_eq!(messages.len(), 3);
        let Some(v1::build_progress::Event::Log(log)) = &messages[0].event else { panic!("{messages:?}") };
        assert_eq!(log.lines, ["a", "b"]);
    }
}
