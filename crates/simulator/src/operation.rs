//! What clients ask for and what befalls a host, drawn from a seed.

use std::collections::BTreeMap;
use std::time::Duration;

use clawpot_control::service::create::CreateVm;
use clawpot_core::{DiskSource, ExtraDisk, RestartPolicy, VmmEnd};
use clawpot_testkit::{Boot, Shutdown, samples};
use clawpot_types::{MiB, Millis, VolumeName};

use crate::chance::Chance;
use crate::weather::Climate;

/// Names that clients choose from, so that they clash.
const NAMES: u64 = 12;
/// Likewise of volumes; the host's disk has room for all.
const VOLUME_NAMES: u64 = 6;
/// The place of operations on volumes among the weights.
const VOLUMES: usize = 23;
/// Likewise those of times to live.
const KEEP: usize = 8;
/// About a third of all.
const FOCUSED: u64 = 80;

/// Which VM is meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    Name(u64),
    /// The nth of those that are there; past the end it begins anew.
    Nth(u64),
    /// The nth of those that ever were.
    Once(u64),
    Nobody,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Program {
    True,
    Exit(u8),
    Echo,
    Sleep(u8),
    Cat,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Operation {
    /// `request`: repeats an earlier one where it was drawn before, with the same body.
    Create {
        request: u64,
        altered: bool,
    },
    /// How long it may live from now on, ms.
    Keep(Target, Option<u64>),
    Start(Target),
    Stop(Target, u64),
    Delete(Target),
    /// `leaves`: the client hangs up after so many ms.
    Exec(Target, Program, Option<u64>),
    Read(Target),
    Logs(Target),
    Events(Target),
    KillVmm(u64),
    PowerOff(u64),
    PanicGuest(u64),
    SilenceGuest(u64),
    KillDaemon,
    /// The daemon is told to go and comes back.
    LeaveDaemon,
    RebootHost,
    /// Milliseconds; the host's wall clock only.
    ClockJump(i64),
    DiskFull(Duration),
    Guests(Boot),
    Shutdowns(Shutdown),
    /// As delete, whatever cannot be proven.
    Force(Target),
    /// Somebody puts a process into a machine's group, or moves its own out of it.
    Intrude(u64, bool),
    IntrudersLeave,
    Volume(u64, VolumeVerb),
}

/// What is asked of a volume by its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VolumeVerb {
    Create,
    /// To so many MiB, which may be fewer than it has.
    Resize(u64),
    /// To another one's name.
    Copy(u64),
    Check,
    Repair,
    Delete,
    Read,
}

/// Which operations a run has, and how often.
#[derive(Clone, Debug)]
pub struct Mixture {
    weights: [u64; 24],
    /// Longest gap between two operations.
    gap: Duration,
    requests: u64,
}

impl Mixture {
    /// Some kinds are left out of each run. In a calm one nothing befalls host and guests; in one in which something about volumes or
    /// times to live goes wrong more often than other things, they are asked for as often.
    #[must_use]
    pub fn drawn(chance: &mut Chance, climate: &Climate) -> Self {
        let calm = climate.is_calm();
        let mut weights = [30, 12, 12, 14, 24, 6, 4, 6, 4, 5, 4, 2, 1, 3, 1, 1, 2, 1, 3, 2, 2, 6, 3, 24];
        for (index, weight) in weights.iter_mut().enumerate() {
            let befalls = (9..VOLUMES).contains(&index);
            if (befalls && calm) || (index > 0 && index != 3 && chance.one_in(5)) {
                *weight = 0;
            } else if chance.one_in(6) {
                *weight *= 4;
            }
        }
        for (index, of) in [(VOLUMES, climate.is_of_volumes()), (KEEP, climate.is_of_lives())] {
            if of {
                weights[index] = FOCUSED;
            }
        }
        let gap = *chance.pick(&[5, 60, 400, 5_000]).unwrap_or(&60);
        Self { weights, gap: Duration::from_millis(gap), requests: 0 }
    }

    /// The next operation, and how long after the last one it comes.
    pub fn next(&mut self, chance: &mut Chance) -> (Duration, Operation) {
        let most = u64::try_from(self.gap.as_micros()).unwrap_or(1);
        let most = if chance.one_in(20) { most * 20 } else { most };
        let gap = Duration::from_micros(if chance.one_in(4) { 0 } else { chance.below(most) });
        (gap, self.operation(chance))
    }

    fn operation(&mut self, chance: &mut Chance) -> Operation {
        match chance.weighted(&self.weights) {
            0 => self.create(chance),
            1 => Operation::Start(target(chance)),
            2 => Operation::Stop(target(chance), *chance.pick(&[0, 0, 1, 200, 3_000]).unwrap_or(&0)),
            3 => Operation::Delete(target(chance)),
            4 => {
                let leaves = chance.one_in(4).then(|| chance.below(2_000));
                Operation::Exec(target(chance), program(chance), leaves)
            }
            5 => Operation::Read(target(chance)),
            6 => Operation::Logs(target(chance)),
            7 => Operation::Events(target(chance)),
            8 => Operation::Keep(target(chance), life(chance)),
            9 => Operation::KillVmm(chance.draw()),
            10 => Operation::PowerOff(chance.draw()),
            11 => Operation::PanicGuest(chance.draw()),
            12 => Operation::SilenceGuest(chance.draw()),
            13 => Operation::KillDaemon,
            14 => Operation::LeaveDaemon,
            15 => Operation::RebootHost,
            16 => jump(chance),
            17 => Operation::DiskFull(Duration::from_millis(chance.between(1, 20_000))),
            18 => Operation::Guests(boot(chance)),
            19 => Operation::Shutdowns(shutdown(chance)),
            20 => Operation::Force(target(chance)),
            21 => Operation::Intrude(chance.draw(), chance.one_in(2)),
            22 => Operation::IntrudersLeave,
            _ => volume(chance),
        }
    }

