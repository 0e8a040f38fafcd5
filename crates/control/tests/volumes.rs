//! Volumes: who may have them, and what a death of the daemon leaves. No file system is at stake: see `clawpot-image`'s tests.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::time::Duration;

use clawpot_control::Settings;
use clawpot_control::service::create::CreateVm;
use clawpot_core::event::About;
use clawpot_core::ports::Check;
use clawpot_core::volume::VolumeState;
use clawpot_core::{DiskSource, ExtraDisk, Phase};
use clawpot_testkit::volumes::FakeFile;
use clawpot_testkit::{Injection, Method, Shutdown};
use clawpot_types::{Error, Kind, MiB, Millis, Result, VmId, VolumeId, VolumeName};
use support::{House, wanted};

const SIZE: MiB = MiB(1024);

fn name(text: &str) -> VolumeName {
    text.parse().unwrap()
}

/// A VM that wants volumes: `(name, read_only)`.
fn with(vm: &str, volumes: &[(&str, bool)]) -> CreateVm {
    let mut body = wanted(vm);
    let disk = |(volume, read_only): &(&str, bool)| ExtraDisk {
        source: DiskSource::Volume(name(volume)),
        read_only: *read_only,
        mount: Some(format!("/{volume}").parse().unwrap()),
    };
    body.spec.extra_disks = volumes.iter().map(disk).collect();
    body
}

async fn create(house: &House, vm: &str, volumes: &[(&str, bool)]) -> Result<VmId> {
    house.try_create(vm, &with(vm, volumes)).await
}

async fn make(house: &House, volume: &str) {
    house.service().create_volume(name(volume), SIZE, "uid=0").await.unwrap();
}

fn refused(answer: Result<VmId>, words: &str) {
    let error = answer.unwrap_err();
    assert_eq!(error.kind(), Kind::FailedPrecondition, "{}", error.chain());
    assert!(error.chain().contains(words), "{}", error.chain());
}

#[tokio::test(start_paused = true)]
async fn one_vm_writes_until_it_is_gone() {
    let house = House::new().await;
    make(&house, "db").await;
    let first = create(&house, "first", &[("db", false)]).await.unwrap();
    refused(create(&house, "second", &[("db", false)]).await, "VM first writes to it");
    refused(create(&house, "reader", &[("db", true)]).await, "VM first writes to it");
    house.until(&first, Some(Phase::Running)).await;
    // Stopped, it still has it: its next start cannot fail for that.
    house.stop(&first).await;
    refused(create(&house, "second", &[("db", false)]).await, "VM first writes to it");
    let error = house.service().delete_volume(name("db"), "uid=0").await.unwrap_err();
    assert!(error.chain().contains("VM first has it"), "{}", error.chain());
    house.delete(&first).await;
    let second = create(&house, "second", &[("db", false)]).await.unwrap();
    house.delete(&second).await;
    assert_eq!(house.host.volume_files().len(), 1, "kept over both");
    house.service().delete_volume(name("db"), "uid=0").await.unwrap();
    assert!(house.host.volume_files().is_empty());
}

/// Of many who ask in the same moment one gets it, and nothing of the others stays.
#[tokio::test(start_paused = true)]
async fn two_writers_at_once() {
    let house = House::new().await;
    make(&house, "db").await;
    let names = ["a", "b", "c", "d"];
    let (one, two, three, four) = (
        with("a", &[("db", false)]),
        with("b", &[("db", false)]),
        with("c", &[("db", false)]),
        with("d", &[("db", false)]),
    );
    let answers = tokio::join!(
        house.try_create("a", &one),
        house.try_create("b", &two),
        house.try_create("c", &three),
        house.try_create("d", &four)
    );
    let answers = [answers.0, answers.1, answers.2, answers.3];
    assert_eq!(answers.iter().filter(|answer| answer.is_ok()).count(), 1, "of {names:?}");
    assert_eq!(house.service().records().count(), 1);
    let view = house.service().get_volume(&name("db")).await.unwrap();
    assert_eq!(view.record.attached.len(), 1);
}

