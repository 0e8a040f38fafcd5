//! The typed store, and its projection in memory from which reads, lists and watches are served.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use clawpot_core::event::Draft;
use clawpot_core::ports::{Durability, Entry, Expect, Guard, Op, StateStore, Txn, TxnOutcome};
use clawpot_core::{Phase, VmRecord};
use clawpot_types::{Error, Kind, Result, Revision, Slot, VmId, VmName};
use serde::{Deserialize, Serialize};
use tokio::sync::broadcast;
use tracing::error;

use crate::service::create::Request;

use crate::service::volume::LeaseChange;

/// Watchers further behind than this are told so and list again.
const WATCH_BACKLOG: usize = 1024;

/// One VM as the store has it.
#[derive(Clone, Debug)]
pub enum Row {
    Known {
        revision: Revision,
        record: Arc<VmRecord>,
    },
    /// Shown as Quarantined; nothing touches what it may own.
    Unreadable {
        revision: Revision,
        why: String,
    },
}

impl Row {
    #[must_use]
    pub fn phase(&self) -> Phase {
        match self {
            Self::Known { record, .. } => record.phase,
            Self::Unreadable { .. } => Phase::Quarantined,
        }
    }

    #[must_use]
    pub const fn revision(&self) -> Revision {
        match self {
            Self::Known { revision, .. } | Self::Unreadable { revision, .. } => *revision,
        }
    }
}

/// One change of one VM. `row` is `None` when the VM is gone; `last` is then what it was.
#[derive(Clone, Debug)]
pub struct Changed {
    pub id: VmId,
    pub revision: Revision,
    pub row: Option<Row>,
    pub last: Option<Arc<VmRecord>>,
}

/// What `slots/<n>` and `names/<name>` hold: whose they are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claim {
    pub vm: VmId,
}

#[derive(Debug, Default)]
struct Projection {
    rows: BTreeMap<VmId, Row>,
    names: BTreeMap<VmName, VmId>,
    /// From `slots/`, so that a quarantined VM's slot is known too.
    slots: BTreeMap<Slot, VmId>,
    /// Claimed by a row that cannot be read, and no VM says that it is its: given to nobody.
    lost_slots: BTreeSet<Slot>,
    /// The last VMs that went, oldest first. Their ids are never used again.
    buried: VecDeque<VmId>,
}

/// More than can go while an answer of the store is on its way.
const BURIED: usize = 1024;

impl Projection {
    fn bury(&mut self, id: &VmId) {
        if self.buried.contains(id) {
            return;
        }
        if self.buried.len() >= BURIED {
            self.buried.pop_front();
        }
        self.buried.push_back(id.clone());
    }
}

pub struct Records {
    store: Arc<dyn StateStore>,
    projection: Mutex<Projection>,
    changes: broadcast::Sender<Changed>,
}

impl std::fmt::Debug for Records {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Records").finish_non_exhaustive()
    }
}

pub fn vm_key(id: &VmId) -> String {
    format!("vms/{id}")
}

pub fn slot_key(slot: Slot) -> String {
    // Padded, so that the order of keys is the order of numbers.
    format!("slots/{:05}", slot.0)
}

pub fn name_key(name: &VmName) -> String {
    format!("names/{name}")
}

impl Records {
    /// Reads everything. What cannot be read becomes an [`Row::Unreadable`] under its key's id.
    pub async fn load(store: Arc<dyn StateStore>) -> Result<Self> {
        let mut projection = Projection::default();
        let vms = store.list("vms/").await?;
        for entry in vms.entries {
            let Some(id) = understood(id_of(&entry.key)) else { continue };
            let row = row_of(&id, &entry)?;
            if let Row::Known { record, .. } = &row {
                projection.names.insert(record.name.clone(), id.clone());
            }
            projection.rows.insert(id, row);
        }
        for bad in vms.unreadable {
            let Some(id) = understood(id_of(&bad.key)) else { continue };
            projection.rows.insert(id, Row::Unreadable { revision: bad.revision, why: bad.error.chain() });
        }
        load_slots(&*store, &mut projection).await?;
        load_names(&*store, &mut projection).await?;
        check_requests(&*store).await?;
        let (changes, _) = broadcast::channel(WATCH_BACKLOG);
        Ok(Self { store, projection: Mutex::new(projection), changes })
    }

    #[must_use]
    pub fn store(&self) -> &Arc<dyn StateStore> {
        &self.store
    }

