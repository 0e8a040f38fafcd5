//! What is done to one slot, under that slot's lock and to its end: a caller that goes away stops nothing half way.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use clawpot_types::{Error, Kind, Result, Slot};
use tokio::sync::{OwnedMutexGuard, Semaphore};
use tokio::time::{Instant, sleep};

use crate::forget::Forgetting;
use crate::kernel::netlink::Netlink;
use crate::kernel::netns;
use crate::kernel::nfnetlink::{Copied, Ruleset};
use crate::kernel::nft::Nft;
use crate::mark::{Mark, RulesDigest, Standing};
use crate::original::{Original, Originals};
use crate::renew::Known;
use crate::slot::Site;
use crate::steps::{Step, Steps};
use crate::table::HostTable;

/// Slots made or removed at a time: the kernel's lock on all links lets them pass one by one anyway.
const AT_ONCE: usize = 4;

/// A veth goes 4–30 ms after its namespace's name, seconds later when hundreds go at once; after this somebody may be
/// holding it. Removing one by hand takes 30 ms during which nobody else changes a link, so it is the last resort, and done
/// to one at a time: most of the others are gone when their turn comes.
const LINK_GOES_BY_ITSELF: Duration = Duration::from_secs(2);
/// And this long after its name it is an error.
const LINK_GOES: Duration = Duration::from_secs(30);

#[derive(Debug)]
pub(crate) struct Workshop {
    pub(crate) site: Site,
    pub(crate) nft: Nft,
    pub(crate) table: HostTable,
    pub(crate) steps: Steps,
    originals: Originals,
    pub(crate) known: Known,
    pub(crate) forgetting: Forgetting,
    standing: Mutex<Vec<Standing>>,
    locks: Vec<Arc<tokio::sync::Mutex<()>>>,
    hands: Semaphore,
    by_hand: tokio::sync::Mutex<()>,
}

/// How a slot came by its rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Loaded {
    Whole,
    /// No copy came about; the slot is to be made again, for which `nft` will compile.
    Not,
}

/// Holder of a slot's lock.
pub(crate) type Turn = OwnedMutexGuard<()>;

impl Workshop {
    /// `standing`: of every slot of the block, in order.
    pub(crate) fn new(site: Site, nft: Nft, table: HostTable, standing: Vec<Standing>) -> Self {
        let locks = standing.iter().map(|_| Arc::default()).collect();
        Self {
            site,
            nft,
            table,
            steps: Steps::default(),
            originals: Originals::default(),
            known: Known::default(),
            forgetting: Forgetting::default(),
            standing: Mutex::new(standing),
            locks,
            hands: Semaphore::new(AT_ONCE),
            by_hand: tokio::sync::Mutex::default(),
        }
    }

    pub(crate) async fn turn(&self, slot: Slot) -> Result<Turn> {
        let lock = self.locks.get(place(slot)).ok_or_else(|| no_such(slot))?;
        Ok(Arc::clone(lock).lock_owned().await)
    }

    /// `None`: somebody works on the slot.
    pub(crate) fn turn_if_free(&self, slot: Slot) -> Option<Turn> {
        Arc::clone(self.locks.get(place(slot))?).try_lock_owned().ok()
    }

    pub(crate) fn standing(&self, slot: Slot) -> Standing {
        self.all().get(place(slot)).copied().unwrap_or(Standing::Absent)
    }

    pub(crate) fn ready(&self) -> Vec<(Slot, RulesDigest)> {
        let all = self.all();
        let ready = |(slot, standing): (Slot, &Standing)| match standing {
            Standing::Ready(digest) => Some((slot, *digest)),
            _ => None,
        };
        (0..).map(Slot).zip(all.iter()).filter_map(ready).collect()
    }

    pub(crate) fn given(&self) -> Vec<Slot> {
        let all = self.all();
        (0..)
            .map(Slot)
            .zip(all.iter())
            .filter(|(_, standing)| **standing == Standing::Given)
            .map(|(slot, _)| slot)
            .collect()
    }

    fn set(&self, slot: Slot, standing: Standing) {
        if let Some(old) = self.all().get_mut(place(slot)) {
            *old = standing;
        }
    }

    fn all(&self) -> MutexGuard<'_, Vec<Standing>> {
        // Each entry is written whole.
        self.standing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn may_talk(&self, slot: Slot) -> Result<bool> {
        Ok(self.standing(slot) == Standing::Given && netns::is_mounted(&self.site.netns(slot))?)
    }

