//! What cannot be read is shown, kept, and touched only on its owner's word.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::time::Duration;

use clawpot_control::Row;
use clawpot_core::{Phase, VmRecord};
use clawpot_types::{Kind, VmId};
use support::{House, refused, wanted};

/// More than the settings' `stray_grace`.
const GRACE: Duration = Duration::from_secs(35);

#[tokio::test(start_paused = true)]
async fn an_unreadable_record_is_quarantined_and_keeps_what_it_has() {
    let mut house = House::with_slots(2).await;
    let id = house.running("web").await;
    let living = house.host.living();
    let left = house.host.left_behind();
    house.store.damage(&format!("vms/{id}"));
    house.restart().await;
    tokio::time::sleep(Duration::from_secs(60)).await;

    assert_eq!(house.phase(&id), Some(Phase::Quarantined));
    assert_eq!((house.host.living(), house.host.left_behind()), (living, left), "nothing was touched");
    let Some(Row::Unreadable { why, .. }) = house.service().records().get(&id) else { panic!("it is readable") };
    assert!(why.contains(id.as_str()), "{why}");
    let page = house.service().list(&Default::default(), 0, "").unwrap();
    assert_eq!(page.rows.len(), 1, "it is listed");

    // Its slot and its name are not given to anyone.
    let other = house.running("other").await;
    assert_eq!(refused(house.try_create("third", &wanted("third")).await).kind(), Kind::Exhausted);
    house.delete(&other).await;
    assert_eq!(refused(house.try_create("web-2", &wanted("web")).await).kind(), Kind::AlreadyExists);
    for error in [
        refused(house.service().start(id.as_str(), "uid=0").await),
        refused(house.service().delete(id.as_str(), false, "uid=0").await),
        refused(house.exec(&id, &["true"]).await),
    ] {
        assert_eq!(error.kind(), Kind::FailedPrecondition);
        assert!(error.next_step().unwrap().contains("--force"), "{:?}", error.next_step());
    }
    house.check_contracts();
}

#[tokio::test(start_paused = true)]
async fn force_removes_it_whole() {
    let mut house = House::with_slots(1).await;
    let id = house.running("web").await;
    house.store.damage(&format!("vms/{id}"));
    house.restart().await;
    house.service().delete(id.as_str(), true, "uid=0").await.unwrap();
    assert_eq!(house.phase(&id), None);
    house.check_empty();
    // Slot and name are free again.
    let id = house.try_create("again", &wanted("web")).await.unwrap();
    house.until(&id, Some(Phase::Running)).await;
}

