//! What callers share: who holds how much of it, and whether there is more. See [`crate::limits`].

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use clawpot_types::{Error, Kind};

use crate::limits::Share;

/// Cheap to clone.
#[derive(Clone, Debug)]
pub struct Shares {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    of: Share,
    /// The server's own user, who is as good as root.
    own: u32,
    held: Mutex<BTreeMap<u32, u64>>,
}

/// What is held, until it is dropped.
#[derive(Debug)]
pub struct Held {
    inner: Arc<Inner>,
    uid: u32,
    amount: u64,
}

impl Shares {
    pub fn new(of: Share, own: u32) -> Self {
        Self { inner: Arc::new(Inner { of, own, held: Mutex::default() }) }
    }

    /// `Exhausted`: which limit it was, and what to do.
    pub fn take(&self, uid: u32, amount: u64) -> Result<Held, Error> {
        let inner = &self.inner;
        let of = inner.of;
        let mut held = inner.lock();
        let mine = held.get(&uid).copied().unwrap_or_default();
        let roots = |uid: &u32| *uid == 0 || *uid == inner.own;
        let all: u64 = held.values().sum();
        let others: u64 = held.iter().filter(|(uid, _)| !roots(uid)).map(|(_, held)| held).sum();
        let short = if mine.saturating_add(amount) > of.user {
            Some((format!("uid={uid} has {mine}"), format!("at most {} for one user", of.user)))
        } else if all.saturating_add(amount) > of.all {
            Some((format!("all users together have {all}"), format!("at most {}", of.all)))
        } else if !roots(&uid) && others.saturating_add(amount) > of.all - of.root {
            let most = of.all - of.root;
            Some((
                format!("all users but root have {others}"),
                format!("at most {most}; {} are kept for root", of.root),
            ))
        } else {
            None
        };
        if let Some((who, most)) = short {
            let more = if amount > 1 { format!(", {amount} more asked") } else { String::new() };
            return Err(Error::new(Kind::Exhausted, format!("{}: {who}{more}: {most}", of.what))
                .hint("end what is not needed, or wait until others have ended"));
        }
        *held.entry(uid).or_default() += amount;
        drop(held);
        Ok(Held { inner: inner.clone(), uid, amount })
    }
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<u32, u64>> {
        // Nothing that holds it can panic half-way.
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut held = self.inner.lock();
        if let Some(mine) = held.get_mut(&self.uid) {
            *mine = mine.saturating_sub(self.amount);
            if *mine == 0 {
                held.remove(&self.uid);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shares() -> Shares {
        Shares::new(Share { what: "things", all: 10, user: 5, root: 3 }, 990)
    }

    fn take(shares: &Shares, uid: u32, count: usize) -> Vec<Held> {
        (0..count).map(|_| shares.take(uid, 1).unwrap()).collect()
    }

    #[test]
    fn one_user_is_bounded_and_what_is_dropped_is_there_again() {
        let shares = shares();
        let mut held = take(&shares, 1000, 5);
        let refused = shares.take(1000, 1).unwrap_err();
        assert_eq!(refused.kind(), Kind::Exhausted);
        assert_eq!(refused.to_string(), "things: uid=1000 has 5: at most 5 for one user");
        held.pop();
        held.extend(take(&shares, 1000, 1));
        drop(held);
        assert!(shares.inner.lock().is_empty(), "nobody is remembered who holds nothing");
    }

    #[test]
    fn others_leave_root_its_part_and_root_leaves_others_theirs() {
        let shares = shares();
        let held = [take(&shares, 1000, 5), take(&shares, 1001, 2)];
        let refused = shares.take(1002, 1).unwrap_err();
        assert_eq!(refused.to_string(), "things: all users but root have 7: at most 7; 3 are kept for root");
        let root = [take(&shares, 0, 2), take(&shares, 990, 1)];
        assert_eq!(shares.take(0, 1).unwrap_err().to_string(), "things: all users together have 10: at most 10");
        drop((held, root));
        let root = take(&shares, 0, 5);
        assert_eq!(shares.take(0, 1).unwrap_err().to_string(), "things: uid=0 has 5: at most 5 for one user");
        drop((take(&shares, 1000, 5), root));
    }

    #[test]
    fn amounts_are_sums() {
        let shares = shares();
        let held = shares.take(1000, 4).unwrap();
        let refused = shares.take(1000, 2).unwrap_err();
        assert_eq!(refused.to_string(), "things: uid=1000 has 4, 2 more asked: at most 5 for one user");
        assert!(shares.take(1000, u64::MAX).is_err());
        drop(held);
        shares.take(1000, 5).unwrap();
    }
}
