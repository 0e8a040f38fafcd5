use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use clawpot_core::ports::{Net, Seat};
use clawpot_types::{Error, Kind, Result, Slot};
use tokio::sync::{Mutex, watch};
use tokio::task::JoinHandle;

use crate::address::RESOLVER_SLOT;
use crate::claim::Claim;
use crate::kernel::netlink::Netlink;
use crate::kernel::nft::Nft;
use crate::kernel::{link, netns, sysctl};
use crate::mark::{Mark, Standing};
use crate::names::Names;
use crate::slot::Site;
use crate::table::HostTable;
use crate::warm;
use crate::work::{Turn, Workshop};

/// Where things are on this host.
#[derive(Clone, Debug)]
pub struct Paths {
    /// Usually [`crate::NETNS_DIR`].
    pub netns_dir: PathBuf,
    /// The program, absolute.
    pub nft: PathBuf,
}

/// Who runs the instance's resolver, and where it listens. No VM has this uid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ResolverSeat {
    pub uid: u32,
    pub gid: u32,
    /// An address of the host's, there as long as [`SlotNet`] has not given up its block; port 53, UDP and TCP.
    pub address: Ipv4Addr,
}

/// The instance's network slots.
#[derive(Debug)]
pub struct SlotNet {
    shop: Arc<Workshop>,
    claim: Claim,
    /// `None`: work ahead no more.
    wanted: watch::Sender<Option<Vec<Slot>>>,
    warmer: Mutex<Option<JoinHandle<()>>>,
}

impl SlotNet {
    /// Finds what the instance has on this host, gives the host its table (in one transaction, with the elements of the
    /// slots in use) and the resolver's address. Everything is done in the network namespace of the calling process.
    ///
    /// To be called inside a tokio runtime. `PermissionDenied`: not root; `NotFound`: no `nft`.
    pub async fn open(claim: Claim, paths: Paths) -> Result<Self> {
        let site =
            Site { names: Names::new(claim.instance().clone()), block: claim.block(), netns_dir: paths.netns_dir };
        let here = site.clone();
        let seen = blocking(move || {
            netns::prepare_dir(&here.netns_dir)?;
            own_resolver_address(&here)?;
            if !sysctl::ip_forward()? {
                tracing::warn!(
                    "this host does not forward IPv4: VMs reach nothing but names; set net.ipv4.ip_forward=1"
                );
            }
            here.scan()
        })
        .await?;
        let mut standing = vec![Standing::Absent; usize::try_from(site.block.slots()).unwrap_or_default()];
        let mut given = BTreeSet::new();
        for (slot, seen) in seen {
            let Some(place) = usize::try_from(slot.0).ok().and_then(|n| standing.get_mut(n)) else { continue };
            *place = match seen.mark {
                Some(Mark::Given) if seen.mounted => Standing::Given,
                Some(Mark::CutOff) if seen.mounted => Standing::CutOff,
                Some(Mark::Ready(digest)) if seen.mounted => Standing::Ready(digest),
                _ => Standing::Leftover,
            };
            if *place == Standing::Given {
                given.insert(slot);
            }
        }
        let nft = Nft::new(paths.nft);
        let table = HostTable::replace(&nft, &site, given).await?;
        let shop = Arc::new(Workshop::new(site, nft, table, standing));
        let (wanted, changes) = watch::channel(Some(Vec::new()));
        // It ends when `wanted` does, after what it has in hand.
        let warmer = tokio::spawn(warm::run(Arc::clone(&shop), changes));
        Ok(Self { shop, claim, wanted, warmer: Mutex::new(Some(warmer)) })
    }

    #[must_use]
    pub fn resolver(&self) -> ResolverSeat {
        let block = self.shop.site.block;
        let uid = block.uid(RESOLVER_SLOT);
        ResolverSeat { uid, gid: uid, address: block.resolver_address() }
    }

    /// How often `nft` was run so far; for metrics and tests.
    #[must_use]
    pub fn nft_runs(&self) -> u64 {
        self.shop.nft.runs()
    }

    /// Transactions of rules so far, other than copies into a slot's own namespace.
    #[must_use]
    pub fn nft_transactions(&self) -> u64 {
        self.shop.nft.transactions()
    }

    /// Removes everything that bears the instance's name and gives up its block; the last thing that is done with it.
    /// `FailedPrecondition`: a slot is in use, which stays so. The resolver must have ended: its address goes.
    pub async fn give_up(&self) -> Result<()> {
        self.wanted.send_replace(None);
        if let Some(warmer) = self.warmer.lock().await.take() {
            warmer.await.map_err(|error| Error::new(Kind::Internal, "ending the work ahead").because(error))?;
        }
        let slots = self.list().await?;
        let in_use = |slot: &&Slot| matches!(self.shop.standing(**slot), Standing::Given | Standing::CutOff);
        if let Some(slot) = slots.iter().find(in_use) {
            return Err(Error::new(
                Kind::FailedPrecondition,
                format!("giving up the block of network slots: slot {slot} is in use"),
            )
            .hint("a VM is in it: start the server, stop or delete what `clawpot ls` shows, and ask again"));
        }
        self.remove_all(slots).await?;
        self.shop.table.remove(&self.shop.nft, &self.shop.site).await?;
        let claim = self.claim.clone();
        self.shop
            .block(move |shop| {
                disown_resolver_address(&shop.site)?;
                claim.give_up()
            })
            .await
    }