    fn lock(&self) -> MutexGuard<'_, Projection> {
        // Every change of the projection is one assignment: a panic elsewhere leaves it whole.
        self.projection.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[must_use]
    pub fn get(&self, id: &VmId) -> Option<Row> {
        self.lock().rows.get(id).cloned()
    }

    /// All rows after `after` in the order of ids.
    #[must_use]
    pub fn rows_after(&self, after: Option<&VmId>) -> Vec<(VmId, Row)> {
        use std::ops::Bound::{Excluded, Unbounded};
        let from = after.map_or(Unbounded, Excluded);
        self.lock().rows.range::<VmId, _>((from, Unbounded)).map(|(id, row)| (id.clone(), row.clone())).collect()
    }

    #[must_use]
    pub fn count(&self) -> usize {
        self.lock().rows.len()
    }

    #[must_use]
    pub fn slots_taken(&self) -> BTreeSet<Slot> {
        let projection = self.lock();
        projection.slots.keys().chain(&projection.lost_slots).copied().collect()
    }

    /// The name that the store says is `id`'s.
    #[must_use]
    pub fn name_of(&self, id: &VmId) -> Option<VmName> {
        self.lock().names.iter().find(|(_, owner)| *owner == id).map(|(name, _)| name.clone())
    }

    /// Slots that the store says are `id`'s.
    #[must_use]
    pub fn slots_of(&self, id: &VmId) -> Vec<Slot> {
        self.lock().slots.iter().filter(|(_, owner)| *owner == id).map(|(slot, _)| *slot).collect()
    }

    /// By id, name, or a prefix of an id that only one VM has.
    pub fn find(&self, text: &str) -> Result<VmId> {
        let projection = self.lock();
        if let Some(id) = text.parse().ok().and_then(|name: VmName| projection.names.get(&name)) {
            return Ok(id.clone());
        }
        let is_prefix = !text.is_empty() && text.len() <= VmId::LEN;
        let mut found = projection.rows.keys().filter(|id| is_prefix && id.as_str().starts_with(text));
        match (found.next(), found.next()) {
            (Some(id), None) => Ok(id.clone()),
            (Some(a), Some(b)) => {
                let what = format!("VM {text:?}: several ids begin so, {a} and {b} among them");
                Err(Error::new(Kind::InvalidArgument, what).hint("give more characters, or the name"))
            }
            (None, _) => {
                let shown: String = text.chars().take(64).collect();
                Err(Error::new(Kind::NotFound, format!("VM {shown:?}: no such name or id"))
                    .hint("`clawpot ls` shows what there is"))
            }
        }
    }

    /// From now on; take it before reading rows, or changes between are missed.
    #[must_use]
    pub fn subscribe(&self) -> broadcast::Receiver<Changed> {
        self.changes.subscribe()
    }

    /// Writes `record`, and `events` with it, if it still is at `revision`. `None`: somebody changed it meanwhile.
    pub async fn swap(
        &self,
        revision: Revision,
        record: VmRecord,
        events: Vec<Draft>,
        durability: Durability,
    ) -> Result<Option<Revision>> {
        let key = vm_key(&record.id);
        let txn = Txn {
            guards: vec![Guard { key: key.clone(), expect: Expect::Revision(revision) }],
            ops: vec![Op::Put { key, value: record.encode()? }],
            events,
            durability,
        };
        match self.commit(&record.id, txn).await? {
            TxnOutcome::Committed(revision) => {
                self.written(revision, record);
                Ok(Some(revision))
            }
            TxnOutcome::Conflict { .. } => {
                self.refresh(&record.id).await?;
                Ok(None)
            }
        }
    }

    /// A new VM with the guards of its slot, its name and whatever else `extra` writes, and its hold on volumes, all or nothing.
    pub(crate) async fn insert(
        &self,
        record: VmRecord,
        extra: Option<(String, Vec<u8>)>,
        leases: Vec<LeaseChange>,
        event: Draft,
    ) -> Result<TxnOutcome> {
        let claim = encode_claim(&record.id)?;
        let mut puts = vec![
            (name_key(&record.name), claim.clone()),
            (slot_key(record.slot), claim),
            (vm_key(&record.id), record.encode()?),
        ];
        // First, so that a repeated request is told as such and not as a clash of names.
        puts.splice(0..0, extra);
        let mut txn = Txn {
            guards: puts.iter().map(|(key, _)| Guard { key: key.clone(), expect: Expect::Absent }).collect(),
            ops: puts.into_iter().map(|(key, value)| Op::Put { key, value }).collect(),
            events: vec![event],
            durability: Durability::Full,
        };
        add(&mut txn, leases);
        let outcome = self.commit(&record.id, txn).await?;
        if let TxnOutcome::Committed(revision) = outcome {
            self.written(revision, record);
        }
        Ok(outcome)
    }