    /// Whether a VM has the slot and can live in it, be it that it may talk or that it may not.
    pub(crate) fn is_given(&self, slot: Slot) -> Result<bool> {
        let given = matches!(self.standing(slot), Standing::Given | Standing::CutOff);
        Ok(given && netns::is_mounted(&self.site.netns(slot))?)
    }

    /// Whether a VM that had the slot has left something, or has it still.
    pub(crate) fn is_left(&self, slot: Slot) -> Result<bool> {
        match self.standing(slot) {
            Standing::Ready(_) => Ok(false),
            Standing::Given | Standing::CutOff | Standing::Leftover => Ok(true),
            Standing::Absent => self.is_anything_there(slot),
        }
    }

    /// Until the slot may talk.
    pub(crate) async fn ensure(self: &Arc<Self>, slot: Slot, turn: &Turn) -> Result<()> {
        if self.may_talk(slot)? {
            return Ok(());
        }
        self.give(slot, Mark::Given, turn).await?;
        self.table.admit(&self.nft, &self.site, slot).await?;
        self.steps.reached(Step::Admitted)?;
        self.set(slot, Standing::Given);
        Ok(())
    }

    /// Until the slot is a VM's that reaches nobody. One that may talk is made anew.
    pub(crate) async fn ensure_cut_off(self: &Arc<Self>, slot: Slot, turn: &Turn) -> Result<()> {
        if self.standing(slot) == Standing::CutOff && netns::is_mounted(&self.site.netns(slot))? {
            return Ok(());
        }
        self.give(slot, Mark::CutOff, turn).await?;
        self.set(slot, Standing::CutOff);
        Ok(())
    }

    /// From ready, or from whatever it was, to a VM's.
    async fn give(self: &Arc<Self>, slot: Slot, mark: Mark, turn: &Turn) -> Result<()> {
        let ready = matches!(self.standing(slot), Standing::Ready(_)) && netns::is_mounted(&self.site.netns(slot))?;
        if !ready {
            self.make(slot, turn).await?;
        }
        if let Standing::Ready(rules) = self.standing(slot) {
            self.known.set(slot, rules);
        }
        self.set(slot, Standing::Leftover);
        self.block(move |shop| shop.site.mark(slot, mark)).await?;
        self.steps.reached(Step::MarkedGiven)
    }

    /// Until the slot is ready, from whatever it was; a given one too, so not to be called for it.
    pub(crate) async fn make(self: &Arc<Self>, slot: Slot, turn: &Turn) -> Result<()> {
        if self.standing(slot) != Standing::Absent {
            self.remove(slot, turn).await?;
        }
        if let Loaded::Not = self.try_make(slot).await? {
            self.remove(slot, turn).await?;
            self.try_make(slot).await?;
        }
        Ok(())
    }

    async fn try_make(self: &Arc<Self>, slot: Slot) -> Result<Loaded> {
        let _hand = self.hand().await?;
        self.set(slot, Standing::Leftover);
        let (original, inside) = self
            .block(move |shop| {
                let original = shop.original()?;
                Ok((original, shop.site.make(slot, &shop.steps)?))
            })
            .await
            .map_err(|error| error.context(format!("network slot {slot}: making its namespace and links")))?;
        if let Loaded::Not = self.load_rules(slot, &original, inside).await? {
            return Ok(Loaded::Not);
        }
        self.steps.reached(Step::Rules)?;
        let digest = original.digest;
        if !self.block(move |shop| shop.site.mark(slot, Mark::Ready(digest))).await? {
            return Err(Error::new(
                Kind::Conflict,
                format!("network slot {slot}: its link vanished while it was made"),
            ));
        }
        self.steps.reached(Step::MarkedReady)?;
        self.set(slot, Standing::Ready(digest));
        Ok(Loaded::Whole)
    }

