//! Records to begin a test with.

use std::collections::BTreeMap;

use clawpot_core::record::RECORD_VERSION;
use clawpot_core::{Desired, ImagePin, Phase, Reach, Restart, RestartPolicy, VmRecord, VmSpec};
use clawpot_types::{Digest, Generation, ImageRef, Incarnation, MiB, Millis, Slot, Vcpus, VmId};

/// One vCPU, 128 MiB, the image "debian".
#[must_use]
pub fn spec() -> VmSpec {
    VmSpec {
        image: ImageRef::Name("debian".to_owned()),
        vcpus: Vcpus::try_from(1).unwrap_or_else(|error| unreachable!("{error}")),
        memory: MiB(128),
        disk: MiB(1024),
        env: vec![("LANG".to_owned(), "C.UTF-8".to_owned())],
        cwd: "/root".to_owned(),
        user: "root".to_owned(),
        extra_disks: Vec::new(),
        reach: Reach::Default,
    }
}

/// A VM that was just accepted. `n` makes id, name and slot differ.
#[must_use]
pub fn record(n: u8) -> VmRecord {
    let name = format!("vm-{n}");
    VmRecord {
        version: RECORD_VERSION,
        id: VmId::from_random([n; VmId::LEN]),
        name: name.parse().unwrap_or_else(|error| unreachable!("{name}: {error}")),
        labels: BTreeMap::new(),
        spec: spec(),
        image: ImagePin { digest: Digest::from_sha256(&[0xde; 32]) },
        desired: Desired::Running,
        generation: Generation(1),
        incarnation: Incarnation(0),
        phase: Phase::Accepted,
        phase_since: crate::time::START,
        deadline: None,
        slot: Slot(n.into()),
        disk_made: false,
        vmm: None,
        boot_id: String::new(),
        address: None,
        created_at: crate::time::START,
        timings: Vec::new(),
        failure: None,
        quarantine: None,
        remove_when_done: false,
        stop_grace: Millis(5_000),
        intent_by: "uid=1000".to_owned(),
        exit: None,
        restart: Restart::new(RestartPolicy::Never),
        ttl: None,
        expires_at: None,
    }
}
