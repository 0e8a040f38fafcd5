//! What ends a VM, why it says so, and whether it is started again.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::time::Duration;

use clawpot_control::service::create::CreateVm;
use clawpot_core::{Desired, Phase, Reason, RestartPolicy, VmmEnd};
use clawpot_testkit::{Boot, Injection, Method};
use clawpot_types::{Incarnation, Kind, Millis, Revision, VmId};
use support::{House, refused, wanted};

async fn with_policy(house: &House, policy: RestartPolicy) -> VmId {
    let body = CreateVm { restart: policy, ..wanted("web") };
    let id = house.try_create("web", &body).await.unwrap();
    house.until(&id, Some(Phase::Running)).await;
    id
}

fn exit(house: &House, id: &VmId) -> (Reason, String) {
    let exit = house.record(id).exit.clone().unwrap();
    (exit.reason, exit.by)
}

/// Kinds of the VM's events and who they are told of, without the phases.
async fn told(house: &House, id: &VmId) -> Vec<String> {
    let events = house.service().events(id.as_str(), Revision(0), 1000).await.unwrap();
    let shown = events.into_iter().filter(|event| event.kind != "vm.phase");
    shown.map(|event| format!("{} by {}: {}", event.kind, event.actor, event.message)).collect()
}

#[tokio::test(start_paused = true)]
async fn a_guests_own_power_off_is_no_failure() {
    for (policy, again) in
        [(RestartPolicy::Never, false), (RestartPolicy::OnFailure, false), (RestartPolicy::Always, true)]
    {
        let house = House::new().await;
        let id = with_policy(&house, policy).await;
        assert!(house.host.power_off(&id));
        let record = if again {
            tokio::time::sleep(Duration::from_secs(5)).await;
            let record = house.record(&id);
            assert_eq!((record.phase, record.incarnation), (Phase::Running, Incarnation(2)), "{policy:?}");
            record
        } else {
            house.until(&id, Some(Phase::Stopped)).await;
            let record = house.record(&id);
            assert_eq!((record.desired, &record.failure), (Desired::Stopped, &None), "{policy:?}");
            tokio::time::sleep(Duration::from_secs(600)).await;
            assert_eq!(house.phase(&id), Some(Phase::Stopped), "{policy:?}");
            record
        };
        assert_eq!(record.exit.as_ref().unwrap().incarnation, Incarnation(1));
        assert_eq!(exit(&house, &id), (Reason::PoweredOff, "guest".to_owned()));
        let exits: Vec<String> =
            told(&house, &id).await.into_iter().filter(|line| line.starts_with("vm.exit")).collect();
        assert_eq!(exits, ["vm.exit by guest: powered-off: the guest powered itself off or restarted"]);
        if !again {
            house.start(&id).await;
        }
        house.delete(&id).await;
        house.check_empty();
    }
}

#[tokio::test(start_paused = true)]
async fn each_end_is_told_with_its_reason() {
    let house = House::new().await;
    let id = with_policy(&house, RestartPolicy::Never).await;
    house.host.panic_guest(&id);
    house.until(&id, Some(Phase::Failed)).await;
    assert_eq!(exit(&house, &id), (Reason::GuestPanicked, "guest".to_owned()));
    let failure = house.record(&id).failure.clone().unwrap();
    assert!(failure.message.contains("Kernel panic - not syncing: it was told to"), "{}", failure.message);

    house.start(&id).await;
    house.host.kill_vmm(&id);
    house.until(&id, Some(Phase::Failed)).await;
    assert_eq!(exit(&house, &id), (Reason::VmmDied, "host".to_owned()));
    assert!(house.record(&id).exit.as_ref().unwrap().message.contains("killed by signal 9"));

    house.start(&id).await;
    house.stop(&id).await;
    assert_eq!(exit(&house, &id), (Reason::Stopped, "uid=0".to_owned()));

    house.host.set_boot(Boot::Silent);
    house.service().start(id.as_str(), "uid=0").await.unwrap();
    house.until(&id, Some(Phase::Failed)).await;
    assert_eq!(exit(&house, &id), (Reason::BootTimeout, "server".to_owned()));

    // A guest that goes down before it ever answered has not come up.
    house.host.set_boot(Boot::Exits(Duration::from_millis(10), VmmEnd::Code(0)));
    house.service().start(id.as_str(), "uid=0").await.unwrap();
    house.until_one_of(&id, &[Some(Phase::Booting)]).await;
    house.until(&id, Some(Phase::Failed)).await;
    assert_eq!(exit(&house, &id), (Reason::VmmDied, "host".to_owned()));

    house.host.set_boot(Boot::ReadyAfter(Duration::from_millis(10)));
    house.start(&id).await;
    house.delete(&id).await;
    let ends: Vec<String> = told(&house, &id).await.into_iter().filter(|line| line.starts_with("vm.exit")).collect();
    assert_eq!(ends.len(), 6, "{ends:#?}");
    assert_eq!(ends[5], "vm.exit by uid=0: deleted: deleted by uid=0");
    house.check_empty();
}