#[tokio::test(start_paused = true)]
async fn a_record_that_is_json_and_no_record_is_quarantined_too() {
    let mut house = House::new().await;
    let id = house.running("web").await;
    house.store.scribble(&format!("vms/{id}"), br#"{"version":1,"id":"what"}"#);
    house.restart().await;
    assert_eq!(house.phase(&id), Some(Phase::Quarantined));
    assert_eq!(house.host.living().len(), 1);
    house.service().delete(id.as_str(), true, "uid=0").await.unwrap();
    house.check_empty();
}

#[tokio::test(start_paused = true)]
async fn a_newer_servers_record_stops_the_older_server() {
    let mut house = House::new().await;
    let id = house.running("web").await;
    house.store.scribble(&format!("vms/{id}"), br#"{"version":999}"#);
    let error = house.try_restart().await.unwrap_err();
    assert_eq!(error.kind(), Kind::Unsupported);
    assert!(error.chain().contains("999") && error.chain().contains(id.as_str()), "{}", error.chain());
    assert_eq!(house.host.living().len(), 1);
}

/// A slot on the host that no record has: left of a pool, or of a crash. Nobody gets it, and after the grace time it goes.
#[tokio::test(start_paused = true)]
async fn stray_slots_are_swept_and_others_are_not() {
    let mut house = House::new().await;
    let id = house.running("web").await;
    let slot = house.record(&id).slot;
    let net = clawpot_testkit::FakeNet::new(&house.host);
    let stray = clawpot_types::Slot(slot.0 + 1);
    clawpot_core::ports::Net::ensure(&net, stray).await.unwrap();
    house.restart().await;
    let next = house.create("next").await;
    assert_ne!(house.record(&next).slot, stray);
    house.delete(&next).await;
    tokio::time::sleep(GRACE).await;
    let nets: Vec<String> = house.host.left_behind().into_iter().filter(|line| line.contains("netns")).collect();
    assert_eq!(nets, [format!("netns, tap and rules of slot {slot}")]);
    house.delete(&id).await;
    house.check_empty();
}

/// A machine without a record: the store is older than it. It is ended after the grace time, its disk is kept: what is on it
/// may be all that is left of the VM.
#[tokio::test(start_paused = true)]
async fn stray_machines_end_after_the_grace_time() {
    let mut house = House::new().await;
    let id = house.running("lost").await;
    let known = house.running("known").await;
    house.forget(&id).await;
    house.restart().await;
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!(house.host.living().len(), 2, "nothing is ended within the grace time");
    assert!(house.service().may_have_strays(), "whoever goes now leaves it what it needs");
    tokio::time::sleep(GRACE).await;
    assert!(!house.service().may_have_strays());
    let living: Vec<VmId> = house.host.living().into_iter().map(|machine| machine.vm).collect();
    assert_eq!(living, std::slice::from_ref(&known));
    house.delete(&known).await;
    let left = house.host.left_behind();
    assert!(left.iter().all(|line| line.contains("disk") || line.contains("console")), "{left:?}");
    assert!(left.iter().any(|line| line.contains("disk")), "{left:?}");
}

/// As a backup does that was made in `phase`, when the VM was started again since: its next machine runs, and no record knows it.
async fn set_back(house: &House, id: &VmId, phase: Phase) {
    let backup = VmRecord { phase, ..(*house.record(id)).clone() };
    house.stop(id).await;
    house.start(id).await;
    house.store.scribble(&format!("vms/{id}"), &backup.encode().unwrap());
}

/// The store is older than the machine: the VM was started again since the backup.
#[tokio::test(start_paused = true)]
async fn a_machine_of_a_later_incarnation_is_a_stray_too() {
    let mut house = House::new().await;
    let id = house.running("web").await;
    set_back(&house, &id, Phase::Running).await;
    house.restart().await;
    house.until(&id, Some(Phase::Failed)).await;
    assert_eq!(house.host.living().len(), 1, "nothing is ended within the grace time");
    tokio::time::sleep(GRACE).await;
    assert_eq!(house.host.living(), []);
    house.start(&id).await;
    house.delete(&id).await;
    house.check_empty();
}

/// Likewise, of a VM that was just being started then: nothing would keep its machine from that disk and that slot.
#[tokio::test(start_paused = true)]
async fn a_vm_gets_no_machine_beside_a_stray_one_of_its_own() {
    let mut house = House::new().await;
    let id = house.running("web").await;
    set_back(&house, &id, Phase::Preparing).await;
    house.restart().await;
    tokio::time::sleep(Duration::from_secs(10)).await;
    let living = |house: &House| house.host.living().iter().map(|machine| machine.incarnation.0).collect::<Vec<_>>();
    assert_eq!((house.phase(&id), living(&house)), (Some(Phase::Preparing), vec![2]), "the stray one still runs");
    tokio::time::sleep(GRACE).await;
    house.until(&id, Some(Phase::Running)).await;
    assert_eq!(living(&house), [1]);
    house.delete(&id).await;
    house.check_empty();
}

/// Its record keeps the slot, whose uid that machine runs under, until it is gone: also over a restart.
#[tokio::test(start_paused = true)]
async fn a_vm_is_not_forgotten_beside_a_stray_machine_of_its_own() {
    let mut house = House::with_slots(1).await;
    let id = house.running("web").await;
    set_back(&house, &id, Phase::Running).await;
    house.restart().await;
    for _ in 0..2 {
        house.service().delete(id.as_str(), false, "uid=0").await.unwrap();
        tokio::time::sleep(GRACE / 2).await;
        assert_eq!((house.phase(&id), house.host.living().len()), (Some(Phase::Deleting), 1));
        let error = refused(house.try_create("next", &wanted("next")).await);
        assert_eq!(error.kind(), Kind::Exhausted, "{}", error.chain());
        house.restart().await;
    }
    tokio::time::sleep(GRACE).await;
    assert_eq!((house.phase(&id), house.host.living().len()), (None, 0));
    let next = house.running("next").await;
    house.delete(&next).await;
    house.check_empty();
}

/// One of which nobody can tell what it is, and that is never ended unasked, keeps it until somebody says `--force`.
#[tokio::test(start_paused = true)]
async fn force_ends_stray_machines_of_the_vm_too() {
    let mut house = House::with_slots(1).await;
    let id = house.running("web").await;
    set_back(&house, &id, Phase::Running).await;
    house.host.intrude(&id, true);
    house.restart().await;
    house.service().delete(id.as_str(), false, "uid=0").await.unwrap();
    tokio::time::sleep(GRACE * 10).await;
    assert_eq!((house.phase(&id), house.host.living().len()), (Some(Phase::Deleting), 1), "it is let be");
    house.host.give_up(&id);
    house.service().delete(id.as_str(), true, "uid=0").await.unwrap();
    tokio::time::sleep(GRACE).await;
    assert_eq!((house.phase(&id), house.host.living().len()), (None, 0));
}

/// A stray machine that cannot be ended keeps its slot, and what is in it, until it can.
#[tokio::test(start_paused = true)]
async fn the_slot_of_a_stray_machine_that_stays_is_given_to_nobody() {
    let mut house = House::with_slots(2).await;
    let id = house.running("lost").await;
    let slot = house.record(&id).slot;
    house.forget(&id).await;
    house.host.intrude(&id, true);
    house.restart().await;
    tokio::time::sleep(GRACE * 10).await;
    let next = house.running("next").await;
    assert_ne!(house.record(&next).slot, slot);
    let error = refused(house.try_create("third", &wanted("third")).await);
    assert_eq!(error.kind(), Kind::Exhausted, "{}", error.chain());
    assert_eq!(house.host.living().len(), 2, "it is let be");
    house.host.intruders_leave();
    tokio::time::sleep(GRACE).await;
    assert_eq!(house.host.living().len(), 1);
    let third = house.running("third").await;
    assert_eq!(house.record(&third).slot, slot);
    house.check_contracts();
}

/// A process in the machine's group that nobody can tell from its own: shown with the reason, and nothing is done to it.
#[tokio::test(start_paused = true)]
async fn a_stranger_in_its_group_quarantines_a_vm_until_it_leaves() {
    let mut house = House::new().await;
    let id = house.running("web").await;
    let left = house.host.left_behind();
    // Its VMM is there, elsewhere: seen by the server that watches, and by the next one.
    house.host.intrude(&id, true);
    house.until(&id, Some(Phase::Quarantined)).await;
    house.restart().await;
    house.until(&id, Some(Phase::Quarantined)).await;
    assert!(house.record(&id).quarantine.as_ref().unwrap().message.contains("another group"));
    for error in [
        refused(house.service().start(id.as_str(), "uid=0").await),
        refused(house.service().stop(id.as_str(), clawpot_types::Millis(0), "uid=0").await),
        refused(house.service().delete(id.as_str(), false, "uid=0").await),
        refused(house.exec(&id, &["true"]).await),
    ] {
        assert_eq!(error.kind(), Kind::FailedPrecondition);
        assert!(error.chain().contains("another group"), "{}", error.chain());
        assert!(error.next_step().unwrap().contains("--force"), "{:?}", error.next_step());
    }
    tokio::time::sleep(Duration::from_secs(3600)).await;
    assert_eq!(house.host.left_behind(), left, "nothing was touched");
    // The same machine runs on.
    house.host.intruders_leave();
    house.until(&id, Some(Phase::Running)).await;
    assert_eq!(house.record(&id).incarnation.0, 1);
    house.exec(&id, &["true"]).await.unwrap();
    let events = house.service().events(id.as_str(), clawpot_types::Revision(0), 0).await.unwrap();
    let told: Vec<_> = events.iter().filter(|event| event.message.contains("quarantined")).collect();
    assert_eq!(told.len(), 2, "{events:?}");
    assert!(told[0].message.contains("another group"), "{}", told[0].message);
    // Its VMM ends, and a stranger is where it was; then that one goes too.
    house.host.intrude(&id, false);
    house.host.kill_vmm(&id);
    house.restart().await;
    house.until(&id, Some(Phase::Quarantined)).await;
    house.host.intruders_leave();
    house.until(&id, Some(Phase::Failed)).await;
    house.delete(&id).await;
    house.check_empty();
}

#[tokio::test(start_paused = true)]
async fn force_ends_strangers_too() {
    let mut house = House::new().await;
    for (name, moving) in [("died", false), ("moved", true)] {
        let id = house.running(name).await;
        house.host.intrude(&id, moving);
        if !moving {
            house.host.kill_vmm(&id);
        }
        house.restart().await;
        house.until(&id, Some(Phase::Quarantined)).await;
        // The daemon dies between the owner's word and the deed.
        if moving {
            house.faults.at(clawpot_testkit::Method::VmmStop, 1, clawpot_testkit::Injection::Error(Kind::Internal));
            refused(house.service().delete(id.as_str(), true, "uid=0").await);
            house.restart().await;
            assert_eq!(house.phase(&id), Some(Phase::Quarantined));
        }
        house.host.give_up(&id);
        house.service().delete(id.as_str(), true, "uid=0").await.unwrap();
        house.until(&id, None).await;
        house.check_empty();
    }
}

/// Rows that no server ever wrote, in each of the places: told, kept, and in nobody's way.
#[tokio::test(start_paused = true)]
async fn rows_of_nobody_keep_no_server_from_starting() {
    let mut house = House::with_slots(2).await;
    let id = house.running("web").await;
    let strange = ["vms/garbage", "slots/garbage", "names/gar bage", "requests/garbage"];
    for key in strange {
        house.store.scribble(key, b"{}");
    }
    house.store.damage("vms/garbage");
    // A claim on a slot that nobody can read, and no VM says that it is its.
    let lost = clawpot_types::Slot(1 - house.record(&id).slot.0);
    house.store.scribble(&clawpot_control::records::slot_key(lost), b"7");
    house.restart().await;
    assert_eq!(house.phase(&id), Some(Phase::Running));
    assert_eq!(house.service().records().count(), 1);
    for key in strange.into_iter().filter(|key| !key.starts_with("requests/")) {
        assert!(house.store.keys().contains(&key.to_owned()), "{key}");
    }
    let error = refused(house.try_create("next", &wanted("next")).await);
    assert_eq!(error.kind(), Kind::Exhausted, "the lost slot is given to nobody: {}", error.chain());
}

/// As a newer server's record does: an older one would make a second VM of the same request, or forget it.
#[tokio::test(start_paused = true)]
async fn a_newer_servers_request_stops_the_older_server() {
    let mut house = House::new().await;
    house.store.scribble("requests/r-1", br#"{"version":999}"#);
    let error = house.try_restart().await.unwrap_err();
    assert_eq!(error.kind(), Kind::Unsupported);
    assert!(error.chain().contains("999") && error.chain().contains("requests/r-1"), "{}", error.chain());
    assert!(house.store.keys().contains(&"requests/r-1".to_owned()));
}