/// A client that lost its answer asks again while the first is still on its way: what holds the volume is its own VM.
#[tokio::test(start_paused = true)]
async fn the_same_request_twice_at_once_is_one_vm() {
    let house = House::new().await;
    make(&house, "db").await;
    let body = with("web", &[("db", false)]);
    house.faults.at(Method::ImagesResolve, 2, Injection::Delay(Duration::from_millis(10)));
    let (one, two) = tokio::join!(house.try_create("again", &body), house.try_create("again", &body));
    assert_eq!(two.map_err(|error| error.chain()), one.map_err(|error| error.chain()));
    assert_eq!(house.service().records().count(), 1);
}

#[tokio::test(start_paused = true)]
async fn any_number_read() {
    let house = House::new().await;
    make(&house, "models").await;
    for vm in ["a", "b", "c"] {
        create(&house, vm, &[("models", true)]).await.unwrap();
    }
    refused(create(&house, "writer", &[("models", false)]).await, "reads it");
    let view = house.service().get_volume(&name("models")).await.unwrap();
    assert_eq!(view.record.attached.len(), 3);
}

#[tokio::test(start_paused = true)]
async fn a_volume_that_is_not_there_makes_no_vm() {
    let house = House::new().await;
    make(&house, "db").await;
    let error = create(&house, "web", &[("db", false), ("nix", true)]).await.unwrap_err();
    assert_eq!(error.kind(), Kind::NotFound);
    assert!(error.chain().contains("spec.volumes: volume nix"), "{}", error.chain());
    assert_eq!(house.service().records().count(), 0);
    assert!(house.service().get_volume(&name("db")).await.unwrap().record.attached.is_empty());
    let error = create(&house, "web", &[("db", false), ("db", true)]).await.unwrap_err();
    assert!(error.chain().contains("volume db is there twice"), "{}", error.chain());
}

/// Unclean while a machine may write; after its end only if the file system does not say that it was unmounted.
#[tokio::test(start_paused = true)]
async fn it_is_checked_after_an_unclean_end_and_only_then() {
    let house = House::new().await;
    make(&house, "db").await;
    let checks = |house: &House| house.host.volume_files().values().next().unwrap().checks;
    let vm = create(&house, "web", &[("db", false)]).await.unwrap();
    house.until(&vm, Some(Phase::Running)).await;
    let view = house.service().get_volume(&name("db")).await.unwrap();
    assert!(view.record.unclean && checks(&house) == 0);
    house.stop(&vm).await;
    assert!(!house.service().get_volume(&name("db")).await.unwrap().record.unclean);
    house.start(&vm).await;
    assert_eq!(checks(&house), 0);
    // The guest had no time to unmount it.
    house.host.put_volume(view.record.id.clone(), FakeFile { clean: false, ..FakeFile::new(SIZE) });
    house.host.set_shutdown(Shutdown::Ignored);
    house.stop(&vm).await;
    assert!(house.service().get_volume(&name("db")).await.unwrap().record.unclean);
    house.start(&vm).await;
    assert_eq!(checks(&house), 1);
}

/// A check may take half an hour; neither a delete nor the server's end waits for it.
#[tokio::test(start_paused = true)]
async fn a_check_that_takes_long_is_given_up() {
    let mut house = House::new().await;
    make(&house, "db").await;
    let vm = create(&house, "web", &[("db", false)]).await.unwrap();
    house.until(&vm, Some(Phase::Running)).await;
    let volume = house.service().get_volume(&name("db")).await.unwrap().record.id;
    house.host.put_volume(volume, FakeFile { clean: false, ..FakeFile::new(SIZE) });
    house.host.set_shutdown(Shutdown::Ignored);
    house.stop(&vm).await;
    house.faults.at(Method::VolumesCheck, 1, Injection::Hang);
    house.service().start(vm.as_str(), "uid=0").await.unwrap();
    house.until(&vm, Some(Phase::Preparing)).await;
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(house.phase(&vm), Some(Phase::Preparing), "it is being checked");
    tokio::time::timeout(Duration::from_secs(1), house.service().leave()).await.expect("the server can go");

    house.faults.at(Method::VolumesCheck, 1, Injection::Hang);
    house.restart().await;
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(house.phase(&vm), Some(Phase::Preparing), "it is being checked again");
    house.service().delete(vm.as_str(), false, "uid=0").await.unwrap();
    tokio::time::timeout(Duration::from_secs(1), house.until(&vm, None)).await.expect("it does not wait");
    let view = house.service().get_volume(&name("db")).await.unwrap();
    assert!(view.record.attached.is_empty() && view.record.unclean);
}