/// The daemon was away when the guest went down: nobody saw its VMM end, its console did.
#[tokio::test(start_paused = true)]
async fn a_power_off_that_no_daemon_saw_is_known_from_the_console() {
    let mut house = House::new().await;
    let id = with_policy(&house, RestartPolicy::Never).await;
    house.faults.kill_daemon();
    house.host.power_off(&id);
    house.host.forget_ends();
    house.restart().await;
    house.until(&id, Some(Phase::Stopped)).await;
    assert_eq!(exit(&house, &id).0, Reason::PoweredOff);
}

#[tokio::test(start_paused = true)]
async fn what_dies_is_started_again_with_growing_pauses() {
    let house = House::new().await;
    let id = with_policy(&house, RestartPolicy::OnFailure).await;
    let disk = house.host.disk_serial(&id);
    for (round, pause) in [1u64, 2, 4, 8].into_iter().enumerate() {
        house.host.kill_vmm(&id);
        house.until(&id, Some(Phase::Failed)).await;
        let record = house.record(&id);
        assert_eq!(record.restart.at.unwrap().since(record.phase_since).as_secs(), pause, "round {round}");
        let died = tokio::time::Instant::now();
        // Whoever wants to run something waits with it.
        assert_eq!(house.exec(&id, &["echo", "again"]).await.unwrap().1, "again\n");
        let took = died.elapsed().as_secs();
        assert!((pause..=pause + 1).contains(&took), "round {round}: {took} s");
    }
    let record = house.record(&id);
    assert_eq!((record.incarnation, record.restart.attempts), (Incarnation(5), 4));
    assert_eq!(house.host.disk_serial(&id), disk);
    // Well for a while: as if nothing had been.
    tokio::time::sleep(house.service().deps().settings.limits.healthy).await;
    house.host.kill_vmm(&id);
    house.until(&id, Some(Phase::Failed)).await;
    assert_eq!(house.record(&id).restart.attempts, 1);
    house.until(&id, Some(Phase::Running)).await;
    house.delete(&id).await;
    house.check_empty();
}

/// Deadlines are in the record: a daemon that dies meanwhile changes nothing.
#[tokio::test(start_paused = true)]
async fn a_restart_that_is_waited_for_survives_the_daemon() {
    let mut house = House::new().await;
    let id = with_policy(&house, RestartPolicy::OnFailure).await;
    for _ in 0..3 {
        house.host.kill_vmm(&id);
        house.until(&id, Some(Phase::Failed)).await;
        let due = house.record(&id).restart.at;
        house.restart().await;
        assert_eq!(house.record(&id).restart.at, due);
        house.until(&id, Some(Phase::Running)).await;
    }
    assert_eq!(house.record(&id).incarnation, Incarnation(4));
    house.check_contracts();
}

