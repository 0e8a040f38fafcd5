//! A pure model of a host with one VM, and of the runner that carries plans out on it.
//!
//! A step whose prerequisites nobody made panics, as does an illegal edge: those are properties of every run.

use std::collections::BTreeMap;
use std::time::Duration;

use clawpot_core::exit::Cause;
use clawpot_core::facts::Clients;
use clawpot_core::plan::{AfterError, Limits, after_error};
use clawpot_core::request::{Answer, Request, answer};
use clawpot_core::{
    Desired, Fact, Facts, Failure, GuestFact, LastWords, Next, Phase, Reason, Step, VmRecord, VmmEnd, VmmFact, plan,
};
use clawpot_types::{Error, Incarnation, Kind, Retry, Timestamp};

/// The process in a machine's jail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Process {
    NotStarted,
    Lives,
    Exited,
}

/// What the plan cannot be sure of when a look fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Look {
    Image,
    Disk,
    Net,
    Vmm,
    Traces,
}

/// What comes between two turns of the runner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    VmmDies,
    GuestPowersOff,
    GuestPanics,
    HostReboots,
    /// The daemon is killed and started: what only its memory knew is gone.
    DaemonRestarts,
    Asked(Request),
    /// The next step has no effect and fails so.
    StepFails(Kind, Retry),
    /// The next step has its effect, and its answer is lost.
    AnswerLost(Kind, Retry),
    /// The next look does not see this.
    Blind(Look),
    /// For the next looks nobody can tell whose the machine's process is.
    Doubted(u32),
    GuestGoesSilent,
    GuestIgnoresShutdown,
    DiskIsLost,
    ClientsLeave,
}

/// How a run came to rest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rest {
    /// `None`: forgotten.
    pub phase: Option<Phase>,
    pub desired: Desired,
    pub disk: bool,
    pub net: bool,
    pub machines: Vec<(Incarnation, Process)>,
    pub traces: bool,
}

#[derive(Clone, Debug)]
pub struct World {
    pub record: Option<VmRecord>,
    pub now: Timestamp,
    pub limits: Limits,
    pub boot_id: u64,
    pub image: bool,
    /// Which disk it is: another number is another disk.
    pub disk: Option<u64>,
    disks_made: u64,
    /// The disk that holds the owner's data.
    pub owned: Option<u64>,
    pub net: bool,
    pub machines: BTreeMap<Incarnation, Process>,
    pub traces: bool,
    pub attached: Option<Incarnation>,
    pub guest: GuestFact,
    guest_answers: bool,
    guest_obeys: bool,
    /// How the last process ended, and what its guest's kernel said.
    end: VmmEnd,
    last_words: LastWords,
    /// When a guest that obeys will be gone.
    ends_at: Option<Timestamp>,
    pub clients: Clients,
    blind: Vec<Look>,
    /// So many looks more.
    doubts: u32,
    failing: Option<(Kind, Retry, bool)>,
    /// Fails until it is mended.
    pub broken: Option<(Step, Kind, Retry)>,
    /// Hellos in Running that nobody answered.
    unanswered: usize,
    pub turns: usize,
}

/// How long a guest takes to shut down.
const SHUTDOWN: Duration = Duration::from_millis(500);

impl World {
    pub fn new(record: VmRecord) -> Self {
        Self {
            now: record.phase_since,
            record: Some(record),
            limits: Limits::default(),
            boot_id: 1,
            image: false,
            disk: None,
            disks_made: 0,
            owned: None,
            net: false,
            machines: BTreeMap::new(),
            traces: false,
            attached: None,
            guest: GuestFact::NotAsked,
            guest_answers: true,
            guest_obeys: true,
            end: VmmEnd::Signal(9),
            last_words: LastWords::Nothing,
            ends_at: None,
            clients: Clients::Attached,
            blind: Vec::new(),
            doubts: 0,
            failing: None,
            broken: None,
            unanswered: 0,
            turns: 0,
        }
    }

    pub fn record(&self) -> &VmRecord {
        self.record.as_ref().expect("the VM is gone")
    }

    fn boot_text(&self) -> String {
        format!("boot-{}", self.boot_id)
    }

    pub fn make_disk(&mut self) {
        self.disks_made += 1;
        self.disk = Some(self.disks_made);
    }

