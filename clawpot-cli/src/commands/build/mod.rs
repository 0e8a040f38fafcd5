//! `clawpot build`.

mod flake;
mod source;

use std::time::Duration;

use bytes::Bytes;
use clap::builder::ValueHint;
use clawpot_common::v1::build_progress::Event;
use clawpot_common::v1::build_request::Part;
use clawpot_common::v1::{BuildDone, BuildRequest, BuildStart, Network};
use clawpot_types::{ImageRef, MiB, Vcpus};
use serde::Serialize;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;

use self::flake::Flake;
use super::{INTERRUPTED, Outcome};
use crate::args::vm::{Reach, image, vcpus};
use crate::args::{size, time};
use crate::cli::{Format, Global};
use crate::failure::Failure;
use crate::output::{self, note, say, text::printable};
use crate::view::image::ImageDetailView;

/// Build an image of a Nix flake, in a VM that exists for this alone
///
/// The build's output goes to stderr as it comes, the image's name to stdout. The VM reaches nobody unless --network says so, and
/// is removed in any case. The same source and attribute are not built twice. All that a build said can be read again: `clawpot
/// image log`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Directory of a flake, or what nix takes for one (github:OWNER/REPO, https://…); behind # the attribute
    ///
    /// Of a directory in a git repository what git knows is taken, as nix does; of any other, and with path:DIR, all.
    #[arg(value_name = "FLAKE[#ATTR]", value_hint = ValueHint::DirPath)]
    flake: String,
    /// What the image is called [default: the name of the directory or repository]
    #[arg(long, value_name = "NAME", value_parser = image)]
    tag: Option<ImageRef>,
    /// Let the name mean the new image where it means another
    #[arg(long)]
    replace: bool,
    /// Build it although the same was built before
    #[arg(long)]
    no_cache: bool,
    /// Whom the VM reaches: none, nobody; default, the world, which a flake with inputs (nixpkgs) needs, and cache.nixos.org
    #[arg(long, value_enum, value_name = "REACH", default_value = "none", help_heading = "The VM")]
    network: Reach,
    /// Virtual CPUs, 1 to 32 [default: 2]
    #[arg(long, value_name = "N", value_parser = vcpus, help_heading = "The VM")]
    cpus: Option<Vcpus>,
    /// Memory: MiB, or like 512M, 2G [default: 1G]
    #[arg(long, value_name = "SIZE", value_parser = size::memory, help_heading = "The VM")]
    memory: Option<MiB>,
    /// Disk of the VM, and that of the result: MiB, or like 512M, 20G [default: 4G]
    #[arg(long, value_name = "SIZE", value_parser = size::disk, help_heading = "The VM")]
    disk: Option<MiB>,
    /// How long the build may take: seconds, or like 90s, 30m, 12h
    #[arg(long, value_name = "TIME", value_parser = time::positive, default_value = "30m")]
    timeout: Duration,
    /// Image of the VM; scripts/setup-builder.sh makes it
    #[arg(long, value_name = "IMAGE", value_parser = image, default_value = "builder", help_heading = "The VM")]
    builder: ImageRef,
}

/// What was built, as `-o json` shows it.
#[derive(Debug, Serialize)]
struct BuiltView {
    /// It was built before: nothing ran.
    cached: bool,
    #[serde(flatten)]
    image: ImageDetailView,
}

pub async fn run(global: &Global, args: Args) -> Outcome {
    let flake = Flake::parse(&args.flake)?;
    let doing = format!("flake {}: building it", args.flake);
    let files = match &flake {
        Flake::Local { dir, all, .. } => {
            Some(source::Files::of(dir, *all).map_err(|error| Failure::new(&doing).because(error.to_string()))?)
        }
        Flake::Remote { .. } => None,
    };
    let start = args.start(&flake)?;
    let mut builds = global.api().await?.builds();
    let (send, receive) = mpsc::channel(4);
    send.send(part(Part::Start(start))).await.map_err(|_| Failure::new(&doing))?;
    let broken = pack(files, send);
    let ended = tokio::select! {
        biased;
        // The call is dropped with it, before the server could take what has come for all.
        Ok((error, _open)) = broken => return Err(Failure::new(doing).because(error.to_string())),
        ended = follow(builds.build(ReceiverStream::new(receive)), &doing) => ended,
    };
    match ended? {
        Some(done) => show(global, &done).map(|()| 0),
        None => {
            note("cancelled; its VM goes, and no image is made");
            Ok(INTERRUPTED)
        }
    }
}

