//! What is admitted: every resource at its edge, what a VM holds in every phase, and the words of each refusal.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use clawpot_core::admission::{Budgets, Claim, Footprint, Policy, Resource, Room, may_have_machine};
use clawpot_core::{Desired, DiskSource, ExtraDisk, Phase, Restart, RestartPolicy};
use clawpot_types::{Error, Kind, MiB, Retry, Vcpus};
use proptest::prelude::*;

const GIB: u64 = 1024;

/// Two CPUs, 10 GiB of memory, 100 GiB of disk of which half is free.
fn room() -> Room {
    Room {
        cpus: 2,
        memory: MiB(10 * GIB),
        memory_available: MiB(9 * GIB),
        disk: MiB(100 * GIB),
        disk_free: MiB(50 * GIB),
    }
}

const VMM: Footprint = Footprint { memory: MiB(100), memory_per_vcpu: MiB(8) };

fn budgets(held: Claim) -> Budgets {
    Budgets::new(&Policy::default(), &room(), 8, held)
}

fn claim(memory: u64, disk: u64, vcpus: u64, slots: u64) -> Claim {
    Claim { memory, vmm_memory: 0, disk, vcpus, slots }
}

#[test]
fn the_last_of_everything_can_be_had_and_no_more() {
    let empty = budgets(Claim::default());
    assert_eq!(
        (empty.memory.limit, empty.disk.limit, empty.vcpus.limit, empty.slots.limit),
        (9 * GIB, 400 * GIB, 32, 8)
    );
    let all = claim(9 * GIB, 400 * GIB, 32, 8);
    assert_eq!(empty.admit(all), Ok(()));
    for (resource, more) in [
        (Resource::Memory, claim(1, 0, 0, 0)),
        (Resource::Disk, claim(0, 1, 0, 0)),
        (Resource::Vcpus, claim(0, 0, 1, 0)),
        (Resource::Slots, claim(0, 0, 0, 1)),
    ] {
        assert_eq!(empty.admit(all.and(more)).unwrap_err().resource, resource);
        assert_eq!(budgets(all).admit(more).unwrap_err().resource, resource);
        // What is full of one thing takes whoever asks for none of it.
        assert_eq!(budgets(more.and(all)).admit(Claim::default()), Ok(()));
    }
}

#[test]
fn under_the_watermark_nothing_is_admitted() {
    let with = |disk_free: u64, low_disk_percent: u32| {
        let policy = Policy { low_disk_percent, ..Policy::default() };
        let budgets = Budgets::new(&policy, &Room { disk_free: MiB(disk_free), ..room() }, 8, Claim::default());
        budgets.admit(claim(0, 0, 0, 1)).map_err(|short| short.resource)
    };
    assert_eq!(with(10 * GIB, 10), Ok(()));
    assert_eq!(with(10 * GIB - 1, 10), Err(Resource::FreeDisk));
    assert_eq!(with(0, 10), Err(Resource::FreeDisk));
    assert_eq!(with(0, 0), Ok(()), "0 is no watermark");
    assert_eq!(with(99 * GIB, 100), Err(Resource::FreeDisk));
}

#[test]
fn a_refusal_names_what_was_asked_what_is_free_and_what_to_do() {
    let held = claim(8 * GIB, 399 * GIB, 31, 7);
    let mut told = String::new();
    let mut tell = |error: &Error| {
        assert_eq!((error.kind(), error.retry()), (Kind::Exhausted, Retry::AfterFix));
        told.push_str(&format!("{error}\n  hint: {}\n", error.next_step().unwrap()));
    };
    for asked in [claim(2 * GIB, 0, 1, 1), claim(0, 4 * GIB, 1, 1), claim(0, 0, 2, 1), claim(0, 0, 0, 2)] {
        tell(&budgets(held).admit(asked).unwrap_err().error("create"));
    }
    let vmm = Claim { vmm_memory: 108, ..claim(1024 + 108, 0, 1, 1) };
    tell(&budgets(held).admit(vmm).unwrap_err().error("create"));
    let low = Budgets::new(&Policy::default(), &Room { disk_free: MiB(9 * GIB), ..room() }, 8, held);
    tell(&low.admit(claim(1, 1, 1, 1)).unwrap_err().error("VM web: start"));
    insta::assert_snapshot!(told);
}