    pub fn facts(&self) -> Facts {
        let seen = |look: Look, there: bool| match there {
            _ if self.blind.contains(&look) => Fact::Unknown("the look failed".to_owned()),
            true => Fact::Present(()),
            false => Fact::Absent,
        };
        let current = self.record().incarnation;
        let vmm = match self.machines.get(&current) {
            _ if self.blind.contains(&Look::Vmm) => Fact::Unknown("the look failed".to_owned()),
            None => Fact::Absent,
            Some(_) if self.doubts > 0 => Fact::Present(VmmFact::Unproven { why: "a stranger".to_owned() }),
            Some(Process::NotStarted) => Fact::Present(VmmFact::Prepared),
            Some(Process::Lives) => Fact::Present(VmmFact::Running { attached: self.attached == Some(current) }),
            Some(Process::Exited) => Fact::Present(VmmFact::Exited { how: self.end.clone() }),
        };
        Facts {
            image: seen(Look::Image, self.image),
            disk: seen(Look::Disk, self.disk.is_some()),
            net: seen(Look::Net, self.net),
            vmm,
            guest: if self.attached == Some(current) { self.guest } else { GuestFact::NotAsked },
            traces: seen(Look::Traces, self.traces),
            clients: self.clients,
            last_words: self.last_words.clone(),
            boot_id: self.boot_text(),
        }
    }

    /// The plan for the facts as they are now.
    pub fn plan(&self) -> Next {
        plan(self.record(), &self.facts(), self.now, &self.limits)
    }

    /// Something happens to the VM, its host or its owner.
    pub fn happen(&mut self, event: Event) {
        let Some(record) = &mut self.record else { return };
        self.unanswered = 0;
        match event {
            Event::VmmDies => self.end_processes(VmmEnd::Signal(9), LastWords::Nothing),
            Event::GuestPowersOff => self.end_processes(VmmEnd::Code(0), LastWords::Down),
            Event::GuestPanics => self.end_processes(VmmEnd::Code(0), LastWords::Panic("panic".to_owned())),
            Event::HostReboots => {
                self.boot_id += 1;
                self.net = false;
                self.image = false;
                self.end_processes(VmmEnd::Unseen("the host was rebooted".to_owned()), LastWords::Nothing);
                self.restart_daemon();
            }
            Event::DaemonRestarts => self.restart_daemon(),
            Event::Asked(request) => {
                if answer(request, record.phase, record.desired) == Answer::Accept {
                    match request {
                        Request::Start => {
                            record.desired = Desired::Running;
                            record.restart = record.restart.afresh();
                            record.keep(record.ttl, self.now);
                        }
                        Request::Stop => {
                            record.desired = Desired::Stopped;
                            record.restart = record.restart.afresh();
                        }
                        Request::Delete | Request::Force => record.desired = Desired::Deleted,
                        Request::Exec => return,
                        Request::Keep => return record.keep(record.ttl, self.now),
                    }
                    record.intent_by = "uid=0".to_owned();
                    record.generation = record.generation.next();
                }
            }
            Event::StepFails(kind, retry) => self.failing = Some((kind, retry, false)),
            Event::AnswerLost(kind, retry) => self.failing = Some((kind, retry, true)),
            Event::Blind(look) => self.blind.push(look),
            Event::Doubted(looks) => self.doubts = looks,
            Event::GuestGoesSilent => self.guest_answers = false,
            Event::GuestIgnoresShutdown => self.guest_obeys = false,
            Event::DiskIsLost => {
                self.disk = None;
                // Nothing is to be kept any more.
                self.owned = None;
            }
            Event::ClientsLeave => self.clients = Clients::NoneSince(self.now),
        }
    }

    fn end_processes(&mut self, end: VmmEnd, last_words: LastWords) {
        for process in self.machines.values_mut().filter(|process| **process == Process::Lives) {
            *process = Process::Exited;
            self.end = end.clone();
            self.last_words = last_words.clone();
        }
        self.ends_at = None;
    }

    fn restart_daemon(&mut self) {
        self.attached = None;
        self.guest = GuestFact::NotAsked;
        if !matches!(self.clients, Clients::Attached) {
            self.clients = Clients::NoneSince(self.now);
        }
    }

    fn pass(&mut self, time: Duration) {
        self.now = self.now.after(time);
        if self.ends_at.is_some_and(|at| self.now >= at) {
            self.end_processes(VmmEnd::Code(0), LastWords::Down);
        }
    }