/// What its guest has not written yet is to outlive the VM as well: it is asked to unmount, and not waited for for ever.
#[tokio::test(start_paused = true)]
async fn a_delete_lets_the_guest_unmount_what_it_writes_to() {
    let mut house = House::new().await;
    make(&house, "db").await;
    let running = async |house: &House, vm: &str, read_only: bool| {
        let vm = create(house, vm, &[("db", read_only)]).await.unwrap();
        house.until(&vm, Some(Phase::Running)).await;
        vm
    };
    let vm = running(&house, "writer", false).await;
    house.delete(&vm).await;
    assert_eq!((house.faults.count(Method::GuestShutdown), house.faults.count(Method::VmmStop)), (1, 0));
    // Who only reads has nothing to write.
    let vm = running(&house, "reader", true).await;
    house.delete(&vm).await;
    assert_eq!((house.faults.count(Method::GuestShutdown), house.faults.count(Method::VmmStop)), (1, 1));
    house.host.set_shutdown(Shutdown::Ignored);
    let vm = running(&house, "stubborn", false).await;
    let asked = tokio::time::Instant::now();
    house.delete(&vm).await;
    let grace = Duration::from(Settings::default().stop_grace);
    assert!((grace..grace * 2).contains(&asked.elapsed()), "{:?}", asked.elapsed());
    let vm = running(&house, "forced", false).await;
    let asked = tokio::time::Instant::now();
    house.service().delete(vm.as_str(), true, "uid=0").await.unwrap();
    house.until(&vm, None).await;
    assert!(asked.elapsed() < Duration::from_millis(200), "{:?}", asked.elapsed());
    // A daemon that dies meanwhile: the next one asks again, and no longer than the first would have.
    let vm = running(&house, "adopted", false).await;
    let asked = tokio::time::Instant::now();
    house.service().delete(vm.as_str(), false, "uid=0").await.unwrap();
    tokio::time::sleep(grace / 2).await;
    house.restart().await;
    house.until(&vm, None).await;
    assert!((grace..grace * 2).contains(&asked.elapsed()), "{:?}", asked.elapsed());
    assert_eq!(house.faults.count(Method::GuestShutdown), 4);
}

/// Whoever says --force after a stop or a delete whose guest takes its time has not said it for nothing.
#[tokio::test(start_paused = true)]
async fn a_delete_by_force_waits_for_no_guest_that_was_asked_before() {
    let house = House::new().await;
    make(&house, "db").await;
    house.host.set_shutdown(Shutdown::Ignored);
    for deleted in [false, true] {
        let vm = create(&house, &format!("deleted-{deleted}"), &[("db", false)]).await.unwrap();
        house.until(&vm, Some(Phase::Running)).await;
        house.service().stop(vm.as_str(), Millis(3_600_000), "uid=0").await.unwrap();
        house.until(&vm, Some(Phase::Stopping)).await;
        if deleted {
            house.service().delete(vm.as_str(), false, "uid=0").await.unwrap();
            tokio::time::sleep(Duration::from_secs(60)).await;
            assert_eq!(house.phase(&vm), Some(Phase::Deleting), "its guest has the time that the stop gave it");
        }
        let asked = tokio::time::Instant::now();
        house.service().delete(vm.as_str(), true, "uid=0").await.unwrap();
        house.until(&vm, None).await;
        assert!(asked.elapsed() < Duration::from_millis(200), "{:?}", asked.elapsed());
    }
    house.check_contracts();
}

