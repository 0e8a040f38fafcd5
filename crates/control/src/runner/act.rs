//! One step: the record says to whom and with what.

use std::time::Duration;

use clawpot_core::facts::GuestFact;
use clawpot_core::plan::Step;
use clawpot_core::ports::{Machine, Vmm};
use clawpot_core::{Phase, Reach, VmRecord};
use clawpot_failpoint::{self as failpoint, Point};
use clawpot_types::{Error, Kind, Millis, Result};
use tracing::info;

use super::{LONGEST_SLEEP, Runner};
use crate::live::Link;
use crate::records::Row;
use crate::service::volume;

/// What a guest's processes get to end by themselves where the VM is deleted and only its volumes have to be unmounted.
const PATIENCE: Duration = Duration::from_secs(1);

impl Runner {
    pub(super) async fn act(&self, step: Step, record: &VmRecord) -> Result<()> {
        let deps = &self.deps;
        let done = match step {
            Step::EnsureImage => deps.images.ensure(&record.image).await.map(drop),
            Step::CreateDisk => deps.images.create_disk(&record.id, record.spec.disk).await.map(drop),
            Step::EnsureNet => match record.spec.reach {
                Reach::Default => deps.net.ensure(record.slot).await,
                Reach::None => deps.net.ensure_cut_off(record.slot).await,
            },
            Step::PrepareVmm => self.prepare(record).await,
            Step::StartVmm => self.start(record).await,
            Step::AttachVmm => self.attach(record).await,
            Step::SayHello => self.say_hello(record).await,
            Step::AskShutdown => self.ask_shutdown(record).await,
            Step::KillVmm => self.vmm(record)?.stop(&record.machine()).await,
            Step::DestroyVmm => self.destroy(record).await,
            Step::RemoveNet => deps.net.remove(record.slot).await,
            Step::RemoveDisk => deps.images.remove_disk(&record.id).await,
            Step::RemoveTraces => deps.console.erase(&record.id).await,
        };
        failpoint::reached(Point::StepDone);
        done.map_err(|error| error.context(format!("VM {}: {}", record.name, doing(step))))
    }

    fn vmm(&self, record: &VmRecord) -> Result<&std::sync::Arc<dyn Vmm>> {
        let choice = record.vmm.as_ref().ok_or_else(|| {
            Error::new(Kind::Internal, format!("VM {}: no VMM was chosen in phase {}", record.name, record.phase))
        })?;
        self.deps.vmms.get(choice.kind)
    }

    /// `ready`: its volumes are made ready for it.
    async fn machine(&self, record: &VmRecord, ready: bool) -> Result<Machine> {
        Ok(Machine {
            id: record.machine(),
            name: record.name.clone(),
            vcpus: record.spec.vcpus,
            memory: record.spec.memory,
            files: self.deps.images.ensure(&record.image).await?,
            disk: self.deps.images.disk_path(&record.id),
            extra_disks: volume::disk_files(&self.deps, record, ready).await?,
            seat: self.deps.net.seat(record.slot)?,
        })
    }

    async fn prepare(&self, record: &VmRecord) -> Result<()> {
        // To wait for a volume or to check it may take half an hour, for which neither a delete nor the server's end waits.
        let machine = tokio::select! {
            biased;
            machine = self.machine_alone(record) => machine?,
            () = self.given_up(record) => return Ok(()),
        };
        self.vmm(record)?.prepare(&machine).await
    }

    /// Nobody that no record knows writes to its disk or its volumes, which are made ready for it.
    async fn machine_alone(&self, record: &VmRecord) -> Result<Machine> {
        let has_volumes = volume::volumes_of(record).next().is_some();
        let tell = |why: &str| info!(vm = %record.id, name = %record.name, why, "its machine is not made yet");
        self.strays.out_of_the_way(&record.machine(), has_volumes, tell).await;
        self.machine(record, true).await
    }

