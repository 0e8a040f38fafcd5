//! How much the store may take, and what of it is promised.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::MetadataExt as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use clawpot_types::{Digest, Error, Kind, Result};

use crate::manifest::Blob;
use crate::store::Store;
use crate::unpack::limits::Limits;

/// An operator's limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// Of the whole store, bytes on disk; `None`: what the disk has.
    pub quota: Option<u64>,
    /// What stays free on the file system for VMs' disks and records, bytes.
    pub reserve: u64,
    /// Entries of one image, all its layers together.
    pub entries: u64,
}

/// Above it the helper's memory (1 GiB of addresses) might not do, and its hour of CPU time.
const MOST_ENTRIES: u64 = 4_000_000;

impl Default for Room {
    /// 1 GiB: a VM's disk that is written to, and the store of records, need to go on.
    fn default() -> Self {
        Self { quota: None, reserve: 1 << 30, entries: Limits::default().entries }
    }
}

/// The least that an image takes: its file system and the tree that it is made from, bytes.
pub const LEAST: u64 = 20 << 20;

impl Room {
    /// As an operator sets it. `InvalidArgument`: none, or more than a helper can do.
    pub fn entries(count: u64) -> Result<u64> {
        if (1..=MOST_ENTRIES).contains(&count) {
            return Ok(count);
        }
        Err(Error::new(Kind::InvalidArgument, format!("image_max_entries: {count} is not 1 to {MOST_ENTRIES}")))
    }

    /// Bytes that may still be written, but for those `promised` to others. `Exhausted`: not even `needed`.
    fn left(&self, store: &Store, needed: u64, promised: u64) -> Result<u64> {
        let to_others = match promised >> 20 {
            0 => String::new(),
            mib => format!(", {mib} MiB are for what other pulls still download"),
        };
        let space = clawpot_host::fs::space(&store.dir)?;
        let free = space.free_bytes.saturating_sub(self.reserve).saturating_sub(promised);
        if free < needed {
            return Err(Error::new(
                Kind::Exhausted,
                format!(
                    "image store {}: {} MiB are needed, {} MiB are free and {} MiB of them stay free for VMs{to_others}",
                    store.dir.display(),
                    needed.div_ceil(1 << 20),
                    space.free_bytes >> 20,
                    self.reserve >> 20
                ),
            )
            .hint("`clawpot image gc` removes what nothing uses; or free some disk"));
        }
        let Some(quota) = self.quota else { return Ok(free) };
        let used = store.usage()?;
        let left = quota.saturating_sub(used).saturating_sub(promised);
        if left < needed {
            return Err(Error::new(
                Kind::Exhausted,
                format!(
                    "image store {}: {} MiB are needed, {} of the quota's {} MiB are used{to_others}",
                    store.dir.display(),
                    needed.div_ceil(1 << 20),
                    used >> 20,
                    quota >> 20
                ),
            )
            .hint("`clawpot image gc` removes what nothing uses; or raise --image-quota-mib"));
        }
        Ok(free.min(left))
    }
}

/// The layers that this server's pulls still download: room for them is granted to nobody else. Each counts once, however many pulls
/// wait for it.
#[derive(Clone, Debug, Default)]
pub struct Promised(Arc<Mutex<BTreeMap<Digest, Coming>>>);

#[derive(Debug)]
struct Coming {
    size: u64,
    pulls: usize,
}

/// One pull's, until it is dropped.
#[derive(Debug)]
pub struct Promise {
    of: Promised,
    layers: Mutex<BTreeSet<Digest>>,
}

impl Promised {
    /// Bytes that may still be written. `Exhausted`: not even `needed`. Blocks.
    pub fn left(&self, room: Room, store: &Store, needed: u64) -> Result<u64> {
        let promised = still_to_come(store, &hold(&self.0));
        room.left(store, needed, promised)
    }

