//! Everything fails in turn, and the daemon dies after every effect in turn (DESIGN §11.1). Then the VM is deleted, and
//! nothing is left.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::time::Duration;

use clawpot_core::exec::ExecEnd;
use clawpot_core::{Desired, Phase};
use clawpot_testkit::{Injection, Method};
use clawpot_types::{Incarnation, Kind, Millis, VmId};
use support::{House, refused, wanted};

/// A whole life: created, stopped, started, deleted. Each intent is told again after a crash, as a client would.
async fn live(house: &mut House) -> VmId {
    let id = again(house, async |house: &House| house.try_create("r-1", &wanted("web")).await).await;
    reach(house, &id, Phase::Running).await;
    let disk = house.host.disk_serial(&id);
    again(house, async |house: &House| house.service().stop(id.as_str(), Millis(0), "uid=0").await).await;
    reach(house, &id, Phase::Stopped).await;
    again(house, async |house: &House| house.service().start(id.as_str(), "uid=0").await).await;
    reach(house, &id, Phase::Running).await;
    assert_eq!(house.host.disk_serial(&id), disk, "another disk");
    id
}

/// Repeats `ask` while the daemon dies in it.
async fn again<T>(house: &mut House, ask: impl AsyncFn(&House) -> clawpot_types::Result<T>) -> T {
    loop {
        let answer = tokio::select! {
            biased;
            () = house.faults.crashed() => None,
            answer = ask(house) => Some(answer.unwrap_or_else(|error| panic!("{}", error.chain()))),
        };
        match answer {
            Some(answer) => return answer,
            None => house.restart().await,
        }
    }
}

