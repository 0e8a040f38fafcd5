//! What is. Asks only what the phase's plan can use: a look costs a few system calls.

use clawpot_core::facts::GuestFact;
use clawpot_core::{Fact, Facts, LastWords, Phase, VmRecord, VmmFact};
use tracing::warn;

use super::Runner;

/// Console lines in which a kernel's end is looked for: a panic's stack trace and registers come after its first line.
const LAST_LINES: usize = 80;

impl Runner {
    pub(super) async fn look(&self, record: &VmRecord) -> Facts {
        let deps = &self.deps;
        let preparing = record.phase == Phase::Preparing;
        let deleting = record.phase == Phase::Deleting;
        let image = match preparing {
            true => Fact::from_look(deps.images.look(&record.image).await),
            false => not_asked(),
        };
        let disk = match preparing || deleting {
            true => Fact::from_look(deps.images.look_disk(&record.id).await),
            false => not_asked(),
        };
        let traces = match deleting {
            true => Fact::from_look(deps.console.look(&record.id).await),
            false => not_asked(),
        };
        let net = match record.phase {
            Phase::Booting | Phase::Running => not_asked(),
            Phase::Preparing => Fact::from_look(deps.net.look(record.slot).await),
            // On the way down what counts is not whether it could be used.
            _ => Fact::from_look(deps.net.left(record.slot).await),
        };
        let link = self.lives.link(&record.id).filter(|link| link.machine == record.machine());
        let vmm = match self.inspect(record).await {
            // Without the endpoint the runner cannot speak to the guest, whatever the driver has open.
            Fact::Present(VmmFact::Running { attached }) => {
                Fact::Present(VmmFact::Running { attached: attached && link.is_some() })
            }
            other => other,
        };
        let last_words = match vmm {
            Fact::Present(VmmFact::Exited { .. }) => self.last_words(record).await,
            _ => LastWords::Nothing,
        };
        Facts {
            image,
            disk,
            net,
            vmm,
            guest: link.map_or(GuestFact::NotAsked, |link| link.guest),
            traces,
            clients: self.lives.clients(&record.id),
            last_words,
            boot_id: deps.boot_id.clone(),
        }
    }

    /// Only while it matters how the machine ended.
    async fn last_words(&self, record: &VmRecord) -> LastWords {
        if !matches!(record.phase, Phase::Booting | Phase::Running) {
            return LastWords::Nothing;
        }
        match self.deps.console.tail(&record.id, LAST_LINES).await {
            Ok(lines) => LastWords::of(&lines),
            Err(error) => {
                warn!(vm = %self.id, error = error.chain(), "reading the console of a VM that ended");
                LastWords::Nothing
            }
        }
    }

    async fn inspect(&self, record: &VmRecord) -> Fact<VmmFact> {
        let Some(choice) = &record.vmm else { return Fact::Absent };
        match self.deps.vmms.get(choice.kind) {
            Ok(vmm) => vmm.inspect(&record.machine()).await,
            Err(error) => Fact::Unknown(error.chain()),
        }
    }
}

fn not_asked<T>() -> Fact<T> {
    Fact::Unknown("not asked in this phase".to_owned())
}
