//! What holds of every plan, on a pure model of a host (`support/world.rs`): it ends where the owner wants, whatever
//! comes between; no step needs what no earlier one made; nothing is done on what could not be seen.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;
#[path = "support/world.rs"]
mod world;

use clawpot_core::facts::Clients;
use clawpot_core::request::Request;
use clawpot_core::{
    Desired, Fact, Facts, GuestFact, LastWords, Next, Phase, Reason, Restart, RestartPolicy, Step, VmRecord, VmmEnd,
    VmmFact, plan,
};
use clawpot_types::{Generation, Incarnation, Kind, Millis, Retry, Timestamp};
use proptest::prelude::*;
use world::{Event, Look, Process, Rest, World};

fn accepted() -> World {
    World::new(support::record())
}

/// A VM whose guest answers.
fn running() -> World {
    let mut world = accepted();
    assert_eq!(world.settle().phase, Some(Phase::Running));
    world
}

/// Whether `rest` is where a VM may come to rest.
fn check(world: &World, rest: &Rest) {
    let nothing_runs = rest.machines.is_empty() && !rest.net;
    match rest.phase {
        None => assert!(nothing_runs && !rest.disk && !rest.traces, "forgotten and left behind: {rest:?}"),
        Some(Phase::Running) => {
            assert_eq!(rest.desired, Desired::Running);
            assert_eq!(rest.machines, [(world.record().incarnation, Process::Lives)]);
            assert!(rest.net);
        }
        Some(Phase::Failed) => {
            assert_eq!(rest.desired, Desired::Running);
            assert!(nothing_runs && world.record().failure.is_some(), "{rest:?}");
        }
        Some(Phase::Stopped) => assert!(nothing_runs && rest.desired == Desired::Stopped, "{rest:?}"),
        Some(other) => panic!("it rests in {other}: {rest:?}"),
    }
    if world.record.is_some() {
        assert_eq!(world.owned, world.disk.filter(|_| world.owned.is_some()), "the owner's disk is kept");
    }
}

fn kind() -> impl Strategy<Value = (Kind, Retry)> {
    prop_oneof![
        Just((Kind::Unavailable, Retry::Later)),
        Just((Kind::Timeout, Retry::Later)),
        Just((Kind::Exhausted, Retry::AfterFix)),
        Just((Kind::Internal, Retry::Never)),
        Just((Kind::Corrupt, Retry::Never)),
    ]
}

fn event() -> impl Strategy<Value = Event> {
    let look = prop_oneof![Just(Look::Image), Just(Look::Disk), Just(Look::Net), Just(Look::Vmm), Just(Look::Traces)];
    prop_oneof![
        2 => Just(Event::VmmDies),
        1 => Just(Event::GuestPowersOff),
        1 => Just(Event::GuestPanics),
        2 => Just(Event::HostReboots),
        3 => Just(Event::DaemonRestarts),
        2 => Just(Event::Asked(Request::Start)),
        2 => Just(Event::Asked(Request::Stop)),
        1 => Just(Event::Asked(Request::Delete)),
        2 => kind().prop_map(|(kind, retry)| Event::StepFails(kind, retry)),
        2 => kind().prop_map(|(kind, retry)| Event::AnswerLost(kind, retry)),
        3 => look.prop_map(Event::Blind),
        2 => (1u32..5).prop_map(Event::Doubted),
        1 => Just(Event::GuestGoesSilent),
        1 => Just(Event::GuestIgnoresShutdown),
        1 => Just(Event::DiskIsLost),
        1 => Just(Event::ClientsLeave),
    ]
}

/// Some turns, an event, some turns, an event, …
fn story() -> impl Strategy<Value = Vec<(usize, Event)>> {
    prop::collection::vec((0usize..12, event()), 0..14)
}