    /// Erases the record with what guards its slot and name, and gives its volumes back. `None`: somebody changed it meanwhile.
    pub(crate) async fn forget(
        &self,
        id: &VmId,
        revision: Revision,
        leases: Vec<LeaseChange>,
        events: Vec<Draft>,
    ) -> Result<Option<Revision>> {
        let (names, slots) = {
            let projection = self.lock();
            let names: Vec<_> =
                projection.names.iter().filter(|(_, owner)| *owner == id).map(|(n, _)| n.clone()).collect();
            let slots: Vec<_> = projection.slots.iter().filter(|(_, owner)| *owner == id).map(|(s, _)| *s).collect();
            (names, slots)
        };
        let key = vm_key(id);
        let others = names.iter().map(name_key).chain(slots.iter().map(|slot| slot_key(*slot)));
        let mut txn = Txn {
            guards: vec![Guard { key: key.clone(), expect: Expect::Revision(revision) }],
            ops: std::iter::once(key.clone()).chain(others).map(|key| Op::Delete { key }).collect(),
            events,
            durability: Durability::Full,
        };
        add(&mut txn, leases);
        let TxnOutcome::Committed(revision) = self.commit(id, txn).await? else {
            self.refresh(id).await?;
            return Ok(None);
        };
        self.gone(id, revision);
        Ok(Some(revision))
    }

    /// Where the answer is an error, the store is asked whether it was done all the same. Otherwise the projection would stay
    /// behind for ever, and every later write of this VM would conflict.
    async fn commit(&self, id: &VmId, txn: Txn) -> Result<TxnOutcome> {
        let key = vm_key(id);
        let wanted = txn.ops.iter().find_map(|op| match op {
            Op::Put { key: put, value } if *put == key => Some(value.clone()),
            _ => None,
        });
        let error = match self.store.txn(txn).await {
            Err(error) => error,
            answered => return answered,
        };
        match self.stored(id).await {
            Ok((at, found)) if found.as_ref().map(|entry| &entry.value) == wanted.as_ref() => {
                Ok(TxnOutcome::Committed(found.map_or(at, |entry| entry.revision)))
            }
            Ok(_) | Err(_) => Err(error),
        }
    }

    /// The VM's row as the store has it, and the store's revision.
    async fn stored(&self, id: &VmId) -> Result<(Revision, Option<Entry>)> {
        let mut listing = self.store.list(&vm_key(id)).await?;
        match listing.unreadable.pop() {
            Some(bad) => Err(bad.error),
            None => Ok((listing.revision, listing.entries.pop())),
        }
    }

    /// Takes over what the store says of the VM: somebody else changed it, and may never hear that it was done.
    pub(crate) async fn refresh(&self, id: &VmId) -> Result<()> {
        match self.stored(id).await? {
            (_, Some(entry)) => self.publish(id.clone(), row_of(id, &entry)?),
            (at, None) => self.gone(id, at),
        }
        Ok(())
    }

    fn gone(&self, id: &VmId, revision: Revision) {
        let last = {
            let mut projection = self.lock();
            projection.names.retain(|_, owner| owner != id);
            projection.slots.retain(|_, owner| owner != id);
            projection.bury(id);
            projection.rows.remove(id)
        };
        let last = match last {
            Some(Row::Known { record, .. }) => Some(record),
            Some(Row::Unreadable { .. }) => None,
            None => return,
        };
        self.tell(Changed { id: id.clone(), revision, row: None, last });
    }

    fn written(&self, revision: Revision, record: VmRecord) {
        self.publish(record.id.clone(), Row::Known { revision, record: Arc::new(record) });
    }

    fn publish(&self, id: VmId, row: Row) {
        let revision = row.revision();
        {
            let mut projection = self.lock();
            // Two writers' commits may arrive here in either order; the later revision stays, and what is gone stays gone.
            let newer = projection.rows.get(&id).is_some_and(|known| known.revision() >= revision);
            if newer || projection.buried.contains(&id) {
                return;
            }
            if let Row::Known { record, .. } = &row {
                projection.names.insert(record.name.clone(), id.clone());
                projection.slots.insert(record.slot, id.clone());
            }
            projection.rows.insert(id.clone(), row.clone());
        }
        self.tell(Changed { id, revision, row: Some(row), last: None });
    }