#[tokio::test(start_paused = true)]
async fn a_full_disk_leaves_nothing() {
    let house = House::new().await;
    house.faults.at(Method::VolumesCreate, 1, Injection::Error(Kind::Exhausted));
    let error = house.service().create_volume(name("db"), SIZE, "uid=0").await.unwrap_err();
    assert_eq!(error.kind(), Kind::Exhausted);
    let (volumes, unreadable) = house.service().list_volumes().await.unwrap();
    assert!(volumes.is_empty() && unreadable.is_empty() && house.host.volume_files().is_empty());
    make(&house, "db").await;
    house.faults.at(Method::VolumesCopy, 1, Injection::Error(Kind::Exhausted));
    house.service().copy_volume(name("db"), name("copy"), "uid=0").await.unwrap_err();
    let (volumes, _) = house.service().list_volumes().await.unwrap();
    assert_eq!(volumes.len(), 1);
    assert_eq!(volumes[0].record.state, VolumeState::Ready, "the source is free again");
    house.service().copy_volume(name("db"), name("copy"), "uid=0").await.unwrap();
    let error = house.service().copy_volume(name("db"), name("copy"), "uid=0").await.unwrap_err();
    assert_eq!(error.kind(), Kind::AlreadyExists);
}

/// Every volume counts, and is no more than there is room for.
#[tokio::test(start_paused = true)]
async fn the_disk_budget_counts_volumes() {
    let house = House::new().await;
    let budget = house.service().budgets().await.unwrap().disk;
    make(&house, "db").await;
    assert_eq!(house.service().budgets().await.unwrap().disk.used, budget.used + SIZE.0);
    let error = house.service().create_volume(name("huge"), MiB(budget.limit), "uid=0").await.unwrap_err();
    assert_eq!(error.kind(), Kind::Exhausted, "{}", error.chain());
    house.service().delete_volume(name("db"), "uid=0").await.unwrap();
    assert_eq!(house.service().budgets().await.unwrap().disk.used, budget.used);
}

/// One thing at a time is done to a volume. Who comes second is told so, and changes nothing of what the first was promised.
#[tokio::test(start_paused = true)]
async fn of_two_at_once_one_is_refused() {
    let house = House::new().await;
    let used = async || house.service().budgets().await.unwrap().disk.used;
    let before = used().await;
    let service = house.service();
    house.faults.at(Method::StoreGet, 1, Injection::DelayAfter(Duration::from_millis(10)));
    let (first, second) = tokio::join!(
        service.create_volume(name("db"), SIZE, "uid=0"),
        service.create_volume(name("db"), MiB(2048), "uid=0")
    );
    assert_eq!((first.unwrap().record.size, second.unwrap_err().kind()), (SIZE, Kind::FailedPrecondition));
    assert_eq!(used().await, before + SIZE.0);
    house.faults.at(Method::StoreGet, 1, Injection::DelayAfter(Duration::from_millis(10)));
    let (first, second) = tokio::join!(
        service.resize_volume(name("db"), MiB(3072), "uid=0"),
        service.resize_volume(name("db"), MiB(4096), "uid=0")
    );
    assert_eq!((first.unwrap().record.size, second.unwrap_err().kind()), (MiB(3072), Kind::FailedPrecondition));
    assert_eq!(used().await, before + 3072);
    assert_eq!(house.host.volume_files().values().next().unwrap().size, MiB(3072));
    let error = service.copy_volume(name("db"), name("db"), "uid=0").await.unwrap_err();
    assert_eq!(error.kind(), Kind::InvalidArgument, "{}", error.chain());
}

/// Each is an event with who and what, and what came of it is another.
#[tokio::test(start_paused = true)]
async fn what_is_done_to_volumes_is_told() {
    let house = House::new().await;
    make(&house, "db").await;
    let service = house.service();
    service.resize_volume(name("db"), MiB(2048), "uid=7").await.unwrap();
    house.faults.at(Method::VolumesGrow, 1, Injection::Error(Kind::Exhausted));
    service.resize_volume(name("db"), MiB(4096), "uid=7").await.unwrap_err();
    let view = service.get_volume(&name("db")).await.unwrap();
    assert_eq!((view.record.size, view.record.unclean), (MiB(2048), false), "as its file is");
    let damaged = FakeFile { clean: false, damaged: true, ..FakeFile::new(MiB(2048)) };
    house.host.put_volume(view.record.id.clone(), damaged);
    let error = service.check_volume(name("db"), Check::Whole, "uid=7").await.unwrap_err();
    assert!(error.next_step().unwrap().contains("clawpot volume check db --repair"), "{}", error.chain());
    let (view, _) = service.check_volume(name("db"), Check::Repair, "uid=7").await.unwrap();
    assert!(!view.record.unclean && view.file.unwrap().clean);
    service.copy_volume(name("db"), name("copy"), "uid=7").await.unwrap();
    service.delete_volume(name("db"), "uid=7").await.unwrap();
    let told: Vec<(String, String)> = house
        .store
        .all_events()
        .into_iter()
        .filter(|event| matches!(&event.about, About::Volume { volume, .. } if *volume == view.record.id))
        .map(|event| (event.kind, event.actor))
        .collect();
    let want = [
        ("volume.create", "uid=0"),
        ("volume.ready", "server"),
        ("volume.resize", "uid=7"),
        ("volume.ready", "server"),
        ("volume.resize", "uid=7"),
        ("volume.ready", "server"),
        ("volume.check", "uid=7"),
        ("volume.ready", "server"),
        ("volume.check", "uid=7"),
        ("volume.ready", "server"),
        ("volume.delete", "uid=7"),
        ("volume.gone", "server"),
    ];
    assert_eq!(told, want.map(|(kind, actor)| (kind.to_owned(), actor.to_owned())));
}