#[test]
fn what_a_vm_holds_follows_from_its_phase() {
    let mut table = String::new();
    for phase in Phase::ALL {
        for desired in Desired::ALL {
            let mut record = support::record();
            record.phase = phase;
            record.desired = desired;
            if phase == Phase::Failed {
                record.failure = Some(support::failure(record.generation));
            }
            let holds = if may_have_machine(&record) { "all" } else { "disk and slot" };
            table.push_str(&format!("{phase}, {desired:?} wanted: {holds}\n").to_lowercase());
            let claim = Claim::of(&record, VMM);
            assert_eq!((claim.disk, claim.slots), (4096, 1), "until it is gone");
            let memory = if may_have_machine(&record) { (256 + 108, 108) } else { (0, 0) };
            assert_eq!((claim.memory, claim.vmm_memory), memory, "what its VMM takes is held with it");
            assert_eq!(claim.vcpus > 0, may_have_machine(&record));
        }
    }
    insta::assert_snapshot!(table);
    // A build's: what it writes the result to is as large as its own.
    let mut builder = support::record();
    builder.spec.extra_disks = [false, true]
        .map(|read_only| ExtraDisk { source: DiskSource::File("/disk".into()), read_only, mount: None })
        .to_vec();
    assert_eq!(Claim::of(&builder, VMM).disk, 2 * 4096);
    // A start by policy, or one that was asked for, has its place kept.
    let mut failed = support::record();
    failed.phase = Phase::Failed;
    failed.failure = Some(support::failure(failed.generation));
    assert!(!may_have_machine(&failed));
    failed.restart = Restart { at: Some(support::START), ..Restart::new(RestartPolicy::OnFailure) };
    assert!(may_have_machine(&failed));
    failed.restart = failed.restart.afresh();
    failed.generation = failed.generation.next();
    assert!(may_have_machine(&failed));
}

#[test]
fn nothing_overflows() {
    let policy =
        Policy { memory_percent: u32::MAX, disk_percent: u32::MAX, vcpu_percent: u32::MAX, low_disk_percent: 10 };
    let huge = Room {
        cpus: u32::MAX,
        memory: MiB(u64::MAX),
        memory_available: MiB(0),
        disk: MiB(u64::MAX),
        disk_free: MiB(u64::MAX),
    };
    let held = claim(u64::MAX, u64::MAX, u64::MAX, u64::MAX).and(claim(1, 1, 1, 1));
    let budgets = Budgets::new(&policy, &huge, u32::MAX, held);
    assert_eq!(budgets.memory.free(), 0);
    assert!(budgets.admit(claim(1, 1, 1, 1)).is_err());
    let mut spec = support::record().spec;
    spec.vcpus = Vcpus::try_from(32).unwrap();
    let whole = Claim::whole(&spec, VMM);
    assert_eq!((whole.vcpus, whole.vmm_memory), (32, 100 + 32 * 8));
    let huge = Footprint { memory: MiB(u64::MAX), memory_per_vcpu: MiB(u64::MAX) };
    assert_eq!(Claim::whole(&spec, huge).memory, u64::MAX);
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// However many ask, and in whatever order: what is held never exceeds a limit, and what is refused would have.
    #[test]
    fn limits_hold(asks in prop::collection::vec((64u64..4096, 64u64..100_000, 1u64..9), 0..40)) {
        let mut held = Claim::default();
        for (memory, disk, vcpus) in asks {
            let asked = claim(memory, disk, vcpus, 1);
            let before = budgets(held);
            let after = held.and(asked);
            let fits = after.memory <= before.memory.limit && after.disk <= before.disk.limit
                && after.vcpus <= before.vcpus.limit && after.slots <= before.slots.limit;
            prop_assert_eq!(before.admit(asked).is_ok(), fits);
            if fits {
                held = after;
            }
        }
    }
}
