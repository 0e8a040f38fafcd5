//! A record to begin with.

#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::collections::BTreeMap;

use clawpot_core::record::RECORD_VERSION;
use clawpot_core::{
    Desired, DiskSource, ExtraDisk, Failure, ImagePin, Phase, Reach, Restart, RestartPolicy, VmRecord, VmSpec,
};
use clawpot_types::{Digest, Generation, ImageRef, Incarnation, Kind, MiB, Millis, Slot, Timestamp, Vcpus, VmId};

pub const START: Timestamp = Timestamp(1_800_000_000_000_000);

/// Just accepted.
#[allow(clippy::unwrap_used, reason = "the name is a constant")]
pub fn record() -> VmRecord {
    VmRecord {
        version: RECORD_VERSION,
        id: VmId::from_random([7; VmId::LEN]),
        name: "web".parse().unwrap(),
        labels: BTreeMap::new(),
        spec: VmSpec {
            image: ImageRef::Name("debian".to_owned()),
            vcpus: Vcpus::ONE,
            memory: MiB(256),
            disk: MiB(4096),
            env: Vec::new(),
            cwd: "/root".to_owned(),
            user: "root".to_owned(),
            extra_disks: Vec::new(),
            reach: Reach::Default,
        },
        image: ImagePin { digest: Digest::from_sha256(&[0xab; 32]) },
        desired: Desired::Running,
        generation: Generation(1),
        incarnation: Incarnation(0),
        phase: Phase::Accepted,
        phase_since: START,
        deadline: None,
        slot: Slot(14),
        vmm: None,
        boot_id: String::new(),
        address: None,
        created_at: START,
        disk_made: false,
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

/// A volume that the VM writes to.
#[allow(clippy::unwrap_used, reason = "the names are constants")]
pub fn written() -> ExtraDisk {
    let source = DiskSource::Volume("data".parse().unwrap());
    ExtraDisk { source, read_only: false, mount: Some("/srv".parse().unwrap()) }
}

/// Of a boot.
pub fn failure(generation: Generation) -> Failure {
    Failure {
        during: Phase::Booting,
        generation,
        kind: Kind::Internal,
        message: "it failed".to_owned(),
        hint: None,
        cleanup: None,
        console_tail: Vec::new(),
    }
}
