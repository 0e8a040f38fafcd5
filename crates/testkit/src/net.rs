//! `Net` over the fake host.

use std::net::Ipv4Addr;
use std::sync::Arc;

use async_trait::async_trait;
use clawpot_core::ports::{Net, Seat};
use clawpot_types::{Error, Kind, Result, Slot};

use crate::faults::Method;
use crate::host::FakeHost;

#[derive(Debug)]
pub struct FakeNet(pub Arc<FakeHost>);

/// As the real one's: `UID_BASE + slot`.
const UID_BASE: u32 = 1_900_000_000;

#[async_trait]
impl Net for FakeNet {
    fn slots(&self) -> u32 {
        self.0.lock().slot_count
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
        let work = || Ok(self.0.lock().slots.contains(&slot).then_some(()));
        self.0.faults.call(Method::NetLook, work).await
    }

    async fn ensure(&self, slot: Slot) -> Result<()> {
        let work = || {
            self.0.change(|inventory| {
                if slot.0 >= inventory.slot_count {
                    return Err(Error::new(Kind::InvalidArgument, format!("slot {slot}: not one of ours")));
                }
                inventory.slots.insert(slot);
                Ok(())
            })
        };
        self.0.faults.call(Method::NetEnsure, work).await
    }

    async fn remove(&self, slot: Slot) -> Result<()> {
        let work = || {
            self.0.change(|inventory| {
                if inventory.slot_is_busy(slot) {
                    inventory.violation(format!("the network of slot {slot} was removed under a living VMM"));
                    return Err(Error::new(Kind::Unavailable, format!("slot {slot}: its tap is busy")));
                }
                inventory.slots.remove(&slot);
                Ok(())
            })
        };
        self.0.faults.call(Method::NetRemove, work).await
    }

    async fn list(&self) -> Result<Vec<Slot>> {
        self.0.faults.call(Method::NetList, || Ok(self.0.lock().slots.iter().copied().collect())).await
    }

    /// Nothing is made ready: a fake slot costs nothing.
    async fn warm(&self, _next: &[Slot]) {}
}
