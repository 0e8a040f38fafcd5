//! What only this daemon's memory knows of its VMs: the way to the guest, whether it answered, who is attached.
//! Lost with the daemon, found again by the runner.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use clawpot_core::facts::{Clients, GuestFact};
use clawpot_core::ports::GuestEndpoint;
use clawpot_core::{MachineId, Timing};
use clawpot_types::{ExecId, Timestamp, VmId};
use tokio::sync::Notify;

/// Of one VM's commands, whose users are remembered; with the oldest forgotten, one of them is told of once more.
const USERS: usize = 256;

#[derive(Debug, Default)]
pub struct Lives {
    vms: Mutex<BTreeMap<VmId, Life>>,
}

#[derive(Debug)]
struct Life {
    /// Wakes the runner; carries no data.
    wake: Arc<Notify>,
    link: Option<Link>,
    attached: u32,
    /// Who is known, by an event, to have had a command in hand.
    users: VecDeque<(ExecId, String)>,
    idle_since: Timestamp,
    /// The first exec of the VM ended while its client was attached.
    served: bool,
    /// What the guest's Hello told of its boot, until it is written down.
    hello: Vec<Timing>,
    /// The last look found nothing of a machine.
    bare: bool,
}

/// The way to one incarnation's guest.
#[derive(Clone, Debug)]
pub struct Link {
    pub machine: MachineId,
    pub endpoint: GuestEndpoint,
    pub guest: GuestFact,
}

impl Lives {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<VmId, Life>> {
        self.vms.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A new VM, or one found at start; returns what wakes its runner. `None`: it has one.
    pub fn enter(&self, id: &VmId, now: Timestamp) -> Option<Arc<Notify>> {
        let mut vms = self.lock();
        let Entry::Vacant(place) = vms.entry(id.clone()) else { return None };
        let wake = Arc::new(Notify::new());
        place.insert(Life {
            wake: wake.clone(),
            link: None,
            attached: 0,
            users: VecDeque::new(),
            idle_since: now,
            served: false,
            hello: Vec::new(),
            bare: false,
        });
        Some(wake)
    }

    pub fn leave(&self, id: &VmId) {
        self.lock().remove(id);
    }

    pub fn wake(&self, id: &VmId) {
        if let Some(life) = self.lock().get(id) {
            life.wake.notify_one();
        }
    }

    #[must_use]
    pub fn link(&self, id: &VmId) -> Option<Link> {
        self.lock().get(id).and_then(|life| life.link.clone())
    }

    pub fn set_link(&self, id: &VmId, link: Option<Link>) {
        if let Some(life) = self.lock().get_mut(id) {
            life.link = link;
        }
    }

    pub fn set_bare(&self, id: &VmId, bare: bool) {
        if let Some(life) = self.lock().get_mut(id) {
            life.bare = bare;
        }
    }

    /// Whether the last look found nothing of a machine. What was not looked at may have one.
    #[must_use]
    pub fn is_bare(&self, id: &VmId) -> bool {
        self.lock().get(id).is_some_and(|life| life.bare)
    }

    pub fn set_guest(&self, id: &VmId, guest: GuestFact) {
        if let Some(link) = self.lock().get_mut(id).and_then(|life| life.link.as_mut()) {
            link.guest = guest;
        }
    }

    pub fn set_hello(&self, id: &VmId, timings: Vec<Timing>) {
        if let Some(life) = self.lock().get_mut(id) {
            life.hello = timings;
        }
    }

    /// Taken once.
    #[must_use]
    pub fn hello(&self, id: &VmId) -> Vec<Timing> {
        self.lock().get_mut(id).map(|life| std::mem::take(&mut life.hello)).unwrap_or_default()
    }

    #[must_use]
    pub fn clients(&self, id: &VmId) -> Clients {
        match self.lock().get(id) {
            Some(life) if life.attached > 0 => Clients::Attached,
            Some(life) if life.served => Clients::Done,
            Some(life) => Clients::NoneSince(life.idle_since),
            None => Clients::Attached,
        }
    }

    pub fn attach(&self, id: &VmId) {
        if let Some(life) = self.lock().get_mut(id) {
            life.attached += 1;
        }
    }

    /// Whether it is news that `actor` has this command in hand. A client whose connection breaks comes back again and again.
    #[must_use]
    pub fn is_new_user(&self, id: &VmId, exec: &ExecId, actor: &str) -> bool {
        let mut vms = self.lock();
        let Some(life) = vms.get_mut(id) else { return true };
        if life.users.iter().any(|(known, who)| known == exec && who == actor) {
            return false;
        }
        if life.users.len() == USERS {
            life.users.pop_front();
        }
        life.users.push_back((exec.clone(), actor.to_owned()));
        true
    }

    /// `served`: the exec had ended and its client heard of it.
    pub fn detach(&self, id: &VmId, served: bool, now: Timestamp) {
        if let Some(life) = self.lock().get_mut(id) {
            life.attached = life.attached.saturating_sub(1);
            life.idle_since = now;
            life.served |= served;
            life.wake.notify_one();
        }
    }
}
