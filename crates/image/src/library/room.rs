//! How much the store may take.

use clawpot_types::{Error, Kind, Result};

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

    /// Bytes that may still be written. `Exhausted`: not even `needed`.
    pub fn left(&self, store: &Store, needed: u64) -> Result<u64> {
        let space = clawpot_host::fs::space(&store.dir)?;
        let free = space.free_bytes.saturating_sub(self.reserve);
        if free < needed {
            return Err(Error::new(
                Kind::Exhausted,
                format!(
                    "image store {}: {} MiB are needed, {} MiB are free and {} MiB of them stay free for VMs",
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
        let left = quota.saturating_sub(used);
        if left < needed {
            return Err(Error::new(
                Kind::Exhausted,
                format!(
                    "image store {}: {} MiB are needed, {} of the quota's {} MiB are used",
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
