//! One layer: bytes to entries, entries into the tree.

use std::fs::File;
use std::io::{self, BufReader, Read};

use clawpot_types::{Digest, Error, Kind, Result};

use super::limits::{Budget, Counted, Metered, hit};
use super::tar::Archive;
use super::tree::Tree;

/// How far the reading of a layer has come: packed bytes read of those there are.
pub type Progress<'a> = &'a mut dyn FnMut(u64);

/// How often progress is told, in entries and in bytes of one file.
const TELL_ENTRIES: u64 = 256;

/// Unpacks `file` into `tree`; the unpacked archive must have the digest `diff_id`.
pub fn apply(
    file: File,
    diff_id: Option<&Digest>,
    tree: &mut Tree,
    budget: &mut Budget,
    progress: Progress<'_>,
) -> Result<()> {
    tree.next_layer();
    let (mut reader, packed) = Counted::new(file);
    let mut magic = [0; 4];
    let have = fill(&mut reader, &mut magic).map_err(|error| hit(error, "reading the layer"))?;
    let whole = io::Cursor::new(magic[..have].to_vec()).chain(reader);
    let unpacked: Box<dyn Read> = match magic {
        [0x1f, 0x8b, ..] => Box::new(flate2::bufread::MultiGzDecoder::new(BufReader::with_capacity(128 << 10, whole))),
        [0x28, 0xb5, 0x2f, 0xfd] => Box::new(zstd(whole)?),
        _ => Box::new(whole),
    };
    let mut archive = Archive::new(BufReader::with_capacity(128 << 10, Metered::new(unpacked, budget, packed.clone())));
    let mut count = 0_u64;
    while let Some(entry) = archive.next_entry()? {
        archive.inner().get_mut().budget().entry()?;
        let size = entry.size;
        tree.put(&entry, &mut archive)?;
        count += 1;
        if count.is_multiple_of(TELL_ENTRIES) || size > 1 << 20 {
            progress(packed.get());
        }
    }
    // The digest is of everything, also of what stands behind the archive's end.
    let mut rest = archive.into_inner();
    io::copy(&mut rest, &mut io::sink()).map_err(|error| hit(error, "reading the layer"))?;
    progress(packed.get());
    let found = rest.into_inner().digest();
    match diff_id {
        Some(expected) if *expected != found => {
            let what = format!("unpacked it has the digest {found}, where the image's configuration says {expected}");
            Err(Error::new(Kind::Corrupt, what))
        }
        _ => Ok(()),
    }
}

fn zstd(whole: impl Read + 'static) -> Result<impl Read> {
    let mut decoder = zstd::stream::read::Decoder::new(whole).map_err(|error| Error::io("preparing zstd", error))?;
    // 128 MiB of memory, what the command-line tool allows too (`--long` needs to be asked for there).
    decoder.window_log_max(27).map_err(|error| Error::io("preparing zstd", error))?;
    Ok(decoder)
}

fn fill(reader: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut have = 0;
    while have < buffer.len() {
        match reader.read(&mut buffer[have..])? {
            0 => break,
            read => have += read,
        }
    }
    Ok(have)
}