fn tell(world: &mut World, story: &[(usize, Event)]) {
    for (turns, event) in story {
        for _ in 0..*turns {
            if world.record.is_none() || world.turn().is_some() {
                break;
            }
        }
        world.happen(*event);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1024, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_plan_ends_whatever_comes(story in story(), remove_when_done: bool, policy in policy(), ttl in ttl()) {
        let mut world = accepted();
        let start = world.now;
        let record = world.record.as_mut().unwrap();
        record.remove_when_done = remove_when_done;
        record.restart = Restart::new(if remove_when_done { RestartPolicy::Never } else { policy });
        record.keep(ttl, start);
        tell(&mut world, &story);
        if world.record.is_some() {
            let rest = world.settle();
            check(&world, &rest);
        }
    }

    #[test]
    fn a_delete_ends_in_nothing_from_anywhere(mut world in anywhere(), story in story()) {
        world.happen(Event::Asked(Request::Delete));
        tell(&mut world, &story);
        if world.record.is_some() {
            let rest = world.settle();
            prop_assert_eq!(rest.phase, None);
            check(&world, &rest);
        }
    }

    #[test]
    fn one_that_is_to_be_removed_goes_when_everyone_left(story in story(), stopped: bool) {
        let mut world = accepted();
        world.record.as_mut().unwrap().remove_when_done = true;
        tell(&mut world, &story);
        if world.record.is_some() {
            if stopped {
                world.happen(Event::Asked(Request::Stop));
            }
            world.happen(Event::ClientsLeave);
            prop_assert_eq!(world.settle().phase, None);
        }
    }

    #[test]
    fn nothing_is_done_on_what_was_not_seen(record in record(), facts in facts(), late: bool) {
        let now = if late { Timestamp(support::START.0 + 1_000_000_000) } else { support::START };
        let decide = |facts: &Facts| plan(&record, facts, now, &Default::default());
        for blind in blinded(&facts) {
            let next = decide(&blind);
            if matches!(next, Next::Wait { until: Some(_) }) {
                continue;
            }
            // Only the image is not the VM's own.
            let own = [&blind.disk, &blind.net, &blind.traces].into_iter().any(|fact| matches!(fact, Fact::Unknown(_)));
            let unseen = own || matches!(blind.vmm, Fact::Unknown(_));
            prop_assert!(next != Next::Forget || !unseen, "{:?}", blind);
            // It would have been the same whatever there is to see.
            for seen in completed(&blind) {
                prop_assert_eq!(&decide(&seen), &next, "{:?} decided what {:?} leaves open", seen, blind);
            }
        }
    }

    #[test]
    fn what_is_not_proven_is_let_be(record in record(), facts in facts(), late: bool) {
        let now = if late { Timestamp(support::START.0 + 1_000_000_000) } else { support::START };
        let why = "a stranger".to_owned();
        let facts = Facts { vmm: Fact::Present(VmmFact::Unproven { why: why.clone() }), ..facts };
        prop_assert_eq!(plan(&record, &facts, now, &Default::default()), Next::Quarantine { why: why.clone() });
        let quarantined = record.quarantined(why, now);
        let next = plan(&quarantined, &facts, now, &Default::default());
        prop_assert!(matches!(next, Next::Wait { until: Some(until) } if until > now), "{:?}", next);
        let known = Facts { vmm: Fact::Absent, ..facts };
        prop_assert_eq!(plan(&quarantined, &known, now, &Default::default()), Next::Release);
        let released = VmRecord { phase_since: record.phase_since, ..quarantined.released(now) };
        prop_assert_eq!(released, record);
    }

    #[test]
    fn phases_change_along_the_edges(record in record(), facts in facts(), late: bool) {
        let now = if late { Timestamp(support::START.0 + 1_000_000_000) } else { support::START };
        match plan(&record, &facts, now, &Default::default()) {
            Next::Become { phase, .. } => prop_assert!(record.phase.may_become(phase), "{} ─► {phase}", record.phase),
            Next::End { why } => {
                let to = record.ended(&clawpot_core::exit::Cause::of(&why), now, &Default::default()).phase;
                prop_assert!(record.phase.may_become(to), "{} ─► {to}", record.phase);
            }
            Next::Wait { until: Some(until) } => prop_assert!(until > now, "waits for {:?} at {:?}", until, now),
            _ => {}
        }
    }
}

fn policy() -> impl Strategy<Value = RestartPolicy> {
    prop::sample::select(RestartPolicy::ALL.to_vec())
}

/// None, one that is over soon, one that is over long after everything else.
fn ttl() -> impl Strategy<Value = Option<Millis>> {
    prop::sample::select(vec![None, None, Some(Millis(20)), Some(Millis(2 * 3_600_000))])
}

/// A record in any phase but Quarantined.
fn record() -> impl Strategy<Value = VmRecord> {
    let phases: Vec<Phase> = Phase::ALL.into_iter().filter(|phase| *phase != Phase::Quarantined).collect();
    let parts = (
        prop::sample::select(phases),
        prop::sample::select(Desired::ALL.to_vec()),
        0u64..3,
        any::<[bool; 5]>(),
        prop::option::of(0u64..3),
        (policy(), prop::option::of(0u64..1000), prop::option::of(0u64..1000)),
    );
    parts.prop_map(|(phase, desired, incarnation, flags, failed, (policy, restart_at, expires_at))| {
        let [old_boot, deadline, remove_when_done, disk_made, writes] = flags;
        let second = |second: u64| Timestamp(support::START.0 + second * 1_000_000);
        let mut record = support::record();
        record.phase = phase;
        // Nothing else is possible once it is being deleted.
        record.desired = if phase == Phase::Deleting { Desired::Deleted } else { desired };
        record.generation = Generation(2);
        record.incarnation = Incarnation(incarnation);
        if incarnation > 0 {
            record.boot_id = if old_boot { "boot-0" } else { "boot-1" }.to_owned();
        }
        record.deadline = deadline.then_some(Timestamp(support::START.0 + 500_000_000));
        record.remove_when_done = remove_when_done;
        record.disk_made = disk_made;
        record.spec.extra_disks.extend(writes.then(support::written));
        record.restart = Restart { policy, attempts: 3, at: restart_at.map(second) };
        record.expires_at = expires_at.map(second);
        let failed = failed.filter(|_| phase == Phase::Failed);
        record.failure = failed.map(|generation| support::failure(Generation(generation)));
        record
    })
}

fn vmm_facts() -> Vec<VmmFact> {
    let exited = VmmFact::Exited { how: VmmEnd::Code(1) };
    vec![VmmFact::Prepared, VmmFact::Running { attached: false }, VmmFact::Running { attached: true }, exited]
}

fn facts() -> impl Strategy<Value = Facts> {
    let there = || prop::bool::ANY.prop_map(|there| if there { Fact::Present(()) } else { Fact::Absent });
    let vmm = prop::option::of(prop::sample::select(vmm_facts()));
    let guest =
        prop::sample::select(vec![GuestFact::NotAsked, GuestFact::Silent, GuestFact::Ready, GuestFact::ShuttingDown]);
    let clients = prop::sample::select(vec![Clients::Attached, Clients::NoneSince(support::START), Clients::Done]);
    let words = vec![LastWords::Nothing, LastWords::Down, LastWords::Panic("not syncing".to_owned())];
    (there(), there(), there(), vmm, guest, there(), clients, prop::sample::select(words)).prop_map(
        |(image, disk, net, vmm, guest, traces, clients, last_words)| Facts {
            image,
            disk,
            net,
            vmm: vmm.map_or(Fact::Absent, Fact::Present),
            guest,
            traces,
            clients,
            last_words,
            boot_id: "boot-1".to_owned(),
        },
    )
}

fn unknown<T>() -> Fact<T> {
    Fact::Unknown("the look failed".to_owned())
}

/// `facts` with one or all of them unseen.
fn blinded(facts: &Facts) -> Vec<Facts> {
    let one = |change: fn(&mut Facts)| {
        let mut facts = facts.clone();
        change(&mut facts);
        facts
    };
    vec![
        one(|facts| facts.image = unknown()),
        one(|facts| facts.disk = unknown()),
        one(|facts| facts.net = unknown()),
        one(|facts| facts.vmm = unknown()),
        one(|facts| facts.traces = unknown()),
        one(|facts| {
            (facts.image, facts.disk, facts.net, facts.traces) = (unknown(), unknown(), unknown(), unknown());
            facts.vmm = unknown();
        }),
    ]
}

/// Everything that may be behind what was not seen.
fn completed(blind: &Facts) -> Vec<Facts> {
    let options = |fact: &Fact<()>| match fact {
        Fact::Unknown(_) => vec![Fact::Present(()), Fact::Absent],
        seen => vec![seen.clone()],
    };
    let vmms: Vec<_> = match &blind.vmm {
        Fact::Unknown(_) => vmm_facts().into_iter().map(Fact::Present).chain([Fact::Absent]).collect(),
        seen => vec![seen.clone()],
    };
    let mut all = Vec::new();
    for image in options(&blind.image) {
        for disk in options(&blind.disk) {
            for net in options(&blind.net) {
                for traces in options(&blind.traces) {
                    all.extend(vmms.iter().map(|vmm| {
                        let (image, disk, net, traces) = (image.clone(), disk.clone(), net.clone(), traces.clone());
                        Facts { image, disk, net, traces, vmm: vmm.clone(), ..blind.clone() }
                    }));
                }
            }
        }
    }
    all
}

/// A world with a record in any phase and anything there of its current incarnation.
fn anywhere() -> impl Strategy<Value = World> {
    let process = prop::option::of(prop::sample::select(vec![Process::NotStarted, Process::Lives, Process::Exited]));
    (record(), any::<[bool; 5]>(), process).prop_map(|(record, [image, disk, net, traces, attached], process)| {
        let incarnation = record.incarnation;
        let mut world = World::new(record);
        world.image = image;
        world.net = net;
        world.traces = traces;
        if disk {
            world.make_disk();
        }
        // Before the first boot nothing can have a name.
        if let Some(process) = process.filter(|_| incarnation.0 > 0) {
            world.machines.insert(incarnation, process);
            world.attached = (attached && process == Process::Lives).then_some(incarnation);
        }
        world
    })
}

/// How a VM gets from each stage to the next.
fn scenarios() -> Vec<(&'static str, World, Option<Request>, Option<Phase>)> {
    let mut stopped = running();
    stopped.happen(Event::Asked(Request::Stop));
    assert_eq!(stopped.settle().phase, Some(Phase::Stopped));
    let mut writing = accepted();
    writing.record.as_mut().unwrap().spec.extra_disks.push(support::written());
    assert_eq!(writing.settle().phase, Some(Phase::Running));
    vec![
        ("create", accepted(), None, Some(Phase::Running)),
        ("stop", running(), Some(Request::Stop), Some(Phase::Stopped)),
        ("start", stopped.clone(), Some(Request::Start), Some(Phase::Running)),
        ("delete what runs", running(), Some(Request::Delete), None),
        ("delete what writes to a volume", writing, Some(Request::Delete), None),
        ("delete what is stopped", stopped, Some(Request::Delete), None),
    ]
}

/// Every run from here on, with `event` before its first, second, … turn.
fn at_every_turn(start: &World, event: Event) -> Vec<(World, Rest)> {
    let mut runs = Vec::new();
    for turn in 0.. {
        let mut world = start.clone();
        let mut over = None;
        for _ in 0..turn {
            over = over.or_else(|| world.turn());
        }
        if over.is_some() {
            return runs;
        }
        world.happen(event);
        let rest = world.settle();
        check(&world, &rest);
        runs.push((world, rest));
    }
    unreachable!("every run ends")
}

#[test]
fn a_restart_of_the_daemon_after_any_step_changes_nothing() {
    for (name, mut start, request, end) in scenarios() {
        request.into_iter().for_each(|request| start.happen(Event::Asked(request)));
        let expected = start.clone().settle();
        assert_eq!(expected.phase, end, "{name}");
        let runs = at_every_turn(&start, Event::DaemonRestarts);
        assert!(runs.len() > 3, "{name}: {} turns", runs.len());
        for (turn, (_, rest)) in runs.iter().enumerate() {
            assert_eq!(*rest, expected, "{name}, restarted before turn {turn}");
        }
    }
}

#[test]
fn a_failed_look_at_any_moment_changes_nothing() {
    for (name, mut start, request, _) in scenarios() {
        request.into_iter().for_each(|request| start.happen(Event::Asked(request)));
        let expected = start.clone().settle();
        for look in [Look::Image, Look::Disk, Look::Net, Look::Vmm, Look::Traces] {
            for (turn, (_, rest)) in at_every_turn(&start, Event::Blind(look)).iter().enumerate() {
                assert_eq!(*rest, expected, "{name}, blind for {look:?} at turn {turn}");
            }
        }
    }
}

/// After death or reboot at any moment: the truth is told, and the next start gets it going with its disk.
#[test]
fn what_died_can_be_started_again() {
    for event in [Event::VmmDies, Event::HostReboots] {
        for (name, start, ..) in scenarios().into_iter().take(1).chain([("running", running(), None, None)]) {
            for (turn, (mut world, rest)) in at_every_turn(&start, event).into_iter().enumerate() {
                let disk = world.owned;
                let expected = if event == Event::HostReboots { Phase::Stopped } else { Phase::Failed };
                if rest.phase != Some(Phase::Running) {
                    assert_eq!(rest.phase, Some(expected), "{name}, {event:?} at turn {turn}");
                    world.happen(Event::Asked(Request::Start));
                    assert_eq!(world.settle().phase, Some(Phase::Running), "{name}, {event:?} at turn {turn}");
                }
                assert!(disk.is_none() || world.disk == disk, "{name}: another disk");
            }
        }
    }
}

#[test]
fn a_change_of_mind_at_any_moment_is_followed() {
    for (name, mut start, request, _) in scenarios() {
        request.into_iter().for_each(|request| start.happen(Event::Asked(request)));
        for change in [Request::Start, Request::Stop, Request::Delete] {
            for (turn, (world, rest)) in at_every_turn(&start, Event::Asked(change)).into_iter().enumerate() {
                let expected = match rest.desired {
                    Desired::Running => Some(Phase::Running),
                    Desired::Stopped => Some(Phase::Stopped),
                    Desired::Deleted => None,
                };
                assert_eq!(rest.phase, expected, "{name}, then {change:?} at turn {turn}: {world:?}");
            }
        }
    }
}

/// A step that always fails: the VM fails and says so, and can be deleted; what takes down is repeated until it works.
#[test]
fn a_step_that_always_fails_leaves_nothing_behind() {
    let going_up = [
        Step::EnsureImage,
        Step::CreateDisk,
        Step::EnsureNet,
        Step::PrepareVmm,
        Step::StartVmm,
        Step::AttachVmm,
        Step::SayHello,
    ];
    for step in going_up {
        for (kind, retry) in [(Kind::Internal, Retry::Never), (Kind::Unavailable, Retry::Later)] {
            if (step, retry) == (Step::EnsureImage, Retry::Later) {
                // Repeated for as long as that may help.
                continue;
            }
            let mut world = accepted();
            world.broken = Some((step, kind, retry));
            let rest = world.settle();
            check(&world, &rest);
            assert_eq!(rest.phase, Some(Phase::Failed), "{step:?}: {kind:?}");
            world.happen(Event::Asked(Request::Delete));
            assert_eq!(world.settle().phase, None, "{step:?}");
        }
    }
    let going_down = [Step::KillVmm, Step::DestroyVmm, Step::RemoveNet, Step::RemoveDisk, Step::RemoveTraces];
    for step in going_down {
        let mut world = running();
        world.happen(Event::Asked(Request::Delete));
        world.broken = Some((step, Kind::Internal, Retry::Never));
        for _ in 0..200 {
            assert_eq!(world.turn(), None, "{step:?}: it gave up");
        }
        world.broken = None;
        let rest = world.settle();
        assert_eq!(rest.phase, None, "{step:?}");
        check(&world, &rest);
    }
}

#[test]
fn a_quarantined_vm_is_left_alone() {
    for desired in Desired::ALL {
        let mut world = running();
        world.happen(Event::Doubted(u32::MAX));
        world.turn();
        assert_eq!(world.record().phase, Phase::Quarantined);
        world.record.as_mut().unwrap().desired = desired;
        assert!(matches!(world.plan(), Next::Wait { until: Some(_) }), "{:?}", world.plan());
    }
}

/// Whatever it was doing, it goes on where it was once its machine is known again.
#[test]
fn a_doubt_at_any_moment_changes_nothing() {
    for (name, mut start, request, _) in scenarios() {
        request.into_iter().for_each(|request| start.happen(Event::Asked(request)));
        let expected = start.clone().settle();
        for (turn, (_, rest)) in at_every_turn(&start, Event::Doubted(3)).iter().enumerate() {
            assert_eq!(*rest, expected, "{name}, doubted at turn {turn}");
        }
    }
}

/// Its failure is kept, so that a failed VM does not take itself for one that was asked for again.
#[test]
fn a_failed_vm_is_failed_again_after_quarantine() {
    let mut world = running();
    world.happen(Event::VmmDies);
    world.turn();
    world.happen(Event::Doubted(2));
    let rest = world.settle();
    check(&world, &rest);
    assert_eq!(rest.phase, Some(Phase::Failed));
}

fn with_policy(policy: RestartPolicy) -> World {
    let mut world = accepted();
    world.record.as_mut().unwrap().restart = Restart::new(policy);
    world
}

/// What ends a machine at any moment, by policy: where it rests, and why it says so.
#[test]
fn what_ended_by_itself_rests_or_is_started_again() {
    use RestartPolicy::{Always, Never, OnFailure};
    for (event, reason, policies) in [
        (Event::GuestPowersOff, Reason::PoweredOff, vec![Always]),
        (Event::GuestPanics, Reason::GuestPanicked, vec![OnFailure, Always]),
        (Event::VmmDies, Reason::VmmDied, vec![OnFailure, Always]),
        (Event::HostReboots, Reason::HostRebooted, vec![OnFailure, Always]),
    ] {
        for policy in [Never, OnFailure, Always] {
            let mut world = with_policy(policy);
            assert_eq!(world.settle().phase, Some(Phase::Running));
            world.happen(event);
            let rest = world.settle();
            check(&world, &rest);
            let again = policies.contains(&policy);
            let expected = match reason {
                _ if again => Phase::Running,
                Reason::PoweredOff | Reason::HostRebooted => Phase::Stopped,
                _ => Phase::Failed,
            };
            assert_eq!(rest.phase, Some(expected), "{policy:?}, {event:?}");
            let exit = world.record().exit.clone().unwrap();
            assert_eq!((exit.reason, exit.incarnation), (reason, Incarnation(1)), "{policy:?}, {event:?}");
            // And the owner's word always wins.
            world.happen(Event::Asked(Request::Start));
            assert_eq!(world.settle().phase, Some(Phase::Running), "{policy:?}, {event:?}");
        }
    }
}

#[test]
fn a_vm_that_dies_at_any_moment_is_started_again_by_policy() {
    for (turn, (world, rest)) in
        at_every_turn(&with_policy(RestartPolicy::OnFailure), Event::VmmDies).iter().enumerate()
    {
        assert_eq!(rest.phase, Some(Phase::Running), "at turn {turn}: {world:?}");
    }
    for change in [Request::Stop, Request::Delete] {
        let mut dying = with_policy(RestartPolicy::Always);
        dying.settle();
        dying.happen(Event::VmmDies);
        // Also while the next start is waited for.
        for (turn, (_, rest)) in at_every_turn(&dying, Event::Asked(change)).iter().enumerate() {
            let expected = (change == Request::Stop).then_some(Phase::Stopped);
            assert_eq!(rest.phase, expected, "{change:?} at turn {turn}");
        }
    }
}

#[test]
fn pauses_grow_and_begin_anew_after_a_healthy_stretch() {
    let mut world = with_policy(RestartPolicy::OnFailure);
    let mut pauses = Vec::new();
    let mut die = |world: &mut World| {
        world.happen(Event::VmmDies);
        while world.record().restart.at.is_none() {
            world.turn();
        }
        let record = world.record();
        pauses.push(record.restart.at.unwrap().since(record.phase_since).as_secs());
    };
    for _ in 0..11 {
        world.settle();
        die(&mut world);
    }
    world.settle();
    world.now = world.now.after(world.limits.healthy);
    die(&mut world);
    assert_eq!(pauses, [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300, 1]);
}

/// Whatever it does when its time is over, it stops, or goes where it was to be removed; and a start gives it all of it again.
#[test]
fn a_time_to_live_ends_a_vm_at_any_moment() {
    for remove_when_done in [false, true] {
        for turns in 0..30 {
            let mut world = accepted();
            let record = world.record.as_mut().unwrap();
            record.remove_when_done = remove_when_done;
            record.keep(Some(Millis(3_600_000)), record.phase_since);
            for _ in 0..turns {
                world.turn();
            }
            world.now = world.now.after(std::time::Duration::from_secs(3600));
            let rest = world.settle();
            check(&world, &rest);
            assert_eq!(rest.phase, (!remove_when_done).then_some(Phase::Stopped), "after {turns} turns");
            if remove_when_done {
                continue;
            }
            if world.record().incarnation.0 > 0 {
                assert_eq!(world.record().exit.as_ref().unwrap().reason, Reason::TtlOver);
            }
            world.happen(Event::Asked(Request::Start));
            let until = world.record().expires_at.unwrap();
            assert_eq!(until.since(world.now).as_secs(), 3600);
        }
    }
}

#[test]
fn a_keep_alive_puts_the_end_off() {
    let mut world = accepted();
    let start = world.now;
    world.record.as_mut().unwrap().keep(Some(Millis(60_000)), start);
    while world.record().phase != Phase::Running {
        world.turn();
    }
    for _ in 0..10 {
        world.now = world.now.after(std::time::Duration::from_secs(50));
        world.happen(Event::Asked(Request::Keep));
        world.turn();
        assert_eq!(world.record().phase, Phase::Running);
    }
    let end = world.record().expires_at.unwrap();
    assert_eq!(world.settle().phase, Some(Phase::Stopped));
    assert!(world.record().exit.as_ref().unwrap().at >= end);
    world.happen(Event::Asked(Request::Start));
    world.record.as_mut().unwrap().keep(None, start);
    assert_eq!(world.settle().phase, Some(Phase::Running), "for ever");
}
