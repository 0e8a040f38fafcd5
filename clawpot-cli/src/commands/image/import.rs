//! `clawpot image import`.

use std::fs::File;
use std::io::{self, Read as _, Write};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use clap::builder::ValueHint;
use clawpot_common::v1::import_image_request::Part;
use clawpot_common::v1::{ImportImageRequest, ImportStart};
use clawpot_types::ImageRef;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::transfer::{Ended, follow};
use crate::args::vm::image;
use crate::cli::Global;
use crate::commands::{INTERRUPTED, Outcome};
use crate::failure::Failure;
use crate::output::note;

/// Bytes of one message.
const CHUNK: usize = 256 << 10;

/// Get an image from an archive: OCI layout, `docker save` or `image export`
#[derive(Debug, clap::Args)]
pub struct Args {
    /// A tar, the directory of an OCI layout, or `-` for a tar on standard input
    #[arg(value_hint = ValueHint::AnyPath)]
    from: PathBuf,
    /// Its name here [default: what the archive calls it]
    #[arg(long, value_name = "NAME", value_parser = image)]
    name: Option<ImageRef>,
    /// Let the name mean the new image where it means another
    #[arg(long)]
    replace: bool,
    /// Which one, where the archive has several: its name there
    #[arg(long, value_name = "NAME")]
    select: Option<String>,
}

pub async fn run(global: &Global, args: Args) -> Outcome {
    let doing = format!("archive {}: importing it", args.from.display());
    let source = Source::open(&args.from).map_err(|error| Failure::new(&doing).because(error.to_string()))?;
    let mut images = global.api().await?.images();
    let (send, receive) = mpsc::channel(4);
    let start = ImportStart {
        name: args.name.as_ref().map(ToString::to_string).unwrap_or_default(),
        replace: args.replace,
        select: args.select.unwrap_or_default(),
    };
    send.send(part(Part::Start(start))).await.map_err(|_| Failure::new(&doing))?;
    let read = read_beside(source, Sender { send, buffer: Vec::with_capacity(CHUNK) });
    let ended = follow(images.import_image(ReceiverStream::new(receive)), &doing).await;
    // A file that could not be read is why the server found the archive wanting.
    if let Ok(Err(error)) = read.try_recv()
        && error.kind() != io::ErrorKind::BrokenPipe
    {
        return Err(Failure::new(doing).because(error.to_string()));
    }
    match ended? {
        Ended::Done(image) => super::show(global, &image).map(|()| 0),
        Ended::Interrupted => {
            note("cancelled; nothing of it is kept");
            Ok(INTERRUPTED)
        }
    }
}

/// Sends all of it from a thread of its own, which ends with this program where it still waits for standard input. How that went
/// is told before the stream ends: whoever has the server's answer to the end of it finds it there.
fn read_beside(source: Source, mut to: Sender) -> std::sync::mpsc::Receiver<io::Result<()>> {
    let (tell, told) = std::sync::mpsc::sync_channel(1);
    std::thread::spawn(move || {
        let read = source.send(&mut to);
        // Nobody to tell: the answer has come, and the program is about to end.
        if tell.send(read).is_ok() {
            drop(to);
        }
    });
    told
}

fn part(part: Part) -> ImportImageRequest {
    ImportImageRequest { part: Some(part) }
}

enum Source {
    Stdin,
    Tar(File),
    Layout(PathBuf),
}

impl Source {
    fn open(path: &Path) -> io::Result<Self> {
        if path == Path::new("-") {
            return Ok(Self::Stdin);
        }
        let file = File::open(path)?;
        if file.metadata()?.is_dir() { Ok(Self::Layout(path.to_owned())) } else { Ok(Self::Tar(file)) }
    }

    /// Blocks until all of it is sent.
    fn send(self, to: &mut Sender) -> io::Result<()> {
        match self {
            Self::Stdin => drop(io::copy(&mut io::stdin().lock(), to)?),
            Self::Tar(mut file) => drop(io::copy(&mut file, to)?),
            Self::Layout(dir) => layout(&dir, to)?,
        }
        to.flush()
    }
}

/// The files that a layout consists of, as a tar.
fn layout(dir: &Path, to: &mut Sender) -> io::Result<()> {
    let mut names = vec![PathBuf::from("oci-layout"), PathBuf::from("index.json")];
    let blobs = Path::new("blobs/sha256");
    let mut found: Vec<_> = std::fs::read_dir(dir.join(blobs))
        .and_then(Iterator::collect::<io::Result<Vec<_>>>)
        .map_err(|error| {
            io::Error::new(error.kind(), format!("{}: it has no blobs/sha256, so is no OCI layout", dir.display()))
        })?
        .into_iter()
        .map(|entry| blobs.join(entry.file_name()))
        .collect();
    found.sort();
    names.append(&mut found);
    let mut tar = tar::Builder::new(to);
    for name in names {
        let path = dir.join(&name);
        let file =
            File::open(&path).map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))?;
        let size = file.metadata()?.len();
        let mut header = tar::Header::new_gnu();
        header.set_size(size);
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        // One that changes meanwhile is not what its digest says, which the server tells.
        tar.append_data(&mut header, &name, file.take(size))?;
    }
    tar.finish()
}

/// Whole messages of what is written.
struct Sender {
    send: mpsc::Sender<ImportImageRequest>,
    buffer: Vec<u8>,
}

impl Write for Sender {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let taken = bytes.len().min(CHUNK - self.buffer.len());
        self.buffer.extend_from_slice(&bytes[..taken]);
        if self.buffer.len() == CHUNK {
            self.flush()?;
        }
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        let chunk = std::mem::replace(&mut self.buffer, Vec::with_capacity(CHUNK));
        if chunk.is_empty() {
            return Ok(());
        }
        let data = part(Part::Data(Bytes::from(chunk)));
        self.send.blocking_send(data).map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))
    }
}