    fn create(&mut self, chance: &mut Chance) -> Operation {
        let again = self.requests > 0 && chance.one_in(5);
        let request = if again { chance.below(self.requests) } else { self.requests };
        self.requests = self.requests.max(request + 1);
        Operation::Create { request, altered: again && chance.one_in(8) }
    }
}

/// What is asked for follows from the request, so that a repetition is the same.
#[must_use]
pub fn body(request: u64, altered: bool) -> CreateVm {
    let mut chance = Chance::new(request, 9);
    let mut spec = samples::spec();
    if altered {
        spec.memory = MiB(512);
    }
    let name = (!chance.one_in(6)).then(|| chance.below(NAMES)).and_then(|name| format!("vm-{name}").parse().ok());
    let remove_when_done = chance.one_in(5);
    let restart = match chance.below(4) {
        0 if !remove_when_done => RestartPolicy::OnFailure,
        1 if !remove_when_done => RestartPolicy::Always,
        _ => RestartPolicy::Never,
    };
    // Of one in three, so that those without do not become rare: a volume that is not there makes no VM.
    if chance.one_in(3) {
        let first = chance.below(VOLUME_NAMES);
        spec.extra_disks.extend(wanted(first, chance.one_in(2)));
        if chance.one_in(3) {
            spec.extra_disks.extend(wanted((first + 1) % VOLUME_NAMES, chance.one_in(2)));
        }
    }
    let ttl = if chance.one_in(6) { life(&mut chance).map(Millis) } else { None };
    CreateVm { name, labels: BTreeMap::new(), spec, ttl, restart, remove_when_done }
}

fn life(chance: &mut Chance) -> Option<u64> {
    let most = *chance.pick(&[0, 1_000, 60_000, 100_000_000]).unwrap_or(&0);
    (most > 0).then(|| chance.between(1, most))
}

/// The name of a volume.
#[must_use]
pub fn volume_name(number: u64) -> Option<VolumeName> {
    format!("volume-{number}").parse().ok()
}

fn wanted(number: u64, read_only: bool) -> Option<ExtraDisk> {
    let name = volume_name(number)?;
    let mount = format!("/srv/{name}").parse().ok();
    Some(ExtraDisk { source: DiskSource::Volume(name), read_only, mount })
}

fn volume(chance: &mut Chance) -> Operation {
    let number = chance.below(VOLUME_NAMES);
    let verb = match chance.weighted(&[8, 3, 8, 2, 1, 3, 2]) {
        0 => VolumeVerb::Create,
        1 => VolumeVerb::Resize(chance.between(512, 4096)),
        // Names that only copies have, so that most are made.
        2 => VolumeVerb::Copy(chance.below(3 * VOLUME_NAMES)),
        3 => VolumeVerb::Check,
        4 => VolumeVerb::Repair,
        5 => return Operation::Volume(chance.below(3 * VOLUME_NAMES), VolumeVerb::Delete),
        _ => VolumeVerb::Read,
    };
    Operation::Volume(number, verb)
}

fn target(chance: &mut Chance) -> Target {
    match chance.below(20) {
        0 => Target::Nobody,
        1 => Target::Once(chance.draw()),
        2..=14 => Target::Nth(chance.draw()),
        _ => Target::Name(chance.below(NAMES)),
    }
}

fn program(chance: &mut Chance) -> Program {
    match chance.below(5) {
        0 => Program::True,
        1 => Program::Exit(u8::try_from(chance.below(200)).unwrap_or(0)),
        2 => Program::Echo,
        3 => Program::Sleep(u8::try_from(chance.below(4)).unwrap_or(0)),
        _ => Program::Cat,
    }
}

fn jump(chance: &mut Chance) -> Operation {
    let most = *chance.pick(&[1_000, 60_000, 3_600_000, 200_000_000]).unwrap_or(&1_000);
    let by = chance.below(most).cast_signed();
    // Back by a minute at most.
    Operation::ClockJump(if chance.one_in(3) { -(by % 60_000) } else { by })
}

fn boot(chance: &mut Chance) -> Boot {
    match chance.below(6) {
        0 => Boot::Silent,
        1 => Boot::Exits(Duration::from_millis(chance.below(3_000)), VmmEnd::Code(1)),
        2 => Boot::ReadyAfter(Duration::ZERO),
        3 => Boot::ReadyAfter(Duration::from_millis(chance.below(130_000))),
        _ => Boot::ReadyAfter(Duration::from_millis(chance.below(3_000))),
    }
}

fn shutdown(chance: &mut Chance) -> Shutdown {
    if chance.one_in(2) { Shutdown::Ignored } else { Shutdown::After(Duration::from_millis(chance.below(12_000))) }
}
