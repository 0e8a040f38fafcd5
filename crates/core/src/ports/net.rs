use std::net::Ipv4Addr;
use std::path::PathBuf;

use async_trait::async_trait;
use clawpot_types::{Result, Slot};

/// Network slots of this instance (DESIGN §9).
#[async_trait]
pub trait Net: Send + Sync {
    /// Slots this instance has.
    fn slots(&self) -> u32;

    /// What follows from the number alone; makes nothing. `InvalidArgument`: not one of ours.
    fn seat(&self, slot: Slot) -> Result<Seat>;

    /// Whether [`Self::ensure`] has nothing to do: the netns is there, and the slot may talk or was cut off on purpose.
    async fn look(&self, slot: Slot) -> Result<Option<()>>;

    /// Whether [`Self::remove`] has something to do: the slot was given to a VM, and some of it is there, be it half made or
    /// half removed. Not the same as [`Self::look`]: what cannot be used must still be removed. A warm slot is no VM's.
    async fn left(&self, slot: Slot) -> Result<Option<()>>;

    /// netns, taps, veth, rules, and the two elements that let the slot talk. A slot made ready by [`Self::warm`] costs one
    /// nft transaction. A netns that served another VM is never given out.
    async fn ensure(&self, slot: Slot) -> Result<()>;

    /// As [`Self::ensure`], but without the two elements and with its link down: whoever is in the slot reaches nobody and no name, also after the
    /// server was started anew. [`Self::look`] finds it ready.
    async fn ensure_cut_off(&self, slot: Slot) -> Result<()>;

    /// Nothing of the slot is left when it returns: elements, conntrack entries, netns, links.
    /// Only after the VM's processes are gone, or the tap is busy.
    async fn remove(&self, slot: Slot) -> Result<()>;

    /// Every slot of which something bears this instance's name on the host, warm ones included.
    async fn list(&self) -> Result<Vec<Slot>>;

    /// Slots likely to be asked for next; they are made ready in the background, others that are warm are removed.
    async fn warm(&self, next: &[Slot]);
}

/// Who a VM's processes are on this host, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seat {
    pub slot: Slot,
    pub uid: u32,
    pub gid: u32,
    /// A file to `setns` into.
    pub netns: PathBuf,
    /// The VM's address as the host sees it.
    pub address: Ipv4Addr,
}