    /// Into a namespace that has none. `inside`: a netfilter socket of it.
    async fn load_rules(self: &Arc<Self>, slot: Slot, original: &Arc<Original>, mut inside: Netlink) -> Result<Loaded> {
        if let Some(compiled) = original.compiled() {
            match self.block(move |_| compiled.write(&mut inside)).await {
                Ok(Copied::Whole) => return Ok(Loaded::Whole),
                Ok(Copied::Refused(error)) => {
                    original.refuse_copies();
                    tracing::warn!(%slot, error = error.chain(), "slots' rules are loaded by nft from now on");
                }
                Err(error) => {
                    original.compile_again();
                    tracing::warn!(%slot, error = error.chain(), "a slot's rules could not be copied; nft loads them");
                }
            }
            return Ok(Loaded::Not);
        }
        let netns = clawpot_host::netns::open(&self.site.netns(slot))?;
        let what = format!("network slot {slot}: loading its rules");
        self.nft.run(&original.rules, Some(netns), &what).await?;
        original.keep(self.block(move |_| Ruleset::read(&mut inside)).await?);
        Ok(Loaded::Whole)
    }

    /// The rules that a slot made now has. Blocks for a moment.
    pub(crate) fn original(&self) -> Result<Arc<Original>> {
        self.originals.current(&self.site)
    }

    /// Until nothing of the slot is left.
    pub(crate) async fn remove(self: &Arc<Self>, slot: Slot, _turn: &Turn) -> Result<()> {
        let before = self.standing(slot);
        if before == Standing::Absent && !self.is_anything_there(slot)? {
            return Ok(());
        }
        self.set(slot, Standing::Leftover);
        self.known.forget(slot);
        // One that was only ready never said a word, so nobody has to forget any.
        if !matches!(before, Standing::Ready(_)) {
            let on_the_way = self.forgetting.on_the_way().await;
            let hand = self.hand().await?;
            self.block(move |shop| shop.site.mark(slot, Mark::Used)).await?;
            self.steps.reached(Step::MarkedUsed)?;
            self.table.silence(&self.nft, &self.site, slot).await?;
            self.steps.reached(Step::Silenced)?;
            drop(hand);
            self.forgetting.connections_of(self.site.block.slot_address(slot), on_the_way).await?;
            self.steps.reached(Step::Forgotten)?;
        }
        self.block(move |shop| shop.site.unname(slot)).await?;
        self.steps.reached(Step::Unnamed)?;
        self.wait_for_link(slot).await?;
        self.steps.reached(Step::LinkGone)?;
        self.set(slot, Standing::Absent);
        Ok(())
    }

    fn is_anything_there(&self, slot: Slot) -> Result<bool> {
        let path = self.site.netns(slot);
        let named = path.try_exists().map_err(|error| Error::io(format!("looking at {}", path.display()), error))?;
        Ok(named || self.site.link_is_known(slot))
    }

    /// The kernel takes namespaces apart in the background; until the veth is gone its name is not free.
    async fn wait_for_link(self: &Arc<Self>, slot: Slot) -> Result<()> {
        let start = Instant::now();
        let mut by_hand = false;
        while self.site.link_is_known(slot) {
            if start.elapsed() > LINK_GOES {
                return Err(Error::new(Kind::Unavailable, format!("network slot {slot}: its link does not go away")));
            }
            if !by_hand && start.elapsed() > LINK_GOES_BY_ITSELF {
                by_hand = true;
                let _turn = self.by_hand.lock().await;
                if self.site.link_is_known(slot) {
                    self.block(move |shop| shop.site.delete_link(slot)).await?;
                }
            }
            // A quarter late at most: a thousand that looked every few milliseconds would slow the kernel down.
            sleep((start.elapsed() / 4).clamp(Duration::from_millis(1), Duration::from_millis(100))).await;
        }
        Ok(())
    }

    async fn hand(&self) -> Result<tokio::sync::SemaphorePermit<'_>> {
        self.hands
            .acquire()
            .await
            .map_err(|closed| Error::new(Kind::Internal, "waiting to work on a network slot").because(closed))
    }

    /// Blocking work, where it blocks nobody else.
    pub(crate) async fn block<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce(&Self) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let shop = Arc::clone(self);
        tokio::task::spawn_blocking(move || work(&shop))
            .await
            .unwrap_or_else(|error| Err(Error::new(Kind::Internal, "working on a network slot").because(error)))
    }
}

pub(crate) fn no_such(slot: Slot) -> Error {
    Error::new(Kind::InvalidArgument, format!("network slot {slot}: no such slot"))
}

fn place(slot: Slot) -> usize {
    usize::try_from(slot.0).unwrap_or(usize::MAX)
}
