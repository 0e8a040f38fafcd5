//! Some bugs, to see that they are found. They are in the ports' wrappers: no code of the product knows them.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use clawpot_core::ports::{
    BootFiles, BoxStream, Capabilities, Change, Check, Copied, Entry, GuestEndpoint, ImageDetail, ImageInfo, Images,
    Listing, Machine, Net, Seat, StateStore, Txn, TxnOutcome, UnreadableImage, Vmm, VolumeFile, Volumes,
};
use clawpot_core::volume::VolumeRecord;
use clawpot_core::{Fact, ImagePin, MachineId, VmmFact, VmmKind};
use clawpot_types::{ImageRef, MiB, Result, Revision, Slot, VmId, VolumeId};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Planted {
    /// Removing a disk is forgotten: said to be done, and not seen any more.
    SkippedUndo,
    /// Two slots are the same one.
    SlotTwice,
    /// Nobody is woken when a VMM ends by itself.
    LostWakeUp,
    /// Who writes to a volume looks like one who reads.
    WriterUnseen,
    /// A volume's file is said to be removed, and stays.
    FileKept,
}

/// What a daemon is made of, as far as a bug may be in it.
pub(crate) struct Ports {
    pub(crate) vmm: Arc<dyn Vmm>,
    pub(crate) net: Arc<dyn Net>,
    pub(crate) images: Arc<dyn Images>,
    pub(crate) volumes: Arc<dyn Volumes>,
    pub(crate) store: Arc<dyn StateStore>,
}

impl Planted {
    pub const ALL: [Self; 5] =
        [Self::SkippedUndo, Self::SlotTwice, Self::LostWakeUp, Self::WriterUnseen, Self::FileKept];

    #[must_use]
    pub(crate) fn into_ports(self, mut ports: Ports) -> Ports {
        match self {
            Self::SkippedUndo => {
                ports.images = Arc::new(Forgetful { images: ports.images, forgotten: Mutex::default() });
            }
            Self::SlotTwice => ports.net = Arc::new(Doubled(ports.net)),
            Self::LostWakeUp => ports.vmm = Arc::new(Deaf(ports.vmm)),
            Self::WriterUnseen => ports.store = Arc::new(Unseeing(ports.store)),
            Self::FileKept => ports.volumes = Arc::new(Keeping(ports.volumes)),
        }
        ports
    }
}

struct Forgetful {
    images: Arc<dyn Images>,
    forgotten: Mutex<BTreeSet<VmId>>,
}

#[async_trait]
impl Images for Forgetful {
    async fn resolve(&self, image: &ImageRef) -> Result<ImagePin> {
        self.images.resolve(image).await
    }

    async fn describe(&self, image: &ImageRef) -> Result<ImageDetail> {
        self.images.describe(image).await
    }

    async fn look(&self, pin: &ImagePin) -> Result<Option<()>> {
        self.images.look(pin).await
    }

    async fn ensure(&self, pin: &ImagePin) -> Result<BootFiles> {
        self.images.ensure(pin).await
    }

    async fn boots(&self, pin: &ImagePin, vmm: VmmKind) -> Result<()> {
        self.images.boots(pin, vmm).await
    }

    async fn list(&self) -> Result<(Vec<ImageInfo>, Vec<UnreadableImage>)> {
        self.images.list().await
    }

    fn disk_path(&self, vm: &VmId) -> PathBuf {
        self.images.disk_path(vm)
    }

    async fn look_disk(&self, vm: &VmId) -> Result<Option<()>> {
        if self.forgotten.lock().unwrap_or_else(PoisonError::into_inner).contains(vm) {
            return Ok(None);
        }
        self.images.look_disk(vm).await
    }

    async fn create_disk(&self, vm: &VmId, size: MiB) -> Result<PathBuf> {
        self.images.create_disk(vm, size).await
    }

    async fn remove_disk(&self, vm: &VmId) -> Result<()> {
        self.forgotten.lock().unwrap_or_else(PoisonError::into_inner).insert(vm.clone());
        Ok(())
    }
}

struct Doubled(Arc<dyn Net>);

/// Every slot but the last is itself.
fn doubled(slot: Slot, count: u32) -> Slot {
    if slot.0 + 1 == count { Slot(0) } else { slot }
}