    /// Room for these layers, and the bytes that may be written besides. `Exhausted`: not even [`LEAST`]. Blocks, and whoever else wants
    /// a promise waits: none is given by what is another's a moment later.
    pub fn promise(&self, room: Room, store: &Store, layers: Vec<Blob>) -> Result<(u64, Promise)> {
        let mut coming = hold(&self.0);
        let layers: BTreeMap<Digest, u64> = layers.into_iter().map(|layer| (layer.digest, layer.size)).collect();
        let new = layers.iter().filter(|(digest, _)| !coming.contains_key(*digest));
        // The sizes are the registry's words.
        let needed = new.fold(0, |bytes: u64, (_, size)| bytes.saturating_add(*size));
        let left = room.left(store, needed.saturating_add(LEAST), still_to_come(store, &coming))?;
        for (digest, size) in &layers {
            coming.entry(digest.clone()).or_insert(Coming { size: *size, pulls: 0 }).pulls += 1;
        }
        drop(coming);
        let layers = Mutex::new(layers.into_keys().collect());
        Ok((left - needed, Promise { of: self.clone(), layers }))
    }
}

/// What has come of them is on the disk and counted there.
fn still_to_come(store: &Store, coming: &BTreeMap<Digest, Coming>) -> u64 {
    coming.iter().fold(0, |bytes, (digest, layer)| {
        let here = std::fs::symlink_metadata(store.partial_path(digest)).map_or(0, |meta| meta.blocks() * 512);
        bytes.saturating_add(layer.size.saturating_sub(here))
    })
}

impl Promise {
    /// The layer is whole, and counted where it lies.
    pub fn kept(&self, layer: &Digest) {
        if hold(&self.layers).remove(layer) {
            self.let_go(layer);
        }
    }

    fn let_go(&self, layer: &Digest) {
        let mut coming = hold(&self.of.0);
        if let Some(one) = coming.get_mut(layer) {
            one.pulls -= 1;
            if one.pulls == 0 {
                coming.remove(layer);
            }
        }
    }
}

impl Drop for Promise {
    fn drop(&mut self) {
        for layer in std::mem::take(&mut *hold(&self.layers)) {
            self.let_go(&layer);
        }
    }
}

/// Whole between any two statements: a panic elsewhere spoils nothing.
fn hold<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer(name: u8, mib: u64) -> Blob {
        Blob { digest: Digest::from_sha256(&[name; 32]), size: mib << 20 }
    }

    #[test]
    fn what_a_pull_still_downloads_is_nobody_elses() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::new(dir.path()).unwrap();
        store.prepare().unwrap();
        let room = Room { quota: Some(100 << 20), reserve: 0, ..Room::default() };
        let promised = Promised::default();
        // To the nearest: a file's account may take a block of its own.
        let left = |promised: &Promised| (promised.left(room, &store, 0).unwrap() + (1 << 19)) >> 20;
        let (besides, first) = promised.promise(room, &store, vec![layer(1, 30), layer(2, 20)]).unwrap();
        assert_eq!(besides >> 20, 50);
        let error = promised.promise(room, &store, vec![layer(3, 40)]).unwrap_err();
        assert!(error.chain().contains("50 MiB are for what other pulls"), "{}", error.chain());
        assert_eq!(error.kind(), Kind::Exhausted);
        // The same layer comes once.
        let (besides, second) = promised.promise(room, &store, vec![layer(1, 30)]).unwrap();
        assert_eq!(besides >> 20, 50);
        // What has come of it is on the disk already.
        let mut partial = std::fs::File::create(store.partial_path(&layer(2, 20).digest)).unwrap();
        std::io::Write::write_all(&mut partial, &vec![1; 15 << 20]).unwrap();
        assert_eq!(left(&promised), 50);
        first.kept(&layer(2, 20).digest);
        assert_eq!(left(&promised), 55);
        drop(first);
        assert_eq!(left(&promised), 55, "the other pull still waits for it");
        second.kept(&layer(1, 30).digest);
        second.kept(&layer(1, 30).digest);
        drop(second);
        assert_eq!(left(&promised), 85);
    }
}