#[tokio::test(start_paused = true)]
async fn the_owners_word_wins_over_the_policy() {
    let house = House::new().await;
    let id = with_policy(&house, RestartPolicy::Always).await;
    let fail = async || {
        house.host.kill_vmm(&id);
        house.until(&id, Some(Phase::Failed)).await;
    };
    for _ in 0..6 {
        fail().await;
        house.until(&id, Some(Phase::Running)).await;
    }
    // Now it would take a minute.
    fail().await;
    let asked = tokio::time::Instant::now();
    house.start(&id).await;
    assert!(asked.elapsed() < Duration::from_secs(2), "started at once: {:?}", asked.elapsed());
    assert_eq!(house.record(&id).restart.attempts, 0);
    fail().await;
    house.stop(&id).await;
    tokio::time::sleep(Duration::from_secs(3600)).await;
    assert_eq!(house.phase(&id), Some(Phase::Stopped));
    assert_eq!(house.record(&id).exit.as_ref().unwrap().reason, Reason::VmmDied, "what ended it is not forgotten");
    house.start(&id).await;
    fail().await;
    house.delete(&id).await;
    house.check_empty();
}

#[tokio::test(start_paused = true)]
async fn after_a_reboot_of_the_host_a_vm_rests_or_is_started_by_policy() {
    for (policy, expected) in [
        (RestartPolicy::Never, Phase::Stopped),
        (RestartPolicy::OnFailure, Phase::Running),
        (RestartPolicy::Always, Phase::Running),
    ] {
        let mut house = House::new().await;
        let id = with_policy(&house, policy).await;
        let disk = house.host.disk_serial(&id);
        house.faults.kill_daemon();
        house.host.reboot();
        house.restart().await;
        tokio::time::sleep(Duration::from_secs(30)).await;
        let record = house.record(&id);
        assert_eq!((record.phase, &record.failure), (expected, &None), "{policy:?}");
        assert_eq!(exit(&house, &id), (Reason::HostRebooted, "host".to_owned()));
        assert_eq!(record.restart.attempts, 0, "it is not the VM's fault");
        if expected == Phase::Stopped {
            assert_eq!(house.host.left_behind(), [format!("disk of {id}"), format!("console log of {id}")]);
            house.start(&id).await;
        }
        assert_eq!(house.host.disk_serial(&id), disk);
        house.delete(&id).await;
        house.check_empty();
    }
}

#[tokio::test(start_paused = true)]
async fn a_time_to_live_stops_a_vm_or_removes_it() {
    for remove_when_done in [false, true] {
        let house = House::new().await;
        let body = CreateVm { ttl: Some(Millis(60_000)), remove_when_done, ..wanted("web") };
        let id = house.try_create("web", &body).await.unwrap();
        house.until(&id, Some(Phase::Running)).await;
        // Someone works in it: that is no keep-alive.
        let (first, rest) = support::program(&["sleep", "1000"]);
        let _attached = house.service().exec(id.as_str(), first, rest, "uid=0").await.unwrap();
        tokio::time::sleep(Duration::from_secs(59)).await;
        assert_eq!(house.phase(&id), Some(Phase::Running));
        tokio::time::sleep(Duration::from_secs(3)).await;
        let told = told(&house, &id).await;
        assert!(told.contains(&"vm.exit by server: ttl-over: its time to live was over".to_owned()), "{told:#?}");
        if remove_when_done {
            house.until(&id, None).await;
            house.check_empty();
            continue;
        }
        assert_eq!(house.phase(&id), Some(Phase::Stopped));
        assert_eq!(exit(&house, &id), (Reason::TtlOver, "server".to_owned()));
        // A start gives it all of it again.
        house.start(&id).await;
        tokio::time::sleep(Duration::from_secs(50)).await;
        assert_eq!(house.phase(&id), Some(Phase::Running));
        house.until(&id, Some(Phase::Stopped)).await;
    }
}