#[tokio::test(start_paused = true)]
async fn it_grows_while_no_machine_has_it() {
    let house = House::new().await;
    make(&house, "db").await;
    let vm = create(&house, "web", &[("db", false)]).await.unwrap();
    house.until(&vm, Some(Phase::Running)).await;
    let grow = async |size| house.service().resize_volume(name("db"), MiB(size), "uid=0").await;
    let said = |error: Error| error.chain();
    assert!(said(grow(2048).await.unwrap_err()).contains("VM web has it and is not stopped"));
    house.stop(&vm).await;
    assert_eq!(grow(2048).await.unwrap().record.size, MiB(2048));
    assert!(said(grow(1024).await.unwrap_err()).contains("only grows"));
    assert_eq!(house.host.volume_files().values().next().unwrap().size, MiB(2048));
    house.start(&vm).await;
}

/// The daemon dies in the middle of each; the next one finishes or undoes it.
#[tokio::test(start_paused = true)]
async fn what_a_death_leaves_is_put_in_order() {
    let mut house = House::new().await;
    make(&house, "db").await;
    make(&house, "old").await;
    // Of a volume that was made since the backup from which the store was restored.
    let unknown = VolumeId::from_random([9; VolumeId::LEN]);
    house.host.put_volume(unknown.clone(), FakeFile::new(SIZE));
    let dies_in = [Method::VolumesCreate, Method::VolumesCopy, Method::VolumesGrow, Method::VolumesRemove];
    for (turn, method) in dies_in.into_iter().enumerate() {
        house.faults.at(method, 1, Injection::Hang);
        let service = house.service().clone();
        let dying = tokio::spawn(async move {
            match turn {
                0 => service.create_volume(name("new"), SIZE, "uid=0").await.map(drop),
                1 => service.copy_volume(name("db"), name("new"), "uid=0").await.map(drop),
                2 => service.resize_volume(name("db"), MiB(2048), "uid=0").await.map(drop),
                _ => service.delete_volume(name("old"), "uid=0").await,
            }
        });
        tokio::time::sleep(std::time::Duration::from_secs(1)).await;
        assert!(!dying.is_finished());
        house.restart().await;
        tokio::time::sleep(std::time::Duration::from_secs(1)).await;
        let (volumes, _) = house.service().list_volumes().await.unwrap();
        let names: Vec<&str> = volumes.iter().map(|view| view.record.name.as_str()).collect();
        let want: &[&str] = if turn == 3 { &["db"] } else { &["db", "old"] };
        assert_eq!(names, want, "turn {turn}");
        assert!(volumes.iter().all(|view| view.record.state == VolumeState::Ready && view.file.is_some()));
        let mut files = house.host.volume_files();
        assert!(files.remove(&unknown).is_some(), "nobody's data is removed in turn {turn}");
        assert_eq!(files.len(), want.len(), "no other file without a record after turn {turn}");
    }
    let grown = house.host.volume_files().into_iter().find(|(id, _)| *id != unknown).unwrap().1;
    assert_eq!(grown.size, MiB(2048));
}

