//! The instance's table on the host, and which slots it lets talk. One transaction at a time: what is remembered here is
//! what the kernel has.

use std::collections::BTreeSet;

use clawpot_types::{Error, Result, Slot};
use tokio::sync::Mutex;

use crate::kernel::nfnetlink::Change;
use crate::kernel::nft::{Nft, inet_table_exists};
use crate::rules::host;
use crate::slot::Site;

#[derive(Debug)]
pub(crate) struct HostTable {
    /// Slots whose two elements are set.
    admitted: Mutex<BTreeSet<Slot>>,
}

impl HostTable {
    /// Replaces whatever table of this name there is, in one transaction: an older server's rules go, and those who may
    /// talk notice nothing.
    pub(crate) async fn replace(nft: &Nft, site: &Site, slots: BTreeSet<Slot>) -> Result<Self> {
        let rules = host::replace(&site.names, &site.block, slots.iter().copied());
        nft.run(&rules, None, "loading the host's table for network slots").await.map_err(|error| {
            error.hint("is nftables installed, and is the server root? `clawpot doctor` checks both")
        })?;
        Ok(Self { admitted: Mutex::new(slots) })
    }

    /// One transaction of two elements; none if they are set.
    pub(crate) async fn admit(&self, nft: &Nft, site: &Site, slot: Slot) -> Result<()> {
        let mut admitted = self.admitted.lock().await;
        if admitted.contains(&slot) {
            return Ok(());
        }
        let what = format!("network slot {slot}: letting it talk");
        let elements = host::elements(&site.names, &site.block, slot);
        let failed = match nft.change(Change::Add, site.names.table(), elements, &what).await {
            Ok(()) => {
                admitted.insert(slot);
                return Ok(());
            }
            Err(error) => error,
        };
        // Somebody flushed the host's rules: make ours again, all of them.
        let all: BTreeSet<Slot> = admitted.iter().copied().chain([slot]).collect();
        self.again((nft, site), all, &mut admitted, &failed).await
    }

    pub(crate) async fn silence(&self, nft: &Nft, site: &Site, slot: Slot) -> Result<()> {
        let mut admitted = self.admitted.lock().await;
        if !admitted.contains(&slot) {
            return Ok(());
        }
        let what = format!("network slot {slot}: silencing it");
        let elements = host::elements(&site.names, &site.block, slot);
        let failed = match nft.change(Change::Delete, site.names.table(), elements, &what).await {
            Ok(()) => {
                admitted.remove(&slot);
                return Ok(());
            }
            Err(error) => error,
        };
        let rest: BTreeSet<Slot> = admitted.iter().copied().filter(|other| *other != slot).collect();
        self.again((nft, site), rest, &mut admitted, &failed).await
    }

    /// The whole table, after one transaction on it failed.
    async fn again(
        &self,
        (nft, site): (&Nft, &Site),
        slots: BTreeSet<Slot>,
        admitted: &mut BTreeSet<Slot>,
        failed: &Error,
    ) -> Result<()> {
        tracing::warn!(
            error = failed.chain(),
            "the host's table for network slots is not as it was left; loading it again"
        );
        self.load(nft, site, slots, admitted).await
    }

    async fn load(&self, nft: &Nft, site: &Site, slots: BTreeSet<Slot>, admitted: &mut BTreeSet<Slot>) -> Result<()> {
        let rules = host::replace(&site.names, &site.block, slots.iter().copied());
        nft.run(&rules, None, "loading the host's table for network slots again").await?;
        *admitted = slots;
        Ok(())
    }

    /// Somebody's `nft flush ruleset` takes our table too; nobody else brings it back.
    pub(crate) async fn restore_if_lost(&self, nft: &Nft, site: &Site) -> Result<()> {
        let mut admitted = self.admitted.lock().await;
        if inet_table_exists(&site.names.table())? {
            return Ok(());
        }
        tracing::warn!("the host's table for network slots is gone; loading it again");
        let slots = admitted.clone();
        self.load(nft, site, slots, &mut admitted).await
    }

    pub(crate) async fn admitted(&self) -> BTreeSet<Slot> {
        self.admitted.lock().await.clone()
    }

    /// The table is gone when it returns.
    pub(crate) async fn remove(&self, nft: &Nft, site: &Site) -> Result<()> {
        let mut admitted = self.admitted.lock().await;
        nft.run(&host::remove(&site.names), None, "removing the host's table for network slots").await?;
        admitted.clear();
        Ok(())
    }
}
