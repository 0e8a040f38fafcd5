//! `Net` over the fake host.

use std::net::Ipv4Addr;
use std::sync::Arc;

use async_trait::async_trait;
use clawpot_core::ports::{Net, Seat};
use clawpot_types::{Error, Kind, Result, Slot};

use crate::faults::{Line, Method};
use crate::host::FakeHost;

#[derive(Debug)]
pub struct FakeNet {
    host: Arc<FakeHost>,
    line: Line,
}

impl FakeNet {
    /// Of the daemon that lives now.
    #[must_use]
    pub fn new(host: &Arc<FakeHost>) -> Self {
        Self { host: Arc::clone(host), line: host.faults.line() }
    }
}

/// As the real one's: `UID_BASE + slot`.
const UID_BASE: u32 = 1_900_000_000;

#[async_trait]
impl Net for FakeNet {
    fn slots(&self) -> u32 {
        self.host.lock().slot_count
    }

    fn seat(&self, slot: Slot) -> Result<Seat> {
        if slot.0 >= self.slots() {
            return Err(Error::new(Kind::InvalidArgument, format!("slot {slot}: not one of ours")));
        }
        let [_, _, high, low] = slot.0.to_be_bytes();
        Ok(Seat {
            slot,
            uid: UID_BASE + slot.0,
            gid: UID_BASE + slot.0,
            netns: format!("/fake/netns/{slot}").into(),
            address: Ipv4Addr::new(10, 201, high, low),
        })
    }

    async fn look(&self, slot: Slot) -> Result<Option<()>> {
        let work = || Ok(self.host.lock().slots.contains(&slot).then_some(()));
        self.line.call(Method::NetLook, work).await
    }

    /// A fake slot is there or not, never half.
    async fn left(&self, slot: Slot) -> Result<Option<()>> {
        self.look(slot).await
    }

    async fn ensure(&self, slot: Slot) -> Result<()> {
        let work = || {
            self.host.change(|inventory| {
                if slot.0 >= inventory.slot_count {
                    return Err(Error::new(Kind::InvalidArgument, format!("slot {slot}: not one of ours")));
                }
                inventory.slots.insert(slot);
                Ok(())
            })
        };
        self.line.call(Method::NetEnsure, work).await
    }

    /// Whom a fake guest reaches nobody asks.
    async fn ensure_cut_off(&self, slot: Slot) -> Result<()> {
        self.ensure(slot).await
    }

    async fn remove(&self, slot: Slot) -> Result<()> {
        let work = || {
            self.host.change(|inventory| {
                if inventory.slot_is_busy(slot) {
                    inventory.violation(format!("the network of slot {slot} was removed under a living VMM"));
                    return Err(Error::new(Kind::Unavailable, format!("slot {slot}: its tap is busy")));
                }
                inventory.slots.remove(&slot);
                Ok(())
            })
        };
        self.line.call(Method::NetRemove, work).await
    }

    async fn list(&self) -> Result<Vec<Slot>> {
        self.line.call(Method::NetList, || Ok(self.host.lock().slots.iter().copied().collect())).await
    }

    /// Nothing is made ready: a fake slot costs nothing.
    async fn warm(&self, _next: &[Slot]) {}
}