/// The store is older than a machine that writes to a volume, and says that nobody has it.
#[tokio::test(start_paused = true)]
async fn nobody_gets_a_volume_while_a_machine_that_no_record_knows_may_write_to_it() {
    for seen in [true, false] {
        let mut house = House::new().await;
        make(&house, "db").await;
        let backup = house.store.row("volumes/db").unwrap();
        let lost = create(&house, "lost", &[("db", false)]).await.unwrap();
        house.until(&lost, Some(Phase::Running)).await;
        house.forget(&lost).await;
        house.store.scribble("volumes/db", &backup);
        if !seen {
            house.faults.always(Method::VmmList, Injection::Error(Kind::Internal));
        }
        house.restart().await;
        let service = house.service().clone();
        for error in [
            create(&house, "next", &[("db", false)]).await.unwrap_err(),
            create(&house, "next", &[("db", true)]).await.unwrap_err(),
            service.check_volume(name("db"), Check::Whole, "uid=0").await.unwrap_err(),
            service.resize_volume(name("db"), MiB(2048), "uid=0").await.unwrap_err(),
            service.copy_volume(name("db"), name("copy"), "uid=0").await.unwrap_err(),
            service.delete_volume(name("db"), "uid=0").await.unwrap_err(),
        ] {
            let why = if seen { "which no record knows" } else { "not known yet" };
            assert_eq!(error.kind(), Kind::FailedPrecondition, "{}", error.chain());
            assert!(error.chain().contains(why) && error.next_step().is_some(), "{}", error.chain());
        }
        house.faults.heal(Method::VmmList);
        // Longer than the settings' `stray_grace`, and one more look.
        tokio::time::sleep(Duration::from_secs(40)).await;
        assert_eq!(house.host.living(), []);
        // It was not unmounted, whatever its record said.
        let next = create(&house, "next", &[("db", false)]).await.unwrap();
        house.until(&next, Some(Phase::Running)).await;
        assert_eq!(house.host.volume_files().values().next().unwrap().checks, 1);
        house.check_contracts();
    }
}

/// As after [`nobody_gets_a_volume_while_a_machine_that_no_record_knows_may_write_to_it`], where the host was restarted meanwhile.
#[tokio::test(start_paused = true)]
async fn a_file_that_was_not_unmounted_is_checked_whatever_its_record_says() {
    let mut house = House::new().await;
    make(&house, "db").await;
    let vm = create(&house, "reader", &[("db", true)]).await.unwrap();
    house.until(&vm, Some(Phase::Running)).await;
    house.stop(&vm).await;
    let id = house.service().get_volume(&name("db")).await.unwrap().record.id;
    house.host.put_volume(id, FakeFile { clean: false, ..FakeFile::new(SIZE) });
    house.restart().await;
    assert!(house.service().get_volume(&name("db")).await.unwrap().record.unclean);
    house.start(&vm).await;
    assert_eq!(house.host.volume_files().values().next().unwrap().checks, 1);
    house.check_contracts();
}

/// A start that comes while something is done to a volume begins when that is over.
#[tokio::test(start_paused = true)]
async fn a_start_waits_for_what_is_being_done_to_a_volume() {
    let house = House::new().await;
    make(&house, "db").await;
    let vm = create(&house, "web", &[("db", false)]).await.unwrap();
    house.until(&vm, Some(Phase::Running)).await;
    for method in [Method::VolumesGrow, Method::VolumesCheck, Method::VolumesCopy] {
        house.stop(&vm).await;
        house.faults.at(method, 1, Injection::Delay(Duration::from_secs(100)));
        let service = house.service().clone();
        let doing = tokio::spawn(async move {
            match method {
                Method::VolumesGrow => service.resize_volume(name("db"), MiB(2048), "uid=0").await.map(drop),
                Method::VolumesCheck => service.check_volume(name("db"), Check::Whole, "uid=0").await.map(drop),
                _ => service.copy_volume(name("db"), name("copy"), "uid=0").await.map(drop),
            }
        });
        tokio::time::sleep(Duration::from_secs(10)).await;
        house.service().start(vm.as_str(), "uid=0").await.unwrap();
        tokio::time::sleep(Duration::from_secs(60)).await;
        assert_eq!(house.phase(&vm), Some(Phase::Preparing), "{method:?}");
        house.until(&vm, Some(Phase::Running)).await;
        doing.await.unwrap().unwrap();
    }
    // Nor does its time to live, or a delete.
    house.stop(&vm).await;
    let service = house.service().clone();
    house.faults.at(Method::VolumesGrow, 1, Injection::Delay(Duration::from_secs(1000)));
    let doing = tokio::spawn(async move { service.resize_volume(name("db"), MiB(4096), "uid=0").await.map(drop) });
    tokio::time::sleep(Duration::from_secs(10)).await;
    house.service().start(vm.as_str(), "uid=0").await.unwrap();
    house.until(&vm, Some(Phase::Preparing)).await;
    tokio::time::sleep(Duration::from_secs(10)).await;
    house.service().keep(vm.as_str(), Some(Millis(20_000)), "uid=0").await.unwrap();
    tokio::time::sleep(Duration::from_secs(22)).await;
    assert_eq!(house.phase(&vm), Some(Phase::Stopped), "its time to live was over");
    house.service().start(vm.as_str(), "uid=0").await.unwrap();
    tokio::time::sleep(Duration::from_secs(10)).await;
    house.service().delete(vm.as_str(), false, "uid=0").await.unwrap();
    tokio::time::timeout(Duration::from_secs(1), house.until(&vm, None)).await.expect("it does not wait");
    doing.await.unwrap().unwrap();
    house.check_contracts();
}

