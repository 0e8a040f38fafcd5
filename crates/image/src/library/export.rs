//! An image as an archive: an OCI layout in a tar, whose one image is of our own kind. Every byte is as the store has it, so that
//! the digest stays the same wherever it is imported.

use std::fs::File;
use std::io::{self, Read, Write};

use bytes::Bytes;
use clawpot_core::ports::BoxStream;
use clawpot_types::{Error, ImageRef, Kind, Result};
use serde_json::json;
use tokio::sync::mpsc;

use super::Library;
use crate::manifest::Blob;
use crate::oci;
use crate::refs::Hold;
use crate::store::digest_of;

/// Bytes of one chunk of the stream.
const CHUNK: usize = 256 << 10;

pub fn export(library: &Library, image: &ImageRef) -> Result<BoxStream<Result<Bytes>>> {
    library.store.prepare()?;
    let (digest, manifest) = library.store.resolve(image)?;
    let config = library.store.manifest_bytes(&digest)?;
    let mut files = vec![(manifest.rootfs.blob.clone(), oci::OWN_ROOTFS)];
    files.extend(manifest.kernel.clone().map(|kernel| (kernel, oci::OWN_KERNEL)));
    let mut opened = Vec::new();
    for (blob, _) in &files {
        let path = library.store.blob_path(&blob.digest);
        // Whoever has it open reads it to its end, also when it is collected meanwhile.
        library.verifier.verify("image", &path, blob)?;
        opened.push(File::open(&path).map_err(|error| Error::io(format!("opening {}", path.display()), error))?);
    }
    let layers: Vec<_> = files.iter().map(|(blob, kind)| descriptor(kind, blob)).collect();
    let own = json!({
        "schemaVersion": 2,
        "mediaType": oci::MANIFESTS[0],
        "config": descriptor(oci::OWN_CONFIG, &Blob { digest: digest.clone(), size: config.len() as u64 }),
        "layers": layers,
    });
    let own = encode(&own)?;
    let mut entry = descriptor(oci::MANIFESTS[0], &Blob { digest: digest_of(&own), size: own.len() as u64 });
    if let ImageRef::Name(name) = image {
        entry["annotations"] = json!({ oci::NAME_ANNOTATION: name });
    }
    let index = encode(&json!({ "schemaVersion": 2, "manifests": [entry] }))?;
    let small = vec![
        ("oci-layout".to_owned(), b"{\"imageLayoutVersion\":\"1.0.0\"}".to_vec()),
        ("index.json".to_owned(), index),
        (blob_name(&digest_of(&own)), own),
        (blob_name(&digest), config),
    ];
    let hold = Hold::new(&library.store)?;
    let (send, mut receive) = mpsc::channel::<Result<Bytes>>(4);
    let large: Vec<_> = files.into_iter().map(|(blob, _)| blob).zip(opened).collect();
    tokio::task::spawn_blocking(move || {
        let mut out = Sender { send, buffer: Vec::with_capacity(CHUNK) };
        if let Err(error) = write(&mut out, small, large) {
            // A client that is gone wants no error either.
            out.send.blocking_send(Err(Error::io("exporting the image", error))).unwrap_or_default();
        }
        drop(hold);
    });
    Ok(Box::pin(futures_util::stream::poll_fn(move |cx| receive.poll_recv(cx))))
}

fn blob_name(digest: &clawpot_types::Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

fn descriptor(media_type: &str, blob: &Blob) -> serde_json::Value {
    json!({ "mediaType": media_type, "digest": blob.digest, "size": blob.size })
}

fn encode(value: &serde_json::Value) -> Result<Vec<u8>> {
    serde_json::to_vec(value).map_err(|error| Error::new(Kind::Internal, "encoding a manifest").because(error))
}

fn write(out: &mut Sender, small: Vec<(String, Vec<u8>)>, large: Vec<(Blob, File)>) -> io::Result<()> {
    let mut tar = tar::Builder::new(out);
    let mut add = |name: String, size: u64, data: &mut dyn Read| {
        let mut header = tar::Header::new_gnu();
        header.set_size(size);
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        tar.append_data(&mut header, name, data)
    };
    for (name, bytes) in small {
        add(name, bytes.len() as u64, &mut bytes.as_slice())?;
    }
    // Nobody writes to a blob: they are as long as they were.
    for (blob, mut file) in large {
        add(blob_name(&blob.digest), blob.size, &mut file)?;
    }
    tar.into_inner()?.flush()
}

struct Sender {
    send: mpsc::Sender<Result<Bytes>>,
    buffer: Vec<u8>,
}

impl Write for Sender {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let room = CHUNK - self.buffer.len();
        let taken = bytes.len().min(room);
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
        self.send.blocking_send(Ok(chunk.into())).map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))
    }
}
