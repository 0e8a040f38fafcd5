//! A VM's life as its owner sees it.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::time::Duration;

use clawpot_core::exec::ExecEnd;
use clawpot_core::{Desired, Phase, VmmEnd};
use clawpot_testkit::{Boot, Injection, Method, Shutdown};
use clawpot_types::{Generation, Incarnation, Kind, Millis, Revision};
use futures_util::StreamExt as _;
use support::{House, program, refused, wanted};

#[tokio::test(start_paused = true)]
async fn a_vm_comes_up_runs_a_command_and_goes() {
    let house = House::new().await;
    let id = house.running("web").await;
    let record = house.record(&id);
    assert_eq!((record.generation, record.incarnation), (Generation(1), Incarnation(1)));
    assert!(record.address.is_some() && record.vmm.is_some() && record.disk_made);
    let stretches: Vec<&str> = record.timings.iter().map(|timing| timing.name.as_str()).collect();
    assert_eq!(stretches, ["accepted", "preparing", "booting", "booting.kernel"]);
    assert_eq!(house.exec(&id, &["echo", "hello"]).await.unwrap(), (ExecEnd::Code(0), "hello\n".to_owned()));
    assert_eq!(house.exec(&id, &["exit", "7"]).await.unwrap().0, ExecEnd::Code(7));
    house.delete(&id).await;
    house.check_empty();
    let execs: Vec<_> = house.store.all_events().into_iter().filter(|event| event.kind == "vm.exec").collect();
    assert_eq!(execs.len(), 2, "{execs:?}");
    assert!(execs.iter().all(|event| event.actor == "uid=0"), "{execs:?}");
    assert!(execs[0].message.ends_with(": echo"), "the program and none of its arguments: {}", execs[0].message);
    let told: Vec<String> = house.store.all_events().into_iter().map(|event| event.kind).collect();
    assert_eq!(told.first().map(String::as_str), Some("vm.create"));
    assert_eq!(told.last().map(String::as_str), Some("vm.gone"));
}

#[tokio::test(start_paused = true)]
async fn an_exec_waits_for_a_vm_on_its_way_up() {
    let house = House::new().await;
    let id = house.create("web").await;
    assert_eq!(house.exec(&id, &["echo", "early"]).await.unwrap().1, "early\n");
    house.stop(&id).await;
    let error = refused(house.exec(&id, &["true"]).await);
    assert_eq!(error.kind(), Kind::FailedPrecondition);
    assert!(error.next_step().unwrap().contains("clawpot start"), "{:?}", error.next_step());
}

#[tokio::test(start_paused = true)]
async fn stop_and_start_keep_the_disk() {
    let house = House::new().await;
    let id = house.running("web").await;
    let disk = house.host.disk_serial(&id).unwrap();
    house.stop(&id).await;
    assert_eq!(house.host.left_behind(), [format!("disk of {id}"), format!("console log of {id}")]);
    house.start(&id).await;
    assert_eq!(house.host.disk_serial(&id), Some(disk));
    assert_eq!(house.record(&id).incarnation, Incarnation(2));
    house.delete(&id).await;
    house.check_empty();
}

