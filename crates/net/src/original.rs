//! The rules that a slot made now has: written for `nft`, and, once `nft` has compiled them in a first slot, as the kernel
//! keeps them. Every further slot gets a copy, which costs a tenth of starting the program.

use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use clawpot_types::Result;

use crate::address::Block;
use crate::kernel::nfnetlink::Ruleset;
use crate::mark::RulesDigest;
use crate::rules;
use crate::rules::nft::Transaction;
use crate::slot::Site;

#[derive(Debug)]
pub(crate) struct Original {
    /// The host's addresses that are in them.
    host: Vec<Ipv4Addr>,
    pub(crate) rules: Transaction,
    pub(crate) digest: RulesDigest,
    compiled: Mutex<Compiled>,
}

#[derive(Clone, Debug)]
enum Compiled {
    NotYet,
    Known(Arc<Ruleset>),
    /// This kernel does not take back what it tells: `nft` every time.
    Refused,
}

impl Original {
    fn new(block: &Block, host: Vec<Ipv4Addr>) -> Self {
        let rules = rules::slot::ruleset(block, &host);
        let digest = RulesDigest::of(&rules.to_json().to_string());
        Self { host, rules, digest, compiled: Mutex::new(Compiled::NotYet) }
    }

    /// What to copy, if that is known.
    pub(crate) fn compiled(&self) -> Option<Arc<Ruleset>> {
        match &*self.lock() {
            Compiled::Known(ruleset) => Some(Arc::clone(ruleset)),
            Compiled::NotYet | Compiled::Refused => None,
        }
    }

    /// What `nft` made of them in some slot.
    pub(crate) fn keep(&self, ruleset: Ruleset) {
        let mut compiled = self.lock();
        if matches!(*compiled, Compiled::NotYet) {
            *compiled = Compiled::Known(Arc::new(ruleset));
        }
    }

    /// The next slot's are compiled by `nft` once more, and copied again.
    pub(crate) fn compile_again(&self) {
        *self.lock() = Compiled::NotYet;
    }

    pub(crate) fn refuse_copies(&self) {
        *self.lock() = Compiled::Refused;
    }

    fn lock(&self) -> MutexGuard<'_, Compiled> {
        // It is written whole.
        self.compiled.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// For how long the host's addresses are taken for what they were. Listing them takes the longer the more slots there are,
/// and slots are made one after the other; those in use learn of a new one within seconds (`crate::renew`).
pub(crate) const REMEMBERED: Duration = Duration::from_secs(1);

/// The one in force, made anew when the host's addresses are others.
#[derive(Debug, Default)]
pub(crate) struct Originals(Mutex<Option<(Instant, Arc<Original>)>>);

impl Originals {
    /// Blocks for a moment.
    pub(crate) fn current(&self, site: &Site) -> Result<Arc<Original>> {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((when, original)) = kept.as_ref()
            && when.elapsed() < REMEMBERED
        {
            return Ok(Arc::clone(original));
        }
        let host = site.host_addresses()?;
        let same = kept.take().map(|(_, original)| original).filter(|original| original.host == host);
        let original = same.unwrap_or_else(|| Arc::new(Original::new(&site.block, host)));
        *kept = Some((Instant::now(), Arc::clone(&original)));
        Ok(original)
    }
}