#[async_trait]
impl Net for Doubled {
    fn slots(&self) -> u32 {
        self.0.slots()
    }

    fn seat(&self, slot: Slot) -> Result<Seat> {
        self.0.seat(doubled(slot, self.slots()))
    }

    async fn look(&self, slot: Slot) -> Result<Option<()>> {
        self.0.look(doubled(slot, self.slots())).await
    }

    async fn left(&self, slot: Slot) -> Result<Option<()>> {
        self.0.left(doubled(slot, self.slots())).await
    }

    async fn ensure(&self, slot: Slot) -> Result<()> {
        self.0.ensure(doubled(slot, self.slots())).await
    }

    async fn ensure_cut_off(&self, slot: Slot) -> Result<()> {
        self.0.ensure_cut_off(doubled(slot, self.slots())).await
    }

    async fn remove(&self, slot: Slot) -> Result<()> {
        self.0.remove(doubled(slot, self.slots())).await
    }

    async fn list(&self) -> Result<Vec<Slot>> {
        self.0.list().await
    }

    async fn warm(&self, next: &[Slot]) {
        self.0.warm(next).await;
    }
}

struct Deaf(Arc<dyn Vmm>);

#[async_trait]
impl Vmm for Deaf {
    fn capabilities(&self) -> Capabilities {
        self.0.capabilities()
    }

    async fn prepare(&self, machine: &Machine) -> Result<()> {
        self.0.prepare(machine).await
    }

    async fn start(&self, machine: &Machine) -> Result<()> {
        self.0.start(machine).await
    }

    async fn attach(&self, id: &MachineId, seat: &Seat) -> Result<GuestEndpoint> {
        self.0.attach(id, seat).await
    }

    async fn inspect(&self, id: &MachineId) -> Fact<VmmFact> {
        self.0.inspect(id).await
    }

    async fn exited(&self, _id: &MachineId) {
        std::future::pending().await
    }

    async fn stop(&self, id: &MachineId) -> Result<()> {
        self.0.stop(id).await
    }

    async fn destroy(&self, id: &MachineId) -> Result<()> {
        self.0.destroy(id).await
    }

    async fn list(&self) -> Result<Vec<MachineId>> {
        self.0.list().await
    }
}

struct Unseeing(Arc<dyn StateStore>);

#[async_trait]
impl StateStore for Unseeing {
    async fn get(&self, key: &str) -> Result<Option<Entry>> {
        let mut found = self.0.get(key).await?;
        if let Some(entry) = found.as_mut().filter(|_| key.starts_with("volumes/")) {
            let mut record = VolumeRecord::decode(&entry.value)?;
            record.attached.values_mut().for_each(|lease| lease.read_only = true);
            entry.value = record.encode()?;
        }
        Ok(found)
    }

    async fn list(&self, prefix: &str) -> Result<Listing> {
        self.0.list(prefix).await
    }

    async fn txn(&self, txn: Txn) -> Result<TxnOutcome> {
        self.0.txn(txn).await
    }

    async fn watch(&self, prefix: &str, from: Revision) -> Result<BoxStream<Result<Change>>> {
        self.0.watch(prefix, from).await
    }

    fn epoch(&self) -> u64 {
        self.0.epoch()
    }
}

struct Keeping(Arc<dyn Volumes>);

#[async_trait]
impl Volumes for Keeping {
    fn path(&self, id: &VolumeId) -> PathBuf {
        self.0.path(id)
    }

    async fn look(&self, id: &VolumeId) -> Result<Option<VolumeFile>> {
        self.0.look(id).await
    }

    async fn create(&self, id: &VolumeId, size: MiB) -> Result<()> {
        self.0.create(id, size).await
    }

    async fn copy(&self, from: &VolumeId, to: &VolumeId) -> Result<Copied> {
        self.0.copy(from, to).await
    }

    async fn check(&self, id: &VolumeId, how: Check) -> Result<String> {
        self.0.check(id, how).await
    }

    async fn grow(&self, id: &VolumeId, size: MiB) -> Result<()> {
        self.0.grow(id, size).await
    }

    async fn remove(&self, _id: &VolumeId) -> Result<()> {
        Ok(())
    }

    async fn list(&self) -> Result<Vec<VolumeId>> {
        self.0.list().await
    }
}
