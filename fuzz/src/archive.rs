//! A tar archive: a layer, an import, a flake's directory. Whoever made it is hostile, and the server itself reads the last two.
//!
//! Compiled into the fuzz target and into the test that replays its corpus.

use std::io::{self, Read};

use clawpot_image::unpack::tar::{Archive, Entry, shown};
use clawpot_image::unpack::tree::clean;

/// Most of an entry's attributes, bytes (crates/image/src/unpack/tar.rs).
const XATTRS: usize = 1 << 20;
/// Directories above one another, as layers may have them.
const DEPTH: usize = 128;

pub fn run(data: &[u8]) {
    let mut archive = Archive::new(data);
    // Each has a header: there are no more of them than bytes.
    for count in 1.. {
        assert!(count * 512 <= data.len() + 512);
        let Ok(Some(entry)) = archive.next_entry() else { return };
        assert!(entry.xattrs.iter().map(|(name, value)| name.len() + value.len()).sum::<usize>() <= XATTRS);
        let packed = packed(&entry);
        names(&entry);
        // Every second one is skipped by the archive itself.
        if count % 2 == 0 {
            continue;
        }
        match io::copy(&mut (&mut archive).take(u64::MAX), &mut io::sink()) {
            Ok(read) => assert_eq!(read, packed),
            Err(_) => return,
        }
    }
}

/// Bytes that the archive has of it. Where they go follows one another, within the file.
fn packed(entry: &Entry) -> u64 {
    let Some(map) = &entry.sparse else { return entry.size };
    let mut end = 0;
    for (at, length) in map {
        assert!(*at >= end);
        end = at + length;
    }
    assert!(end <= entry.size);
    map.iter().map(|(_, length)| length).sum()
}

fn names(entry: &Entry) {
    let said = shown(&entry.path);
    assert!(said.chars().count() <= 123 && !said.chars().any(char::is_control));
    let Ok(path) = clean(&entry.path, DEPTH) else { return };
    if path.is_empty() {
        return;
    }
    let parts: Vec<_> = path.split(|byte| *byte == b'/').collect();
    assert!(parts.len() <= DEPTH);
    for part in parts {
        assert!((1..=255).contains(&part.len()) && part != b"." && part != b".." && !part.contains(&0));
    }
}