/// A record never says a size that its file has not. Found by the simulator.
#[tokio::test(start_paused = true)]
async fn a_resize_of_which_nobody_can_say_what_came_of_it_is_finished() {
    let house = House::new().await;
    make(&house, "db").await;
    house.faults.at(Method::VolumesGrow, 1, Injection::Error(Kind::Exhausted));
    house.faults.at(Method::VolumesLook, 1, Injection::Error(Kind::Internal));
    house.service().resize_volume(name("db"), MiB(2048), "uid=0").await.unwrap_err();
    tokio::time::sleep(Duration::from_secs(5)).await;
    let view = house.service().get_volume(&name("db")).await.unwrap();
    assert_eq!((view.record.state, view.record.size), (VolumeState::Ready, view.file.unwrap().size));
}

/// It is shown, its file stays, and its name is free again when somebody says so.
#[tokio::test(start_paused = true)]
async fn a_record_that_cannot_be_read_is_shown_and_has_a_way_out() {
    for damaged in [true, false] {
        let house = House::new().await;
        make(&house, "db").await;
        make(&house, "db-2").await;
        let vm = create(&house, "web", &[("db", false)]).await.unwrap();
        house.until(&vm, Some(Phase::Running)).await;
        if damaged {
            house.store.damage("volumes/db");
        } else {
            let record = String::from_utf8(house.store.row("volumes/db").unwrap()).unwrap();
            house.store.scribble("volumes/db", record.replace("\"ready\"", "\"purple\"").as_bytes());
        }
        let service = house.service();
        let (volumes, unreadable) = service.list_volumes().await.unwrap();
        assert_eq!((volumes.len(), unreadable[0].0.as_str()), (1, "volumes/db"));
        for error in [
            service.get_volume(&name("db")).await.map(drop).unwrap_err(),
            service.delete_volume(name("db"), "uid=0").await.unwrap_err(),
        ] {
            assert_eq!(error.kind(), Kind::Corrupt);
            assert!(error.next_step().unwrap().contains("clawpot volume rm --force db"), "{}", error.chain());
        }
        let error = service.delete_volume_by_force(name("db"), "uid=7").await.unwrap_err();
        assert!(error.chain().contains("VM web has it"), "{}", error.chain());
        house.delete(&vm).await;
        let files = house.host.volume_files();
        service.delete_volume_by_force(name("db"), "uid=7").await.unwrap();
        assert_eq!(house.host.volume_files(), files, "its file stays");
        let told =
            house.store.all_events().into_iter().any(|event| event.kind == "volume.gone" && event.actor == "uid=7");
        assert_eq!(told, !damaged, "without an id there is none to tell of");
        make(&house, "db").await;
        // Of one that can be read it is a removal like any other.
        service.delete_volume_by_force(name("db-2"), "uid=7").await.unwrap();
        assert_eq!(house.host.volume_files().len(), 2);
    }
}
