//! The rules that a slot made now has: written for `nft`, and, once `nft` has compiled them in a first slot, as the kernel
//! keeps them. Every further slot gets a copy, which costs a tenth of starting the program.

use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::address::Block;
use crate::kernel::nfnetlink::Ruleset;
use crate::mark::RulesDigest;
use crate::rules;
use crate::rules::nft::Transaction;

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

    pub(crate) fn refuse_copies(&self) {
        *self.lock() = Compiled::Refused;
    }

    fn lock(&self) -> MutexGuard<'_, Compiled> {
        // It is written whole.
        self.compiled.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The one in force, made anew when the host's addresses are others.
#[derive(Debug, Default)]
pub(crate) struct Originals(Mutex<Option<Arc<Original>>>);

impl Originals {
    pub(crate) fn current(&self, block: &Block, host: Vec<Ipv4Addr>) -> Arc<Original> {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(original) = kept.as_ref().filter(|original| original.host == host) {
            return Arc::clone(original);
        }
        let original = Arc::new(Original::new(block, host));
        *kept = Some(Arc::clone(&original));
        original
    }
}
