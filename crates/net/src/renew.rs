//! Brings the rules of slots in use up to date: those that an earlier server made, and all when the host has got an address
//! that guests must not take for a public one. A slot's connections go on: each is in the kernel's table of them already.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use clawpot_host::netns::{self, in_netns_async};
use clawpot_types::{Result, Slot};

use crate::kernel::netlink::Netlink;
use crate::kernel::nfnetlink::Ruleset;
use crate::mark::RulesDigest;
use crate::original::Original;
use crate::rules;
use crate::work::Workshop;

/// Which rules the slots in use are known to have.
#[derive(Debug, Default)]
pub(crate) struct Known(Mutex<BTreeMap<Slot, RulesDigest>>);

impl Known {
    pub(crate) fn set(&self, slot: Slot, rules: RulesDigest) {
        self.lock().insert(slot, rules);
    }

    pub(crate) fn forget(&self, slot: Slot) {
        self.lock().remove(&slot);
    }

    fn is(&self, slot: Slot, rules: RulesDigest) -> bool {
        self.lock().get(&slot) == Some(&rules)
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Slot, RulesDigest>> {
        // One insertion at a time.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Looks at each slot in use once for each change of the rules.
pub(crate) async fn all(shop: &Arc<Workshop>) -> Result<()> {
    let original = shop.block(Workshop::original).await?;
    let mut first = None;
    for slot in shop.given() {
        if !shop.known.is(slot, original.digest)
            && let Err(error) = one(shop, slot, &original).await
        {
            // The others do not wait for it; it is looked at again with the next look.
            first.get_or_insert(error.context(format!("network slot {slot}: bringing its rules up to date")));
        }
    }
    first.map_or(Ok(()), Err)
}

async fn one(shop: &Arc<Workshop>, slot: Slot, original: &Original) -> Result<()> {
    // Otherwise the next look does it.
    let Some(_turn) = shop.turn_if_free(slot) else { return Ok(()) };
    if !shop.may_talk(slot)? {
        return Ok(());
    }
    let path = shop.site.netns(slot);
    let read = || in_netns_async(path.clone(), || Ruleset::read(&mut Netlink::netfilter()?));
    let compiled = original.compiled();
    let is_todays = match &compiled {
        Some(compiled) => read().await? == **compiled,
        // Nothing to compare with: no slot was made yet, or this kernel takes no copies.
        None => false,
    };
    if !is_todays {
        tracing::info!(%slot, "a slot in use gets the rules of today");
        let rules = rules::slot::instead(&original.rules);
        let what = format!("network slot {slot}: renewing its rules");
        shop.nft.run(&rules, Some(netns::open(&path)?), &what).await?;
        if compiled.is_none() {
            original.keep(read().await?);
        }
    }
    shop.known.set(slot, original.digest);
    Ok(())
}