    /// At once: the kernel takes apart together what it is given together, and takes as long for one as for all.
    async fn remove_all(&self, slots: Vec<Slot>) -> Result<()> {
        let tasks: Vec<_> = slots
            .into_iter()
            .map(|slot| {
                let shop = Arc::clone(&self.shop);
                tokio::spawn(async move { shop.remove(slot, &shop.turn(slot).await?).await })
            })
            .collect();
        let mut all = Ok(());
        for task in tasks {
            let removed = task.await.unwrap_or_else(|error| {
                Err(Error::new(Kind::Internal, "removing a network slot: the work ended early").because(error))
            });
            all = all.and(removed);
        }
        all
    }

    /// Runs `work` to its end, whether or not the caller waits for it.
    async fn on<F, W>(&self, slot: Slot, work: W) -> Result<()>
    where
        W: FnOnce(Arc<Workshop>, Turn) -> F + Send + 'static,
        F: Future<Output = Result<()>> + Send + 'static,
    {
        self.shop.site.block.check(slot)?;
        let shop = Arc::clone(&self.shop);
        let task = tokio::spawn(async move {
            let turn = shop.turn(slot).await?;
            work(shop, turn).await
        });
        task.await.unwrap_or_else(|error| {
            Err(Error::new(Kind::Internal, format!("network slot {slot}: the work on it ended early")).because(error))
        })
    }

    #[cfg(test)]
    pub(crate) fn shop(&self) -> &Arc<Workshop> {
        &self.shop
    }
}

#[async_trait]
impl Net for SlotNet {
    fn slots(&self) -> u32 {
        self.shop.site.block.slots()
    }

    fn seat(&self, slot: Slot) -> Result<Seat> {
        let block = self.shop.site.block;
        block.check(slot)?;
        let uid = block.uid(slot);
        Ok(Seat { slot, uid, gid: uid, netns: self.shop.site.netns(slot), address: block.slot_address(slot) })
    }

    async fn look(&self, slot: Slot) -> Result<Option<()>> {
        self.shop.site.block.check(slot)?;
        Ok(self.shop.is_given(slot)?.then_some(()))
    }

    async fn left(&self, slot: Slot) -> Result<Option<()>> {
        self.shop.site.block.check(slot)?;
        Ok(self.shop.is_left(slot)?.then_some(()))
    }

    async fn ensure(&self, slot: Slot) -> Result<()> {
        self.on(slot, move |shop, turn| async move { shop.ensure(slot, &turn).await }).await
    }

    async fn ensure_cut_off(&self, slot: Slot) -> Result<()> {
        self.on(slot, move |shop, turn| async move { shop.ensure_cut_off(slot, &turn).await }).await
    }

    async fn remove(&self, slot: Slot) -> Result<()> {
        self.on(slot, move |shop, turn| async move { shop.remove(slot, &turn).await }).await
    }

    async fn list(&self) -> Result<Vec<Slot>> {
        let seen = self.shop.block(|shop| shop.site.scan()).await?;
        let mut slots = self.shop.table.admitted().await;
        slots.extend(seen.into_keys().filter(|slot| self.shop.site.block.check(*slot).is_ok()));
        Ok(slots.into_iter().collect())
    }

    async fn warm(&self, next: &[Slot]) {
        let next: Vec<Slot> = next.iter().copied().filter(|slot| self.shop.site.block.check(*slot).is_ok()).collect();
        // The same wish again is one too: the last may have failed.
        self.wanted.send_if_modified(|wanted| {
            let open = wanted.is_some();
            if open {
                *wanted = Some(next);
            }
            open
        });
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|error| Err(Error::new(Kind::Internal, "looking at the host's network").because(error)))
}

/// On `lo`, labelled with the instance's name. It needs no link of its own, and a label finds it again.
fn own_resolver_address(site: &Site) -> Result<()> {
    let mut netlink = Netlink::route()?;
    let own = resolver_address(&mut netlink, site)?;
    link::add_address(&mut netlink, &own, Some(&site.names.resolver_label()))
}

fn disown_resolver_address(site: &Site) -> Result<()> {
    let mut netlink = Netlink::route()?;
    let own = resolver_address(&mut netlink, site)?;
    link::delete_address(&mut netlink, &own)
}

fn resolver_address(netlink: &mut Netlink, site: &Site) -> Result<link::Own> {
    let index = link::index(netlink, "lo")?;
    Ok(link::Own { index, address: site.block.resolver_address(), prefix: 32 })
}
