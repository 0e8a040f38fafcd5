//! What create accepts and refuses, and what it remembers.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::collections::BTreeSet;
use std::time::Duration;

use clawpot_control::service::create::CreateVm;
use clawpot_core::admission::{Footprint, Room};
use clawpot_core::{Phase, RestartPolicy};
use clawpot_testkit::{Injection, Method};
use clawpot_types::{ImageRef, Kind, MiB, Retry};
use support::{House, refused, wanted};

#[tokio::test(start_paused = true)]
async fn one_request_is_one_vm() {
    let mut house = House::new().await;
    let id = house.try_create("r-1", &wanted("web")).await.unwrap();
    assert_eq!(house.try_create("r-1", &wanted("web")).await.unwrap(), id);
    house.until(&id, Some(Phase::Running)).await;
    house.restart().await;
    assert_eq!(house.try_create("r-1", &wanted("web")).await.unwrap(), id, "also after a restart");
    assert_eq!(house.service().records().count(), 1);

    let mut other = wanted("web");
    other.spec.memory = MiB(512);
    let error = refused(house.try_create("r-1", &other).await);
    assert_eq!(error.kind(), Kind::AlreadyExists);
    assert!(error.chain().contains("another body") && error.next_step().is_some(), "{}", error.chain());
    assert_eq!(house.service().records().count(), 1);
}

/// A lost answer is asked for again while the first is on its way, and after the VM is gone.
#[tokio::test(start_paused = true)]
async fn one_request_is_one_vm_at_any_moment() {
    let house = House::new().await;
    let (first, body) = (wanted("web"), wanted("web"));
    let (a, b) = tokio::join!(house.try_create("r-1", &first), house.try_create("r-1", &body));
    let ids: BTreeSet<_> = [&a, &b].into_iter().filter_map(|made| made.as_ref().ok()).collect();
    assert_eq!(ids.len(), 1, "{a:?} {b:?}");
    for error in [&a, &b].into_iter().filter_map(|made| made.as_ref().err()) {
        assert_eq!(error.retry(), Retry::Later, "{}", error.chain());
    }
    let id = house.try_create("r-1", &body).await.unwrap();
    assert_eq!(house.service().records().count(), 1);

    house.delete(&id).await;
    let error = refused(house.try_create("r-1", &body).await);
    assert!(error.chain().contains(id.as_str()), "it is said which VM it was: {}", error.chain());
    assert_eq!(house.service().records().count(), 0, "no second VM");
    house.check_empty();
}

/// What was promised to a VM of which nobody knows yet whether it is there is promised to nobody else. Found by the simulator.
#[tokio::test(start_paused = true)]
async fn a_vm_that_nobody_heard_of_keeps_what_it_was_promised() {
    let house = House::new().await;
    let memory = MiB(wanted("web").spec.memory.0 * 3 / 2);
    let room = Room { cpus: 8, memory, memory_available: memory, disk: MiB(1 << 20), disk_free: MiB(1 << 20) };
    house.host.set_room(room);
    for (started, name) in [(false, "first"), (true, "second")] {
        let id = if started { Some(house.running(name).await) } else { None };
        if let Some(id) = &id {
            house.stop(id).await;
        }
        house.faults.at(Method::StoreTxn, 1, Injection::ErrorAfter(Kind::Unavailable));
        house.faults.at(Method::StoreList, 1, Injection::Error(Kind::Unavailable));
        let error = match &id {
            Some(id) => refused(house.service().start(id.as_str(), "uid=0").await),
            None => refused(house.try_create(name, &wanted(name)).await),
        };
        assert_eq!(error.kind(), Kind::Unavailable);
        let error = refused(house.try_create("other", &wanted("other")).await);
        assert_eq!(error.kind(), Kind::Exhausted, "{}", error.chain());
        tokio::time::sleep(Duration::from_secs(5)).await;
        let id = house.service().get(name).unwrap().0;
        house.until(&id, Some(Phase::Running)).await;
        assert_eq!(refused(house.try_create("other", &wanted("other")).await).kind(), Kind::Exhausted);
        house.delete(&id).await;
    }
    house.running("other").await;
}

#[tokio::test(start_paused = true)]
async fn requests_are_forgotten_after_a_day() {
    let mut house = House::new().await;
    let id = house.try_create("r-1", &wanted("web")).await.unwrap();
    house.delete(&id).await;
    tokio::time::sleep(Duration::from_secs(23 * 3600)).await;
    house.restart().await;
    assert!(house.store.keys().contains(&"requests/r-1".to_owned()));
    tokio::time::sleep(Duration::from_secs(2 * 3600)).await;
    house.restart().await;
    assert!(house.store.keys().is_empty());
}

#[tokio::test(start_paused = true)]
async fn names_are_unique_and_free_again_after_deletion() {
    let house = House::new().await;
    let id = house.create("web").await;
    let error = refused(house.try_create("other", &wanted("web")).await);
    assert_eq!(error.kind(), Kind::AlreadyExists);
    assert!(error.chain().contains("\"web\"") && error.chain().contains(id.as_str()), "{}", error.chain());
    house.delete(&id).await;
    assert_ne!(house.try_create("again", &wanted("web")).await.unwrap(), id);
    // Nobody chose a name: there is one.
    let mut nameless = wanted("x");
    nameless.name = None;
    let id = house.try_create("", &nameless).await.unwrap();
    assert!(!house.record(&id).name.as_str().is_empty());
}