/// Until the VM is in `phase`, however often the daemon dies on the way.
async fn reach(house: &mut House, id: &VmId, phase: Phase) {
    loop {
        let there = tokio::select! {
            biased;
            () = house.faults.crashed() => false,
            () = house.until(id, Some(phase)) => true,
        };
        if there {
            return;
        }
        house.restart().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_crash_after_every_effect_loses_and_leaks_nothing() {
    let mut crashes = 0;
    for nth in 1.. {
        let mut house = House::new().await;
        house.faults.crash_at_effect(nth);
        let id = live(&mut house).await;
        // The crash comes in the life, or in its end.
        if house.faults.crash_is_planned() {
            let going = async {
                house.service().delete(id.as_str(), false, "uid=0").await.unwrap();
                house.until(&id, None).await;
            };
            let crashed = tokio::select! {
                biased;
                () = house.faults.crashed() => true,
                () = going => false,
            };
            if crashed {
                house.restart().await;
            }
        }
        let over = house.faults.crash_is_planned();
        if house.phase(&id).is_some() {
            // Told again, if it was not heard.
            if house.record(&id).desired != Desired::Deleted {
                house.service().delete(id.as_str(), false, "uid=0").await.unwrap();
            }
            house.until(&id, None).await;
        }
        house.check_empty();
        if over {
            break;
        }
        crashes += 1;
    }
    assert!(crashes >= 30, "only {crashes} effects");
}

/// Two crashes: the second while the daemon takes up what the first left.
#[tokio::test(start_paused = true)]
async fn a_second_crash_during_recovery_loses_and_leaks_nothing() {
    for first in (1..28).step_by(3) {
        for second in 1..6 {
            let mut house = House::new().await;
            house.faults.crash_at_effect(first);
            let coming_up = async {
                let id = house.try_create("r-1", &wanted("web")).await.unwrap();
                house.until(&id, Some(Phase::Running)).await;
            };
            tokio::select! {
                biased;
                () = house.faults.crashed() => {}
                () = coming_up => {}
            }
            house.restart().await;
            house.faults.crash_at_effect(second);
            let id = again(&mut house, async |house: &House| house.try_create("r-1", &wanted("web")).await).await;
            reach(&mut house, &id, Phase::Running).await;
            house.faults.kill_daemon();
            house.restart().await;
            house.until(&id, Some(Phase::Running)).await;
            assert_eq!(house.host.living().len(), 1);
            house.delete(&id).await;
            house.check_empty();
        }
    }
}

/// Each step fails, before or after its effect, at its first or second call.
#[tokio::test(start_paused = true)]
async fn a_failure_of_every_step_loses_and_leaks_nothing() {
    for method in Method::STEPS {
        for kind in [Kind::Internal, Kind::Unavailable, Kind::Exhausted] {
            for injection in [Injection::Error(kind), Injection::ErrorAfter(kind)] {
                for nth in [1, 2] {
                    fail_once(method, nth, injection).await;
                }
            }
        }
    }
}

async fn fail_once(method: Method, nth: u32, injection: Injection) {
    let house = House::new().await;
    house.faults.at(method, nth, injection);
    let id = house.create("web").await;
    let phase = house.until_one_of(&id, &[Some(Phase::Running), Some(Phase::Failed)]).await;
    if phase == Some(Phase::Failed) {
        let failure = house.record(&id).failure.clone().unwrap();
        assert!(failure.message.contains("VM web: ") && failure.message.contains("injected"), "{}", failure.message);
        // What it had is taken down, but for its disk and logs.
        tokio::time::sleep(Duration::from_secs(5)).await;
        assert!(house.host.living().is_empty(), "{method:?} {injection:?}");
        // The failure was one; the owner tries again.
        house.start(&id).await;
    }
    assert_eq!(house.exec(&id, &["true"]).await.unwrap().0, ExecEnd::Code(0));
    house.stop(&id).await;
    house.delete(&id).await;
    house.check_empty();
}

/// Nothing can be looked at for a while: nothing is destroyed on suspicion, nothing is forgotten.
#[tokio::test(start_paused = true)]
async fn blindness_destroys_nothing() {
    for look in Method::LOOKS {
        let mut house = House::new().await;
        let id = house.running("web").await;
        house.faults.always(look, Injection::Error(Kind::Unavailable));
        tokio::time::sleep(Duration::from_secs(30)).await;
        house.restart().await;
        tokio::time::sleep(Duration::from_secs(30)).await;
        assert_eq!(house.phase(&id), Some(Phase::Running), "{look:?}");
        assert_eq!(house.host.living().len(), 1, "{look:?}");
        house.service().delete(id.as_str(), false, "uid=0").await.unwrap();
        tokio::time::sleep(Duration::from_secs(30)).await;
        if look != Method::ImagesLook {
            assert_eq!(house.phase(&id), Some(Phase::Deleting), "{look:?}: not forgotten while blind");
        }
        house.faults.heal(look);
        house.until(&id, None).await;
        house.check_empty();
    }
}

/// The store cannot be written: what runs goes on running, nothing is torn down, and it goes on afterwards.
#[tokio::test(start_paused = true)]
async fn without_a_store_nothing_happens() {
    for kind in [Kind::Unavailable, Kind::Exhausted] {
        let house = House::new().await;
        let id = house.running("web").await;
        house.faults.always(Method::StoreTxn, Injection::Error(kind));
        let error = refused(house.service().delete(id.as_str(), false, "uid=0").await);
        assert_eq!(error.kind(), kind);
        assert_eq!(refused(house.try_create("b", &wanted("b")).await).kind(), kind);
        tokio::time::sleep(Duration::from_secs(30)).await;
        assert_eq!(house.host.living().len(), 1);
        // A VMM that dies now is told as soon as it can be written.
        house.host.kill_vmm(&id);
        tokio::time::sleep(Duration::from_secs(30)).await;
        assert_eq!(house.phase(&id), Some(Phase::Running));
        house.faults.heal(Method::StoreTxn);
        house.until(&id, Some(Phase::Failed)).await;
        house.delete(&id).await;
        house.check_empty();
    }
}

#[tokio::test(start_paused = true)]
async fn on_a_full_disk_vms_can_be_deleted() {
    let house = House::new().await;
    let id = house.running("web").await;
    house.store.set_full(true);
    let error = refused(house.try_create("b", &wanted("b")).await);
    assert_eq!(error.kind(), Kind::Exhausted);
    house.delete(&id).await;
    house.store.set_full(false);
    assert_eq!(house.host.left_behind(), Vec::<String>::new());
}

#[tokio::test(start_paused = true)]
async fn kill_9_loses_no_vm() {
    let mut house = House::new().await;
    let ids = [house.running("a").await, house.running("b").await];
    house.stop(&ids[1]).await;
    let living = house.host.living();
    let starts = house.faults.count(Method::VmmStart);
    for _ in 0..3 {
        house.restart().await;
        assert_eq!(house.exec(&ids[0], &["echo", "still", "here"]).await.unwrap().1, "still here\n");
        tokio::time::sleep(Duration::from_secs(10)).await;
        assert_eq!(house.phase(&ids[1]), Some(Phase::Stopped));
    }
    assert_eq!(house.host.living(), living, "the same machines");
    assert_eq!(house.faults.count(Method::VmmStart), starts);
    assert_eq!(house.record(&ids[0]).incarnation, Incarnation(1));
    house.check_contracts();
}

/// What happened while no daemon was there is told by the next one.
#[tokio::test(start_paused = true)]
async fn what_died_meanwhile_is_told() {
    let mut house = House::new().await;
    let id = house.running("web").await;
    house.faults.kill_daemon();
    house.host.kill_vmm(&id);
    house.restart().await;
    house.until(&id, Some(Phase::Failed)).await;
    assert!(house.record(&id).failure.as_ref().unwrap().message.contains("signal 9"));
    house.start(&id).await;

    house.faults.kill_daemon();
    house.host.reboot();
    house.restart().await;
    house.until_one_of(&id, &[Some(Phase::Failed), Some(Phase::Stopped)]).await;
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!(house.host.left_behind(), [format!("disk of {id}"), format!("console log of {id}")]);
    house.start(&id).await;
    house.delete(&id).await;
    house.check_empty();
}

/// A guest that fell silent while no daemon was there is asked, and may be stopped and deleted meanwhile.
#[tokio::test(start_paused = true)]
async fn a_silent_guest_after_a_restart_is_no_obstacle() {
    let mut house = House::new().await;
    let id = house.running("web").await;
    house.host.silence_guest(&id);
    house.restart().await;
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(house.phase(&id), Some(Phase::Running), "its process lives");
    let asked = house.faults.count(Method::GuestHello);
    tokio::time::sleep(Duration::from_secs(10)).await;
    let more = house.faults.count(Method::GuestHello) - asked;
    assert!((1..=15).contains(&more), "it is still asked, and not all the time: {more} times in 10 s");
    let stopping = tokio::time::Instant::now();
    house.service().stop(id.as_str(), Millis(2_000), "uid=0").await.unwrap();
    house.until(&id, Some(Phase::Stopped)).await;
    assert!(stopping.elapsed() < Duration::from_secs(4), "{:?}", stopping.elapsed());
    house.delete(&id).await;
    house.check_empty();
}

/// The store did what it was asked and its answer was lost: each of a life's writes in turn. Found by the simulator: the daemon
/// went on with what it had known before, and none of its later writes was taken.
#[tokio::test(start_paused = true)]
async fn a_lost_answer_of_the_store_is_found_out() {
    for nth in 1..=9 {
        let house = House::new().await;
        house.faults.at(Method::StoreTxn, nth, Injection::ErrorAfter(Kind::Unavailable));
        let id = house.create("web").await;
        house.until(&id, Some(Phase::Running)).await;
        assert_eq!(house.exec(&id, &["true"]).await.unwrap().0, ExecEnd::Code(0));
        house.stop(&id).await;
        house.delete(&id).await;
        house.check_empty();
    }
}

/// As above, and the store cannot be asked either: whoever creates is told that it failed, and the VM that there is after all
/// comes up, is found by the same request, and can be deleted.
#[tokio::test(start_paused = true)]
async fn a_create_that_nobody_heard_of_is_found_out() {
    for asked_again in [false, true] {
        let house = House::new().await;
        house.faults.at(Method::StoreTxn, 1, Injection::ErrorAfter(Kind::Unavailable));
        // The second: the first one reads what was asked before.
        house.faults.at(Method::StoreList, 1, Injection::Error(Kind::Unavailable));
        let error = refused(house.try_create("r-1", &wanted("web")).await);
        assert_eq!(error.kind(), Kind::Unavailable);
        let id = match asked_again {
            true => house.try_create("r-1", &wanted("web")).await.unwrap(),
            false => {
                tokio::time::sleep(Duration::from_secs(5)).await;
                house.service().get("web").unwrap().0
            }
        };
        house.until(&id, Some(Phase::Running)).await;
        tokio::time::sleep(Duration::from_secs(5)).await;
        assert_eq!(house.faults.count(Method::VmmStart), 1, "one runner");
        house.delete(&id).await;
        house.check_empty();
    }
}

/// The store is slow to tell one writer that it was done; another one is not kept asking in the meantime. Found by the simulator,
/// which never came back.
#[tokio::test(start_paused = true)]
async fn a_slow_answer_of_the_store_makes_nobody_spin() {
    let house = House::new().await;
    let id = house.create("web").await;
    house.faults.at(Method::StoreTxn, 1, Injection::DelayAfter(Duration::from_secs(5)));
    tokio::time::sleep(Duration::from_millis(1)).await;
    let before = house.faults.count(Method::StoreTxn);
    house.service().stop(id.as_str(), Millis(0), "uid=0").await.unwrap();
    assert!(house.faults.count(Method::StoreTxn) - before < 5);
    house.until(&id, Some(Phase::Stopped)).await;
    house.delete(&id).await;
    house.check_empty();
}

/// An intent whose answer was lost, while the store could not be asked either, is followed once it can. Found by the simulator.
#[tokio::test(start_paused = true)]
async fn an_intent_that_nobody_heard_of_is_followed() {
    let house = House::new().await;
    let id = house.running("web").await;
    house.stop(&id).await;
    house.faults.at(Method::StoreTxn, 1, Injection::ErrorAfter(Kind::Unavailable));
    house.faults.at(Method::StoreList, 1, Injection::Error(Kind::Unavailable));
    refused(house.service().start(id.as_str(), "uid=0").await);
    house.until(&id, Some(Phase::Running)).await;
    house.delete(&id).await;
    house.check_empty();
}

/// Not only the first time; also where the doubt comes while the store is slow to answer an earlier one, with what was true before.
#[tokio::test(start_paused = true)]
async fn what_nobody_heard_of_is_found_out_each_time() {
    let house = House::new().await;
    let id = house.running("web").await;
    let unheard = |done: Injection| {
        house.faults.at(Method::StoreTxn, 1, done);
        house.faults.at(Method::StoreList, 1, Injection::Error(Kind::Unavailable));
    };
    let (done, not_done) = (Injection::ErrorAfter(Kind::Unavailable), Injection::Error(Kind::Unavailable));
    for _ in 0..3 {
        unheard(done);
        refused(house.service().stop(id.as_str(), Millis(0), "uid=0").await);
        house.until(&id, Some(Phase::Stopped)).await;
        unheard(done);
        refused(house.service().start(id.as_str(), "uid=0").await);
        house.until(&id, Some(Phase::Running)).await;
    }
    unheard(not_done);
    house.faults.at(Method::StoreList, 2, Injection::DelayAfter(Duration::from_secs(10)));
    refused(house.service().stop(id.as_str(), Millis(0), "uid=0").await);
    tokio::time::sleep(Duration::from_secs(2)).await;
    unheard(done);
    refused(house.service().stop(id.as_str(), Millis(0), "uid=0").await);
    house.until(&id, Some(Phase::Stopped)).await;
    // Of one that is gone nothing is asked for ever, and nothing comes back.
    unheard(done);
    refused(house.service().delete(id.as_str(), false, "uid=0").await);
    house.until(&id, None).await;
    tokio::time::sleep(Duration::from_secs(60)).await;
    let asked = house.faults.count(Method::StoreList);
    tokio::time::sleep(Duration::from_secs(600)).await;
    assert_eq!(house.faults.count(Method::StoreList), asked);
    house.check_empty();
}