impl Args {
    fn start(&self, flake: &Flake) -> Result<BuildStart, Failure> {
        let name = match &self.tag {
            Some(name) => name.to_string(),
            None => flake.name().ok_or_else(|| {
                Failure::new(format!("flake {}: its name is none for an image", self.flake))
                    .hint("name the image with --tag")
                    .code(2)
            })?,
        };
        Ok(BuildStart {
            flake_ref: flake.reference().to_owned(),
            attr: flake.attr().to_owned(),
            name,
            replace: self.replace,
            network: Network::from(self.network).into(),
            vcpus: self.cpus.map(u32::from).unwrap_or_default(),
            memory_mib: self.memory.map(|size| size.0).unwrap_or_default(),
            disk_mib: self.disk.map(|size| size.0).unwrap_or_default(),
            timeout_secs: self.timeout.as_secs().max(1),
            no_cache: self.no_cache,
            shown: self.flake.clone(),
            builder: self.builder.to_string(),
        })
    }
}

/// `None`: interrupted; the call is dropped, and with it the build.
async fn follow<F>(asked: F, doing: &str) -> Result<Option<Box<BuildDone>>, Failure>
where
    F: Future<Output = Result<tonic::Response<tonic::Streaming<clawpot_common::v1::BuildProgress>>, tonic::Status>>,
{
    // From the first moment on, so that no Ctrl-C is lost.
    let listening = |kind| {
        signal(kind).map_err(|error| Failure::new("this program: listening for Ctrl-C").because(error.to_string()))
    };
    let (mut interrupt, mut terminate) = (listening(SignalKind::interrupt())?, listening(SignalKind::terminate())?);
    let told = async {
        let mut said = asked.await.map_err(|status| Failure::status(doing, &status))?.into_inner();
        loop {
            match said.message().await.map_err(|status| Failure::status(doing, &status))?.map(|said| said.event) {
                Some(Some(Event::Step(step))) => note(&step),
                Some(Some(Event::Log(log))) => log.lines.iter().for_each(|line| say(&printable(line))),
                Some(Some(Event::Done(done))) => return Ok(Box::new(done)),
                Some(None) => {}
                None => return Err(Failure::new(format!("{doing}: the server ended it without a word"))),
            }
        }
    };
    tokio::select! {
        done = told => done.map(Some),
        _ = interrupt.recv() => Ok(None),
        _ = terminate.recv() => Ok(None),
    }
}

fn show(global: &Global, done: &BuildDone) -> Result<(), Failure> {
    let image = done.image.clone().unwrap_or_default();
    let view = BuiltView { cached: done.cached, image: ImageDetailView::from(&image) };
    if done.cached {
        note("the same source and attribute were built before: nothing ran (--no-cache builds it anew)");
    }
    match global.output {
        Format::Table => output::line(&printable(view.image.called())),
        Format::Json => output::json(&view),
    }
}

/// What could not be read of the flake's files, and the stream of messages, which has not ended: an archive that breaks off must
/// not seem whole.
type Broken = oneshot::Receiver<(std::io::Error, mpsc::Sender<BuildRequest>)>;

/// Sends the files from a thread of their own; that nobody takes them any more is no failure of theirs.
fn pack(files: Option<source::Files>, send: mpsc::Sender<BuildRequest>) -> Broken {
    let (failed, broken) = oneshot::channel();
    std::thread::spawn(move || {
        let Some(files) = files else { return };
        let sender = Sender { send: send.clone(), buffer: Vec::with_capacity(CHUNK) };
        match files.send(sender) {
            Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
                // Without a receiver the call has ended already.
                failed.send((error, send)).map_or_else(drop, drop);
            }
            _ => {}
        }
    });
    broken
}

/// Bytes of one message.
const CHUNK: usize = 256 << 10;

fn part(part: Part) -> BuildRequest {
    BuildRequest { part: Some(part) }
}

/// Whole messages of what is written.
struct Sender {
    send: mpsc::Sender<BuildRequest>,
    buffer: Vec<u8>,
}

impl std::io::Write for Sender {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let taken = bytes.len().min(CHUNK - self.buffer.len());
        self.buffer.extend_from_slice(&bytes[..taken]);
        if self.buffer.len() == CHUNK {
            self.flush()?;
        }
        Ok(taken)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        let chunk = std::mem::replace(&mut self.buffer, Vec::with_capacity(CHUNK));
        if chunk.is_empty() {
            return Ok(());
        }
        let data = part(Part::Data(Bytes::from(chunk)));
        self.send.blocking_send(data).map_err(|_| std::io::Error::from(std::io::ErrorKind::BrokenPipe))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_archive_that_breaks_off_does_not_seem_whole() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::File::create(dir.path().join("flake.nix")).unwrap();
        let _listens = std::os::unix::net::UnixListener::bind(dir.path().join("socket")).unwrap();
        let (send, mut receive) = mpsc::channel(4);
        let (error, open) = pack(Some(source::Files::of(dir.path(), true).unwrap()), send).await.unwrap();
        assert!(error.to_string().contains("socket: neither a file"), "{error}");
        while let Ok(Some(_)) = tokio::time::timeout(Duration::from_millis(50), receive.recv()).await {}
        assert_eq!(receive.try_recv(), Err(mpsc::error::TryRecvError::Empty), "it goes on until the call is dropped");
        drop(open);
    }
}