    /// One look, one plan, and what follows. `Some`: it rests until something happens.
    pub fn turn(&mut self) -> Option<Rest> {
        self.turns += 1;
        self.pass(Duration::from_millis(1));
        let facts = self.facts();
        // The image is not the VM's: it stays.
        let blind = std::mem::take(&mut self.blind).iter().any(|look| *look != Look::Image);
        let next = plan(self.record(), &facts, self.now, &self.limits);
        if matches!(facts.vmm, Fact::Present(VmmFact::Unproven { .. })) {
            assert!(
                matches!(next, Next::Quarantine { .. } | Next::Wait { .. }),
                "{next:?} though nobody knows whose it is"
            );
        }
        self.doubts = self.doubts.saturating_sub(1);
        match next {
            Next::Quarantine { why } => self.move_to(self.record().quarantined(why, self.now)),
            Next::Release => self.move_to(self.record().released(self.now)),
            Next::Do(step) => self.carry_out(step),
            Next::Become { phase, limit } => self.become_phase(phase, limit),
            Next::End { why } => self.end(&Cause::of(&why)),
            Next::Expire => self.record = Some(self.record().expired()),
            Next::Remove => self.happen(Event::Asked(Request::Delete)),
            Next::Forget => {
                assert!(!blind, "forgotten although something could not be seen: {facts:?}");
                self.record = None;
                return Some(self.rest(Desired::Deleted));
            }
            Next::Wait { until: Some(until) } => {
                assert!(until > self.now, "a wait for {until:?} at {:?} never sleeps: {facts:?}", self.now);
                let time = until.since(self.now).min(Duration::from_secs(60));
                // A process that ends wakes the runner.
                let end = self.ends_at.map_or(time, |at| at.since(self.now).min(time));
                self.pass(end);
            }
            Next::Wait { until: None } if self.ends_at.is_some() => self.pass(SHUTDOWN),
            Next::Wait { until: None } => return Some(self.rest(self.record().desired)),
        }
        // A guest that fell silent in Running is asked again and again: that is how such a VM rests.
        let polls = self.record().phase == Phase::Running && self.unanswered > 20;
        (polls && self.record().desired == Desired::Running).then(|| self.rest(Desired::Running))
    }

    fn move_to(&mut self, next: VmRecord) {
        assert!(self.record().phase.may_become(next.phase), "{} ─► {} is no edge", self.record().phase, next.phase);
        self.record = Some(next);
    }

    fn rest(&self, desired: Desired) -> Rest {
        Rest {
            phase: self.record.as_ref().map(|record| record.phase),
            desired,
            disk: self.disk.is_some(),
            net: self.net,
            machines: self.machines.iter().map(|(incarnation, process)| (*incarnation, *process)).collect(),
            traces: self.traces,
        }
    }

    /// Turns until it rests.
    ///
    /// # Panics
    /// When that takes more turns than any run should: it never ends.
    pub fn settle(&mut self) -> Rest {
        for _ in 0..1000 {
            if let Some(rest) = self.turn() {
                return rest;
            }
        }
        panic!("it never comes to rest: {:?}, {:?}", self.record, self.facts());
    }

    fn become_phase(&mut self, phase: Phase, limit: Option<Duration>) {
        let boot_text = self.boot_text();
        let now = self.now;
        let record = self.record.as_mut().expect("the VM is gone");
        assert!(record.phase.may_become(phase), "{} ─► {phase} is no edge", record.phase);
        match phase {
            Phase::Preparing => {
                record.incarnation = record.incarnation.next();
                record.boot_id = boot_text;
                record.failure = None;
                record.restart.at = None;
                // What is started again and again is not silent each time, or it would never come to rest.
                self.guest_answers |= record.restart.attempts > 0;
            }
            Phase::Stopping => drop(record.note_wish(Reason::Stopped, now)),
            Phase::Deleting => drop(record.note_wish(Reason::Deleted, now)),
            Phase::Booting => {
                record.disk_made = true;
                self.owned = self.disk;
            }
            _ => {}
        }
        record.phase = phase;
        record.phase_since = now;
        record.deadline = limit.map(|limit| now.after(limit));
    }

    fn end(&mut self, cause: &Cause) {
        let before = self.record();
        let mut next = before.ended(cause, self.now, &self.limits);
        assert!(before.phase.may_become(next.phase), "{} ─► {} is no edge", before.phase, next.phase);
        if next.phase == Phase::Failed {
            next.failure = Some(Failure {
                during: before.phase,
                generation: before.generation,
                kind: Kind::Internal,
                message: cause.message.clone(),
                hint: None,
                cleanup: None,
                console_tail: Vec::new(),
            });
        }
        self.record = Some(next);
    }

