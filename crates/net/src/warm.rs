//! The background: makes the slots ready that are likely to be asked for next, one at a time, so that a create makes no
//! link; and brings the host's table back when somebody flushed it.

use std::sync::Arc;
use std::time::Duration;

use clawpot_types::{Result, Slot};
use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval, sleep};

use crate::mark::{RulesDigest, Standing};
use crate::renew;
use crate::work::Workshop;

/// How long VMs may be without a network after the host's rules were flushed. A look costs some microseconds.
const LOOK_AT_TABLE: Duration = Duration::from_secs(5);

/// A wish comes with the create of a VM, which has the machine to itself until it has started its own.
const LATER: Duration = Duration::from_millis(300);

/// Until nobody can want anything any more.
pub(crate) async fn run(shop: Arc<Workshop>, mut wanted: watch::Receiver<Option<Vec<Slot>>>) {
    let mut look = interval(LOOK_AT_TABLE);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            biased;
            changed = wanted.changed() => {
                if wanted.borrow().is_some() {
                    sleep(LATER).await;
                }
                let slots = wanted.borrow_and_update().clone();
                let (Ok(()), Some(slots)) = (changed, slots) else { return };
                if let Err(error) = serve(&shop, &slots, &wanted).await {
                    // The next wish tries again; a create makes its slot itself meanwhile.
                    tracing::warn!(error = error.chain(), "network slots could not be made ready ahead");
                }
            }
            _ = look.tick() => {
                if let Err(error) = shop.table.restore_if_lost(&shop.nft, &shop.site).await {
                    tracing::error!(error = error.chain(), "VMs have no network: the host's table for them is gone");
                }
                if let Err(error) = renew::all(&shop).await {
                    tracing::warn!(error = error.chain(), "slots in use keep the rules they have");
                }
            }
        }
    }
}

/// Returns early when the wish has changed.
async fn serve(shop: &Arc<Workshop>, slots: &[Slot], wanted: &watch::Receiver<Option<Vec<Slot>>>) -> Result<()> {
    // An address that the host has lost or got changes the rules.
    let digest = shop.block(|shop| shop.original().map(|original| original.digest)).await?;
    for (slot, made_with) in shop.ready() {
        if !slots.contains(&slot) || made_with != digest {
            let turn = shop.turn(slot).await?;
            // Given away meanwhile?
            if matches!(shop.standing(slot), Standing::Ready(_)) {
                shop.remove(slot, &turn).await?;
            }
        }
    }
    for slot in slots {
        if wanted.has_changed().unwrap_or(true) {
            return Ok(());
        }
        make_one(shop, *slot, digest).await?;
    }
    Ok(())
}

async fn make_one(shop: &Arc<Workshop>, slot: Slot, digest: RulesDigest) -> Result<()> {
    let turn = shop.turn(slot).await?;
    match shop.standing(slot) {
        // A leftover is its finder's business: its machine may still be there.
        Standing::Given | Standing::CutOff | Standing::Leftover => Ok(()),
        Standing::Ready(made_with) if made_with == digest => Ok(()),
        Standing::Ready(_) | Standing::Absent => shop.make(slot, &turn).await,
    }
}