#[tokio::test(start_paused = true)]
async fn a_lost_disk_is_not_replaced() {
    let house = House::new().await;
    let id = house.running("web").await;
    house.stop(&id).await;
    house.host.lose_disk(&id);
    house.service().start(id.as_str(), "uid=0").await.unwrap();
    house.until(&id, Some(Phase::Failed)).await;
    let failure = house.record(&id).failure.clone().unwrap();
    assert!(failure.message.contains("disk is gone") && failure.kind == Kind::Corrupt, "{failure:?}");
    assert_eq!(house.host.disk_serial(&id), None);
    house.delete(&id).await;
    house.check_empty();
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_will_not_go_is_killed_after_its_grace() {
    let house = House::new().await;
    let id = house.running("web").await;
    house.host.set_shutdown(Shutdown::Ignored);
    let asked = tokio::time::Instant::now();
    house.service().stop(id.as_str(), Millis(3_000), "uid=0").await.unwrap();
    house.until(&id, Some(Phase::Stopped)).await;
    let took = asked.elapsed();
    assert!(took >= Duration::from_secs(3) && took < Duration::from_secs(4), "{took:?}");
    house.check_contracts();
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_goes_is_not_waited_for() {
    let house = House::new().await;
    let id = house.running("web").await;
    let asked = tokio::time::Instant::now();
    house.stop(&id).await;
    assert!(asked.elapsed() < Duration::from_millis(200), "{:?}", asked.elapsed());
    assert_eq!(house.faults.count(Method::VmmStop), 0, "it ended by itself");
}

#[tokio::test(start_paused = true)]
async fn a_vmm_that_dies_is_noticed_and_told() {
    let house = House::new().await;
    let id = house.running("web").await;
    let disk = house.host.disk_serial(&id);
    let before = tokio::time::Instant::now();
    house.host.kill_vmm(&id);
    house.until(&id, Some(Phase::Failed)).await;
    assert!(before.elapsed() < Duration::from_millis(100), "at once: {:?}", before.elapsed());
    let record = house.record(&id);
    let failure = record.failure.as_ref().unwrap();
    assert_eq!(failure.during, Phase::Running);
    assert!(failure.message.contains("killed by signal 9") && failure.message.contains("web"), "{}", failure.message);
    assert!(failure.hint.as_ref().unwrap().contains("clawpot logs web"));
    assert!(!failure.console_tail.is_empty());
    let error = refused(house.exec(&id, &["true"]).await);
    assert!(error.chain().contains("killed by signal 9"), "{}", error.chain());

    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(house.host.left_behind(), [format!("disk of {id}"), format!("console log of {id}")]);
    house.start(&id).await;
    assert_eq!(house.host.disk_serial(&id), disk);
    assert_eq!(house.record(&id).failure, None);
    house.delete(&id).await;
    house.check_empty();
}

#[tokio::test(start_paused = true)]
async fn an_exec_of_a_dying_vm_ends_with_an_error() {
    let house = House::new().await;
    let id = house.running("web").await;
    let (first, rest) = program(&["sleep", "1000"]);
    let mut output = house.service().exec(id.as_str(), first, rest, "uid=0").await.unwrap();
    assert!(output.next().await.unwrap().is_ok());
    house.host.kill_vmm(&id);
    assert_eq!(output.next().await.unwrap().unwrap_err().kind(), Kind::Unavailable);
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_never_says_hello_fails_with_its_console() {
    let house = House::new().await;
    house.host.set_boot(Boot::Silent);
    let asked = tokio::time::Instant::now();
    let id = house.create("web").await;
    house.until(&id, Some(Phase::Failed)).await;
    assert_eq!(asked.elapsed().as_secs(), 120);
    let failure = house.record(&id).failure.clone().unwrap();
    assert_eq!((failure.during, failure.kind), (Phase::Booting, Kind::Timeout));
    assert!(failure.message.contains("120 s"), "{}", failure.message);
    assert!(failure.console_tail.iter().any(|line| line.contains("boots")), "{:?}", failure.console_tail);
    house.delete(&id).await;
    house.check_empty();
}

#[tokio::test(start_paused = true)]
async fn a_vmm_that_ends_while_booting_is_told() {
    let house = House::new().await;
    house.host.set_boot(Boot::Exits(Duration::from_millis(30), VmmEnd::Code(1)));
    let id = house.create("web").await;
    house.until(&id, Some(Phase::Failed)).await;
    let failure = house.record(&id).failure.clone().unwrap();
    assert_eq!(failure.during, Phase::Booting);
    assert!(failure.message.contains("exit status 1"), "{}", failure.message);
    assert!(failure.console_tail.iter().any(|line| line.contains("ended")), "{:?}", failure.console_tail);
}

/// Whatever is going on, and also when it hangs: 100 ms of virtual time.
#[tokio::test(start_paused = true)]
async fn a_delete_is_acted_on_at_once() {
    for stage in ["accepted", "image hangs", "hello hangs", "guest silent", "running", "shutdown hangs", "stopping"] {
        let house = House::new().await;
        match stage {
            "image hangs" => house.faults.always(Method::ImagesEnsure, Injection::Hang),
            "hello hangs" => house.faults.always(Method::GuestHello, Injection::Hang),
            "guest silent" => house.host.set_boot(Boot::Silent),
            "shutdown hangs" => house.faults.always(Method::GuestShutdown, Injection::Hang),
            "stopping" => house.host.set_shutdown(Shutdown::Ignored),
            _ => {}
        }
        let id = house.create("web").await;
        if stage != "accepted" {
            tokio::time::sleep(Duration::from_millis(400)).await;
        }
        if stage.contains("shutdown") || stage == "stopping" {
            house.service().stop(id.as_str(), Millis(60_000), "uid=0").await.unwrap();
            tokio::time::sleep(Duration::from_millis(400)).await;
            assert_eq!(house.phase(&id), Some(Phase::Stopping), "{stage}");
        }
        let asked = tokio::time::Instant::now();
        house.service().delete(id.as_str(), false, "uid=0").await.unwrap();
        house.until_one_of(&id, &[Some(Phase::Deleting), None]).await;
        assert!(asked.elapsed() <= Duration::from_millis(100), "{stage}: acted on after {:?}", asked.elapsed());
        house.until(&id, None).await;
        assert!(asked.elapsed() <= Duration::from_millis(200), "{stage}: gone after {:?}", asked.elapsed());
        house.check_empty();
    }
}

#[tokio::test(start_paused = true)]
async fn a_change_of_mind_is_followed() {
    let house = House::new().await;
    let id = house.create("web").await;
    house.service().stop(id.as_str(), Millis(0), "uid=0").await.unwrap();
    house.until(&id, Some(Phase::Stopped)).await;
    house.service().start(id.as_str(), "uid=0").await.unwrap();
    house.service().stop(id.as_str(), Millis(0), "uid=0").await.unwrap();
    house.service().start(id.as_str(), "uid=0").await.unwrap();
    house.until(&id, Some(Phase::Running)).await;
    assert_eq!(house.record(&id).desired, Desired::Running);
    house.faults.always(Method::NetRemove, Injection::Delay(Duration::from_secs(1)));
    house.service().delete(id.as_str(), false, "uid=0").await.unwrap();
    let error = refused(house.service().start(id.as_str(), "uid=0").await);
    assert_eq!(error.kind(), Kind::FailedPrecondition);
    house.until(&id, None).await;
    house.check_empty();
}

#[tokio::test(start_paused = true)]
async fn removed_when_its_exec_has_ended() {
    let house = House::new().await;
    let mut body = wanted("job");
    body.remove_when_done = true;
    let id = house.try_create("job", &body).await.unwrap();
    assert_eq!(house.exec(&id, &["exit", "3"]).await.unwrap().0, ExecEnd::Code(3));
    let ended = tokio::time::Instant::now();
    house.until(&id, None).await;
    assert!(ended.elapsed() < Duration::from_secs(1), "{:?}", ended.elapsed());
    house.check_empty();
}

#[tokio::test(start_paused = true)]
async fn removed_when_no_client_comes_back() {
    let mut house = House::new().await;
    let mut body = wanted("job");
    body.remove_when_done = true;
    let id = house.try_create("job", &body).await.unwrap();
    house.until(&id, Some(Phase::Running)).await;
    let (first, rest) = program(&["sleep", "100000"]);
    let output = house.service().exec(id.as_str(), first, rest, "uid=0").await.unwrap();
    tokio::time::sleep(Duration::from_secs(300)).await;
    assert_eq!(house.phase(&id), Some(Phase::Running), "a client is attached");
    drop(output);
    tokio::time::sleep(Duration::from_secs(50)).await;
    assert_eq!(house.phase(&id), Some(Phase::Running), "the client may come back");
    // Nor does a restart of the daemon forget it.
    house.restart().await;
    tokio::time::sleep(Duration::from_secs(50)).await;
    assert_eq!(house.phase(&id), Some(Phase::Running), "it may come back to the new daemon too");
    tokio::time::sleep(Duration::from_secs(15)).await;
    house.until(&id, None).await;
    house.check_empty();
}

#[tokio::test(start_paused = true)]
async fn removed_also_when_it_fails_or_is_stopped() {
    for stopped in [false, true] {
        let house = House::new().await;
        let mut body = wanted("job");
        body.remove_when_done = true;
        let id = house.try_create("job", &body).await.unwrap();
        house.until(&id, Some(Phase::Running)).await;
        if stopped {
            house.stop(&id).await;
        } else {
            house.host.kill_vmm(&id);
            house.until(&id, Some(Phase::Failed)).await;
        }
        house.until(&id, None).await;
        house.check_empty();
    }
}

#[tokio::test(start_paused = true)]
async fn watchers_see_every_phase() {
    let house = House::new().await;
    let mut changes = house.service().watch(None, Default::default());
    let id = house.create("web").await;
    let mut phases = Vec::new();
    let mut last = Revision(0);
    while phases.last() != Some(&Some(Phase::Running)) {
        let change = changes.next().await.unwrap().unwrap();
        assert!(change.revision > last);
        last = change.revision;
        phases.push(change.row.map(|row| row.phase()));
    }
    assert_eq!(phases, [Phase::Accepted, Phase::Preparing, Phase::Booting, Phase::Running].map(Some));
    house.delete(&id).await;
    while let Some(change) = changes.next().await {
        if change.unwrap().row.is_none() {
            break;
        }
    }
    let events = house.service().events(id.as_str(), Revision(0), 0).await.unwrap();
    assert!(events.is_sorted_by_key(|event| event.id));
    assert!(events.len() >= 6, "events outlive their VM: {events:?}");
}

#[tokio::test(start_paused = true)]
async fn a_drain_stops_everything_and_leaving_stops_nothing() {
    let mut house = House::new().await;
    let (one, two) = (house.running("one").await, house.running("two").await);
    house.service().leave().await;
    assert_eq!(house.host.living().len(), 2);
    house.restart().await;
    house.service().drain("server").await.unwrap();
    assert_eq!((house.phase(&one), house.phase(&two)), (Some(Phase::Stopped), Some(Phase::Stopped)));
    assert!(house.host.living().is_empty());
    // Connections that are open still are told that it goes.
    let refusals = [
        refused(house.service().start(one.as_str(), "uid=0").await),
        refused(house.try_create("late", &wanted("late")).await),
    ];
    assert!(refusals.iter().all(|error| error.kind() == Kind::Unavailable), "{refusals:?}");
    house.check_contracts();
}

/// What failed may have its machine for a while yet.
#[tokio::test(start_paused = true)]
async fn a_drain_waits_for_what_is_left_of_a_vm_that_failed() {
    let house = House::new().await;
    house.host.set_boot(Boot::Silent);
    let id = house.create("web").await;
    house.faults.always(Method::VmmStop, Injection::Error(Kind::Internal));
    house.until(&id, Some(Phase::Failed)).await;
    let drained = {
        let service = house.service().clone();
        tokio::spawn(async move { service.drain("server").await })
    };
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert!(!drained.is_finished() && house.host.living().len() == 1);
    house.faults.heal(Method::VmmStop);
    drained.await.unwrap().unwrap();
    assert!(house.host.living().is_empty());
}