#[tokio::test(start_paused = true)]
async fn slots_run_out_and_come_back() {
    let house = House::with_slots(3).await;
    let ids = [house.running("a").await, house.running("b").await, house.running("c").await];
    let slots: BTreeSet<_> = ids.iter().map(|id| house.record(id).slot).collect();
    assert_eq!(slots.len(), 3);
    let error = refused(house.try_create("d", &wanted("d")).await);
    assert_eq!(error.kind(), Kind::Exhausted);
    assert!(error.chain().contains('3') && error.next_step().unwrap().contains("clawpot rm"), "{}", error.chain());
    // A stopped VM keeps its slot.
    house.stop(&ids[1]).await;
    assert_eq!(refused(house.try_create("d", &wanted("d")).await).kind(), Kind::Exhausted);
    let freed = house.record(&ids[1]).slot;
    house.delete(&ids[1]).await;
    let id = house.running("d").await;
    assert_eq!(house.record(&id).slot, freed);
    house.check_contracts();
}

#[tokio::test(start_paused = true)]
async fn many_at_once_share_nothing() {
    let house = House::with_slots(64).await;
    let bodies: Vec<_> = (0..40).map(|n| (format!("vm-{n}"), wanted(&format!("vm-{n}")))).collect();
    let made = bodies.iter().map(|(name, body)| house.try_create(name, body));
    let ids: Vec<_> = futures_util::future::join_all(made).await.into_iter().map(Result::unwrap).collect();
    let mut slots = BTreeSet::new();
    for id in &ids {
        house.until(id, Some(Phase::Running)).await;
        let record = house.record(id);
        assert!(slots.insert((record.slot, record.address)), "{slots:?}");
    }
    for id in &ids {
        house.delete(id).await;
    }
    house.check_empty();
}

#[tokio::test(start_paused = true)]
async fn what_cannot_be_is_refused_and_nothing_is_kept() {
    let house = House::new().await;
    let mut bodies = Vec::new();
    for memory in [0, 1, 1 << 32, u64::MAX] {
        let mut body = wanted("web");
        body.spec.memory = MiB(memory);
        bodies.push((body, Kind::InvalidArgument, "memory"));
    }
    for disk in [0, u64::MAX] {
        let mut body = wanted("web");
        body.spec.disk = MiB(disk);
        bodies.push((body, Kind::InvalidArgument, "disk"));
    }
    let mut unknown = wanted("web");
    unknown.spec.image = ImageRef::Name("plan9".to_owned());
    bodies.push((unknown, Kind::NotFound, "plan9"));
    for (body, kind, word) in bodies {
        let error = refused(house.try_create("r", &body).await);
        assert_eq!(error.kind(), kind, "{}", error.chain());
        assert!(error.chain().contains(word), "{}", error.chain());
    }
    for bad in ["a b", "../x", &"r".repeat(129)] {
        assert_eq!(refused(house.try_create(bad, &wanted("web")).await).kind(), Kind::InvalidArgument, "{bad}");
    }
    assert!(house.store.keys().is_empty());
    house.check_empty();
}

#[tokio::test(start_paused = true)]
async fn vms_are_found_by_name_id_and_prefix() {
    let house = House::new().await;
    let id = house.create("web").await;
    for word in ["web", id.as_str(), &id.as_str()[..4]] {
        assert_eq!(house.service().get(word).unwrap().0, id);
    }
    for word in ["", "nobody", "0123456789abcdefg"] {
        let error = refused(house.service().get(word));
        assert!(error.next_step().is_some(), "{}", error.chain());
    }
}

fn small_room() -> Room {
    Room { cpus: 1, memory: MiB(1024), memory_available: MiB(1024), disk: MiB(10_240), disk_free: MiB(10_240) }
}

/// 921 MiB for VMs of 128 MiB: seven.
#[tokio::test(start_paused = true)]
async fn two_at_the_same_moment_cannot_both_have_the_last() {
    for _ in 0..20 {
        let house = House::with_slots(64).await;
        house.host.set_room(small_room());
        let bodies: Vec<_> = (0..30).map(|n| wanted(&format!("vm-{n}"))).collect();
        let all = bodies.iter().map(|body| house.try_create("", body));
        let outcomes = futures_util::future::join_all(all).await;
        let made: Vec<_> = outcomes.iter().filter_map(|outcome| outcome.as_ref().ok()).cloned().collect();
        assert_eq!(made.len(), 7);
        for error in outcomes.iter().filter_map(|outcome| outcome.as_ref().err()) {
            assert_eq!(error.kind(), Kind::Exhausted, "{}", error.chain());
            assert!(error.to_string().starts_with("create: memory: 128 MiB asked, 25 MiB free of 921"), "{error}");
        }
        // What one gives back another gets.
        house.delete(&made[0]).await;
        house.create("next").await;
        let error = refused(house.try_create("", &wanted("more")).await);
        assert_eq!(error.kind(), Kind::Exhausted);
    }
}

