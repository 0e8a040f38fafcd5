//! One layer: bytes to entries, entries into the tree.

use std::fs::File;
use std::io;

use clawpot_types::{Digest, Error, Kind, Result};

use super::inflate::Inflate;
use super::limits::{Budget, Metered, hit};
use super::tar::Archive;
use super::tree::Tree;

/// How far the reading of a layer has come: packed bytes read of those there are.
pub type Progress<'a> = &'a mut dyn FnMut(u64);

/// How often progress is told, in entries and in bytes of one file.
const TELL_ENTRIES: u64 = 256;

/// Unpacks `file` into `tree`; the unpacked archive must have the digest `diff_id`.
pub fn apply(
    (file, diff_id): (File, Option<&Digest>),
    inflate: &Inflate,
    tree: &mut Tree,
    budget: &mut Budget,
    progress: Progress<'_>,
) -> Result<()> {
    tree.next_layer();
    inflate.open(file)?;
    let mut archive = Archive::new(Metered::new(inflate, budget));
    let mut count = 0_u64;
    while let Some(entry) = archive.next_entry()? {
        archive.inner().budget().entry()?;
        archive.inner().budget().place(&entry)?;
        let size = entry.size;
        tree.put(&entry, &mut archive)?;
        count += 1;
        if count.is_multiple_of(TELL_ENTRIES) || size > 1 << 20 {
            progress(archive.inner().packed());
        }
    }
    // The digest is of everything, also of what stands behind the archive's end.
    let mut rest = archive.into_inner();
    io::copy(&mut rest, &mut io::sink()).map_err(|error| hit(error, "reading the layer"))?;
    progress(rest.packed());
    let found = rest.digest()?;
    match diff_id {
        Some(expected) if *expected != found => {
            let what = format!("unpacked it has the digest {found}, where the image's configuration says {expected}");
            Err(Error::new(Kind::Corrupt, what))
        }
        _ => Ok(()),
    }
}