    fn carry_out(&mut self, step: Step) {
        if step == Step::SayHello {
            // As the runner does: from now on it was asked, whatever comes of it.
            self.guest = GuestFact::Silent;
        }
        let broken = self.broken.filter(|(broken, ..)| *broken == step).map(|(_, kind, retry)| (kind, retry, false));
        let done = match self.failing.take().or(broken) {
            Some((kind, retry, false)) => Err((kind, retry)),
            Some((kind, retry, true)) => self.apply(step).and(Err((kind, retry))),
            None => self.apply(step),
        };
        let Err((kind, retry)) = done else { return };
        match after_error(self.record(), step, kind, retry) {
            AfterError::TryAgain if step == Step::SayHello => {
                self.unanswered += usize::from(self.record().phase == Phase::Running && !self.guest_answers);
                self.pass(Duration::from_secs(5));
            }
            AfterError::TryAgain => self.pass(self.limits.retry),
            AfterError::Fail => self.end(&Cause::step(&Error::new(kind, format!("{step:?}")))),
        }
    }

    fn current(&self) -> Option<Process> {
        self.machines.get(&self.record().incarnation).copied()
    }

    /// The step's effect.
    ///
    /// # Panics
    /// When what it needs was not made before, or it destroys what is in use.
    fn apply(&mut self, step: Step) -> Result<(), (Kind, Retry)> {
        let incarnation = self.record().incarnation;
        let process = self.current();
        let lives = self.machines.values().any(|process| *process == Process::Lives);
        match step {
            Step::EnsureImage => self.image = true,
            Step::CreateDisk if self.disk.is_none() => {
                assert!(!self.record().disk_made, "an empty disk in the place of the owner's");
                self.make_disk();
            }
            Step::CreateDisk => {}
            Step::EnsureNet => self.net = true,
            Step::PrepareVmm => {
                assert!(self.image && self.disk.is_some() && self.net, "prepared without what it needs: {self:?}");
                assert!(incarnation > Incarnation(0) && process.is_none());
                self.machines.insert(incarnation, Process::NotStarted);
            }
            Step::StartVmm => {
                assert_eq!(process, Some(Process::NotStarted), "started what is not prepared");
                assert!(self.net, "started without what it needs: {self:?}");
                assert!(!lives, "two incarnations at once");
                assert_eq!(self.record().boot_id, self.boot_text());
                assert!(matches!(self.record().phase, Phase::Booting | Phase::Restoring), "started before it was said");
                // A disk that was lost after the preparation is the VMM's to find.
                let process = if self.disk.is_some() { Process::Lives } else { Process::Exited };
                self.machines.insert(incarnation, process);
                self.traces = true;
            }
            Step::AttachVmm => {
                assert_eq!(process, Some(Process::Lives), "attached to nothing");
                self.attached = Some(incarnation);
                self.guest = GuestFact::NotAsked;
            }
            Step::SayHello => {
                assert_eq!((process, self.attached), (Some(Process::Lives), Some(incarnation)));
                if !self.guest_answers {
                    return Err((Kind::Unavailable, Retry::Later));
                }
                self.guest = GuestFact::Ready;
            }
            Step::AskShutdown => {
                assert_eq!((process, self.attached), (Some(Process::Lives), Some(incarnation)));
                if !self.guest_answers {
                    return Err((Kind::Unavailable, Retry::Later));
                }
                self.guest = GuestFact::ShuttingDown;
                self.ends_at = self.guest_obeys.then(|| self.now.after(SHUTDOWN));
            }
            Step::KillVmm => self.end_processes(VmmEnd::Signal(9), LastWords::Nothing),
            Step::DestroyVmm => {
                assert_ne!(process, Some(Process::Lives), "destroyed while it lives");
                self.machines.remove(&incarnation);
                self.attached = None;
            }
            Step::RemoveNet => {
                assert!(!lives, "the network was removed under a living VMM");
                self.net = false;
            }
            Step::RemoveDisk => {
                assert!(!lives && self.record().desired == Desired::Deleted, "the owner's disk was removed");
                self.disk = None;
                self.owned = None;
            }
            Step::RemoveTraces => {
                assert_eq!(self.record().desired, Desired::Deleted);
                self.traces = false;
            }
        }
        assert!(self.owned.is_none() || self.owned == self.disk, "the owner's disk was replaced by another");
        Ok(())
    }
}