    fn tell(&self, changed: Changed) {
        // An error means that nobody watches.
        self.changes.send(changed).map_or_else(drop, drop);
    }
}

fn add(txn: &mut Txn, leases: Vec<LeaseChange>) {
    for LeaseChange { key, revision, value } in leases {
        txn.guards.push(Guard { key: key.clone(), expect: Expect::Revision(revision) });
        txn.ops.push(Op::Put { key, value });
    }
}

fn encode_claim(id: &VmId) -> Result<Vec<u8>> {
    serde_json::to_vec(&Claim { vm: id.clone() })
        .map_err(|error| Error::new(Kind::Internal, format!("VM {id}: writing its claims")).because(error))
}

fn id_of(key: &str) -> Result<VmId> {
    key.strip_prefix("vms/").unwrap_or(key).parse().map_err(|error: Error| error.context(format!("store key {key:?}")))
}

/// `entry` as the row of `id`. `Unsupported`: a newer server's record is no damage, and nothing is touched before someone decides.
fn row_of(id: &VmId, entry: &Entry) -> Result<Row> {
    let revision = entry.revision;
    match VmRecord::decode(&entry.value) {
        // Whatever is done to a VM is named from its record: this one would have it done to another.
        Ok(record) if record.id != *id => {
            let why = format!("VM record: it lies under {id} and says that it is {}", record.id);
            Ok(Row::Unreadable { revision, why })
        }
        Ok(record) => Ok(Row::Known { revision, record: Arc::new(record) }),
        Err(error) if error.kind() == Kind::Unsupported => Err(error.context(format!("VM {id}"))),
        Err(error) => Ok(Row::Unreadable { revision, why: error.chain() }),
    }
}

/// What a key is about. One that is about nothing that there is was never written by a server: it is told, and let be.
fn understood<T>(meaning: Result<T>) -> Option<T> {
    meaning
        .inspect_err(|error| {
            error!(
                error = error.chain(),
                "the store has a row that is nothing of this server's, and it stays; to remove it, stop the server and delete \
                 it: sqlite3 state.db \"DELETE FROM kv WHERE key = …\""
            );
        })
        .ok()
}

/// Whose each slot is. A claim that cannot be read keeps its slot taken, whether or not a VM says that it is its.
async fn load_slots(store: &dyn StateStore, projection: &mut Projection) -> Result<()> {
    let listing = store.list("slots/").await?;
    let mut unclear: Vec<String> = listing.unreadable.into_iter().map(|bad| bad.key).collect();
    for entry in listing.entries {
        match serde_json::from_slice::<Claim>(&entry.value) {
            Ok(claim) => {
                let slot = understood(slot_of(&entry.key));
                slot.map(|slot| projection.slots.insert(slot, claim.vm));
            }
            Err(_) => unclear.push(entry.key),
        }
    }
    for (id, row) in &projection.rows {
        if let Row::Known { record, .. } = row {
            projection.slots.insert(record.slot, id.clone());
        }
    }
    for key in unclear {
        let Some(slot) = understood(slot_of(&key)) else { continue };
        if !projection.slots.contains_key(&slot) {
            error!(key, "the claim on a slot cannot be read, and no VM says that it is its: it is given to nobody");
            projection.lost_slots.insert(slot);
        }
    }
    Ok(())
}

/// A newer server's rows are refused here as everywhere. What cannot be read at all is forgotten in time.
async fn check_requests(store: &dyn StateStore) -> Result<()> {
    for entry in store.list("requests/").await?.entries {
        if let Err(error) = Request::check_version(&entry.value) {
            return Err(error.context(format!("store key {:?}", entry.key)));
        }
    }
    Ok(())
}

/// Names of VMs whose records cannot be read: they are found by them, and give them up when they are removed.
async fn load_names(store: &dyn StateStore, projection: &mut Projection) -> Result<()> {
    for entry in store.list("names/").await?.entries {
        let name = entry.key.trim_start_matches("names/").parse::<VmName>();
        let claim = serde_json::from_slice::<Claim>(&entry.value);
        // One that cannot be read keeps its name taken in the store all the same.
        if let (Ok(name), Ok(claim)) = (name, claim)
            && projection.rows.contains_key(&claim.vm)
        {
            projection.names.entry(name).or_insert(claim.vm);
        }
    }
    Ok(())
}

fn slot_of(key: &str) -> Result<Slot> {
    let number = key.trim_start_matches("slots/").parse();
    number.map(Slot).map_err(|error| Error::new(Kind::Corrupt, format!("store key {key:?}: not a slot")).because(error))
}