    /// Something else is wanted of the VM than `record` says, its time to live is over, or the server goes. Takes wake-ups:
    /// another look must follow.
    async fn given_up(&self, record: &VmRecord) {
        let mut leaving = self.leaving.clone();
        let changed = async {
            loop {
                let now = self.deps.clock.now();
                let expires_at = match self.records.get(&self.id) {
                    Some(Row::Known { record: found, .. }) if found.desired == record.desired => found.expires_at,
                    _ => return,
                };
                if expires_at.is_some_and(|at| at <= now) {
                    return;
                }
                let left = expires_at.map_or(LONGEST_SLEEP, |at| at.since(now).min(LONGEST_SLEEP));
                // A timeout is as good a reason to look again as a wake-up.
                let _woken = tokio::time::timeout(left, self.wake.notified()).await.is_ok();
            }
        };
        tokio::select! {
            biased;
            // The sender is gone only when the daemon is: both mean leave.
            _ = leaving.wait_for(|leaving| *leaving) => {}
            () = changed => {}
        }
    }

    async fn start(&self, record: &VmRecord) -> Result<()> {
        let machine = self.machine(record, false).await?;
        self.vmm(record)?.start(&machine).await
    }

    async fn attach(&self, record: &VmRecord) -> Result<()> {
        let seat = self.deps.net.seat(record.slot)?;
        let endpoint = self.vmm(record)?.attach(&record.machine(), &seat).await?;
        let link = Link { machine: record.machine(), endpoint, guest: GuestFact::NotAsked };
        self.lives.set_link(&record.id, Some(link));
        Ok(())
    }

    async fn say_hello(&self, record: &VmRecord) -> Result<()> {
        let link = self.link(record)?;
        if link.guest == GuestFact::NotAsked {
            self.lives.set_guest(&record.id, GuestFact::Silent);
        }
        let hello = self.deps.guest.hello(&link.machine, &link.endpoint).await?;
        if record.phase == Phase::Booting {
            info!(vm = %record.id, name = %record.name, agent = hello.agent_version, kernel = hello.kernel_release, "guest says hello");
        }
        failpoint::reached(Point::GuestSaidHello);
        self.lives.set_hello(&record.id, hello.timings);
        self.lives.set_guest(&record.id, GuestFact::Ready);
        Ok(())
    }

    async fn ask_shutdown(&self, record: &VmRecord) -> Result<()> {
        let link = self.link(record)?;
        // Half of what is left, so that the guest's own patience ends before ours.
        let left = record.deadline.map_or(Duration::ZERO, |deadline| deadline.since(self.deps.clock.now()));
        let most = if record.phase == Phase::Deleting { PATIENCE } else { left };
        let grace = Millis(u64::try_from((left / 2).min(most).as_millis()).unwrap_or(u64::MAX));
        self.deps.guest.shutdown(&link.machine, &link.endpoint, grace).await?;
        failpoint::reached(Point::GuestAsked);
        self.lives.set_guest(&record.id, GuestFact::ShuttingDown);
        Ok(())
    }

    async fn destroy(&self, record: &VmRecord) -> Result<()> {
        self.deps.guest.forget(&record.machine());
        self.lives.set_link(&record.id, None);
        self.vmm(record)?.destroy(&record.machine()).await?;
        volume::settle(&self.deps, record).await;
        Ok(())
    }

    fn link(&self, record: &VmRecord) -> Result<Link> {
        let link = self.lives.link(&record.id).filter(|link| link.machine == record.machine());
        link.ok_or_else(|| Error::new(Kind::Unavailable, "its guest is not attached"))
    }
}

const fn doing(step: Step) -> &'static str {
    match step {
        Step::EnsureImage => "verifying its image",
        Step::CreateDisk => "creating its disk",
        Step::EnsureNet => "making its network",
        Step::PrepareVmm => "preparing its directory",
        Step::StartVmm => "starting the VMM",
        Step::AttachVmm => "attaching to the VMM",
        Step::SayHello => "greeting the guest",
        Step::AskShutdown => "asking the guest to shut down",
        Step::KillVmm => "killing the VMM",
        Step::DestroyVmm => "removing the machine",
        Step::RemoveNet => "removing its network",
        Step::RemoveDisk => "removing its disk",
        Step::RemoveTraces => "removing its logs",
    }
}