/// It was not ended yet: it goes on, and how it really ends is what is told.
#[tokio::test(start_paused = true)]
async fn a_start_takes_the_end_of_a_time_to_live_back() {
    let house = House::new().await;
    let body = CreateVm { ttl: Some(Millis(60_000)), ..wanted("web") };
    let id = house.try_create("web", &body).await.unwrap();
    house.until(&id, Some(Phase::Running)).await;
    // That its time is over is written down, and that it is being stopped not yet.
    house.faults.at(Method::StoreTxn, 2, Injection::Delay(Duration::from_secs(5)));
    tokio::time::sleep(Duration::from_secs(61)).await;
    assert_eq!((house.phase(&id), house.record(&id).desired), (Some(Phase::Running), Desired::Stopped));
    house.service().start("web", "uid=7").await.unwrap();
    tokio::time::sleep(Duration::from_secs(30)).await;
    let record = house.record(&id);
    assert_eq!((record.phase, record.incarnation, &record.exit), (Phase::Running, Incarnation(1), &None));
    assert!(house.host.kill_vmm(&id));
    house.until(&id, Some(Phase::Failed)).await;
    assert_eq!(exit(&house, &id), (Reason::VmmDied, "host".to_owned()));
    let exits = told(&house, &id).await.into_iter().filter(|line| line.starts_with("vm.exit"));
    assert_eq!(exits.collect::<Vec<_>>(), ["vm.exit by host: vmm-died: the VMM ended by itself: killed by signal 9"]);
    house.delete(&id).await;
    house.check_empty();
}

#[tokio::test(start_paused = true)]
async fn a_keep_alive_puts_it_off_and_never_takes_it_away() {
    let mut house = House::new().await;
    let body = CreateVm { ttl: Some(Millis(60_000)), ..wanted("web") };
    let id = house.try_create("web", &body).await.unwrap();
    house.until(&id, Some(Phase::Running)).await;
    for _ in 0..5 {
        tokio::time::sleep(Duration::from_secs(50)).await;
        house.service().keep("web", Some(Millis(60_000)), "uid=7").await.unwrap();
    }
    assert_eq!(house.phase(&id), Some(Phase::Running));
    let generation = house.record(&id).generation;
    house.service().keep("web", None, "uid=7").await.unwrap();
    assert_eq!(house.record(&id).generation, generation, "no change of what is wanted");
    tokio::time::sleep(Duration::from_secs(24 * 3600)).await;
    assert_eq!(house.phase(&id), Some(Phase::Running));
    assert!(told(&house, &id).await.contains(&"vm.ttl by uid=7: time to live: for ever".to_owned()));
    // Over while no daemon was there: at once when there is one.
    house.service().keep("web", Some(Millis(1_000)), "uid=7").await.unwrap();
    house.faults.kill_daemon();
    tokio::time::sleep(Duration::from_secs(5)).await;
    house.restart().await;
    house.until(&id, Some(Phase::Stopped)).await;
    assert_eq!(exit(&house, &id).0, Reason::TtlOver);

    for bad in [0, 365 * 24 * 3_600_000 + 1, u64::MAX] {
        let error = refused(house.service().keep("web", Some(Millis(bad)), "uid=7").await);
        assert_eq!(error.kind(), Kind::InvalidArgument);
        assert!(error.to_string().starts_with("ttl_ms: "), "{error}");
    }
    let both = CreateVm { restart: RestartPolicy::Always, remove_when_done: true, ..wanted("b") };
    let error = refused(house.try_create("b", &both).await);
    assert_eq!(error.kind(), Kind::InvalidArgument);
    assert!(error.to_string().starts_with("restart: "), "{error}");
    house.delete(&id).await;
    assert_eq!(refused(house.service().keep(id.as_str(), None, "uid=7").await).kind(), Kind::NotFound);
}

/// Requests that a server of the version before wrote down are still the same requests.
#[tokio::test(start_paused = true)]
async fn a_request_of_an_older_server_is_remembered() {
    let mut house = House::new().await;
    let id = house.running("web").await;
    let row: serde_json::Value = serde_json::from_slice(&house.store.row("requests/web").unwrap()).unwrap();
    let mut old = row.as_object().unwrap().clone();
    old.remove("version");
    for field in ["ttl", "restart"] {
        old["body"].as_object_mut().unwrap().remove(field).unwrap();
    }
    house.store.scribble("requests/web", serde_json::to_string(&old).unwrap().as_bytes());
    house.restart().await;
    assert_eq!(house.try_create("web", &wanted("web")).await.unwrap(), id, "the same VM");
    let error = refused(house.try_create("web", &wanted("other")).await);
    assert_eq!(error.kind(), Kind::AlreadyExists, "{}", error.chain());
}