/// 921 MiB: seven guests of 128 MiB, or five with VMMs that take 30 MiB each.
#[tokio::test(start_paused = true)]
async fn what_vmms_take_counts() {
    let house = House::with_slots(64).await;
    house.host.set_room(small_room());
    house.host.set_footprint(Footprint { memory: MiB(20), memory_per_vcpu: MiB(10) });
    let mut ids = Vec::new();
    for n in 0..5 {
        ids.push(house.running(&format!("vm-{n}")).await);
    }
    let budgets = house.service().budgets().await.unwrap();
    assert_eq!((budgets.memory.used, budgets.vmm_memory), (5 * 158, 5 * 30));
    let error = refused(house.try_create("", &wanted("more")).await);
    assert_eq!(
        error.to_string(),
        "create: memory: 158 MiB asked (128 for the guest, 30 for its VMM), 131 MiB free of 921 MiB for VMs"
    );
    // One at rest has neither.
    house.stop(&ids[0]).await;
    let budgets = house.service().budgets().await.unwrap();
    assert_eq!((budgets.memory.used, budgets.vmm_memory), (4 * 158, 4 * 30));
    house.running("more").await;
}

#[tokio::test(start_paused = true)]
async fn a_start_is_admitted_as_a_create_is() {
    let house = House::with_slots(64).await;
    house.host.set_room(small_room());
    let mut ids = Vec::new();
    for n in 0..7 {
        ids.push(house.running(&format!("vm-{n}")).await);
    }
    // One rests: its memory is for others, its disk and slot are its own.
    house.stop(&ids[0]).await;
    let eighth = house.running("vm-7").await;
    let error = refused(house.service().start("vm-0", "uid=0").await);
    assert_eq!(error.kind(), Kind::Exhausted);
    assert!(error.to_string().starts_with("VM vm-0: start: memory: 128 MiB asked"), "{error}");
    let budgets = house.service().budgets().await.unwrap();
    assert_eq!((budgets.memory.used, budgets.disk.used, budgets.slots.used), (7 * 128, 8 * 1024, 8));
    house.stop(&eighth).await;
    // Both want to come back, and there is room for one.
    let service = house.service();
    let (one, other) = tokio::join!(service.start("vm-0", "uid=0"), service.start("vm-7", "uid=0"));
    assert!(one.is_ok() != other.is_ok(), "{one:?} {other:?}");
    // What runs is not asked to fit again.
    house.service().start("vm-1", "uid=0").await.unwrap();
}

/// A VM that is started again by policy keeps its place meanwhile; one that failed for good does not.
#[tokio::test(start_paused = true)]
async fn who_waits_for_a_restart_keeps_its_place() {
    let house = House::with_slots(64).await;
    let room = small_room();
    house.host.set_room(Room { memory: MiB(256), ..room });
    let body = CreateVm { restart: RestartPolicy::OnFailure, ..wanted("again") };
    let id = house.try_create("", &body).await.unwrap();
    house.until(&id, Some(Phase::Running)).await;
    house.host.kill_vmm(&id);
    house.until(&id, Some(Phase::Failed)).await;
    assert_eq!(refused(house.try_create("", &wanted("b")).await).kind(), Kind::Exhausted);
    house.until(&id, Some(Phase::Running)).await;
    house.delete(&id).await;
    let id = house.running("once").await;
    house.host.kill_vmm(&id);
    house.until(&id, Some(Phase::Failed)).await;
    house.running("b").await;
}

#[tokio::test(start_paused = true)]
async fn under_the_watermark_nothing_is_created_or_started() {
    let house = House::new().await;
    let room = small_room();
    house.host.set_room(room);
    let runs = house.running("runs").await;
    let rests = house.running("rests").await;
    house.stop(&rests).await;
    house.host.set_room(Room { disk_free: MiB(1000), ..room });
    for error in [
        refused(house.try_create("", &wanted("new")).await),
        refused(house.service().start("rests", "uid=0").await.map(drop)),
    ] {
        assert_eq!(error.kind(), Kind::Exhausted);
        assert!(error.to_string().contains("disk: 1000 MiB are free"), "{error}");
        assert!(error.next_step().unwrap().contains("low_disk_percent"));
    }
    // What runs runs on, and everything can be deleted.
    assert_eq!(house.phase(&runs), Some(Phase::Running));
    house.delete(&runs).await;
    house.delete(&rests).await;
    house.check_empty();
    house.host.set_room(Room { disk_free: MiB(1024), ..room });
    house.running("new").await;
}

/// Who cannot be told what there is takes nobody in.
#[tokio::test(start_paused = true)]
async fn without_a_look_at_the_host_nobody_is_admitted() {
    let house = House::new().await;
    house.faults.always(Method::RoomLook, Injection::Error(Kind::Unavailable));
    assert_eq!(refused(house.try_create("", &wanted("a")).await).kind(), Kind::Unavailable);
    house.faults.heal(Method::RoomLook);
    house.running("a").await;
}
