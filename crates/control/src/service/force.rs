//! The way out of quarantine, on the owner's explicit word: everything on the host that bears the VM's id is removed,
//! then its row. The record cannot be asked, so the host is.

use std::time::Duration;

use clawpot_core::event::{About, Draft};
use clawpot_types::{Error, Incarnation, Kind, Result, Revision, VmId};

use super::Service;

/// A killed process that has not gone by then is stuck in the kernel.
const DEATH: Duration = Duration::from_secs(5);

impl Service {
    pub(super) async fn force(&self, id: &VmId, revision: Revision, actor: &str) -> Result<()> {
        for vmm in self.deps.vmms.iter() {
            for machine in vmm.list().await?.into_iter().filter(|machine| machine.vm == *id) {
                vmm.stop(&machine).await?;
                tokio::time::timeout(DEATH, vmm.exited(&machine)).await.map_err(|_| {
                    Error::new(Kind::Timeout, format!("VM {id}: machine {machine}: its processes do not die"))
                })?;
                vmm.destroy(&machine).await?;
            }
        }
        for slot in self.records.slots_of(id) {
            self.deps.net.remove(slot).await?;
        }
        self.deps.images.remove_disk(id).await?;
        self.deps.console.erase(id).await?;
        let leases = super::volume::releases(&self.deps, id).await?;
        match self.records.forget(id, revision, leases, vec![self.forced(id, actor)?]).await? {
            Some(_) => Ok(()),
            None => Err(Error::new(Kind::Conflict, format!("VM {id}: its row changed while it was removed"))),
        }
    }

    /// Its record cannot be asked for its name: what guards the name can, or the id makes one.
    fn forced(&self, id: &VmId, actor: &str) -> Result<Draft> {
        let name = self.records.name_of(id).map_or_else(|| format!("vm-{id}").parse(), Ok)?;
        Ok(Draft {
            time: self.deps.clock.now(),
            about: About::Vm { vm: id.clone(), name, incarnation: Incarnation(0) },
            kind: "vm.gone",
            message: "quarantined, and given up by force".to_owned(),
            actor: actor.to_owned(),
        })
    }
}
