//! The record on disk: what it looks like, that old ones are read and newer ones refused.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use clawpot_core::record::{Failure, RECORD_VERSION, VmmChoice};
use clawpot_core::{
    DiskSource, Exit, ExtraDisk, MachineId, Phase, Reason, Restart, RestartPolicy, Timing, VmRecord, VmmKind,
};
use clawpot_types::{Generation, Incarnation, Kind, Millis, Timestamp};

/// Every field holds something.
fn full() -> VmRecord {
    let mut record = support::record();
    record.labels.insert("team".parse().unwrap(), "blue sky".parse().unwrap());
    record.spec.env = vec![("LANG".to_owned(), "C.UTF-8".to_owned())];
    let disk = |source, mount: Option<&str>| ExtraDisk {
        source,
        read_only: mount.is_some(),
        mount: mount.map(|path| path.parse().unwrap()),
    };
    record.spec.extra_disks = vec![
        disk(DiskSource::Volume("db".parse().unwrap()), Some("/srv/db")),
        disk(DiskSource::File("/state/builds/out".into()), None),
    ];
    record.generation = Generation(3);
    record.incarnation = Incarnation(2);
    record.phase = Phase::Failed;
    record.deadline = Some(Timestamp(1_800_000_060_000_000));
    record.vmm = Some(VmmChoice { kind: VmmKind::Firecracker, version: "1.15.1".to_owned() });
    record.boot_id = "0c6b1a5e-6f0e-4a3c-9d3b-2f1e0d9c8b7a".to_owned();
    record.address = Some([10, 201, 0, 14].into());
    record.disk_made = true;
    record.timings = vec![Timing { name: "booting.kernel".to_owned(), micros: 41_500 }];
    record.failure = Some(Failure {
        during: Phase::Booting,
        generation: Generation(3),
        kind: Kind::Timeout,
        message: "VM web: its guest did not answer within 120 s".to_owned(),
        hint: Some("clawpot logs web".to_owned()),
        cleanup: Some("VM web: removing its network: busy".to_owned()),
        console_tail: vec!["Kernel panic - not syncing".to_owned()],
    });
    record.remove_when_done = true;
    record.stop_grace = Millis(10_000);
    record.intent_by = "uid=1000".to_owned();
    record.exit = Some(Exit {
        incarnation: Incarnation(2),
        at: Timestamp(1_800_000_030_000_000),
        reason: Reason::BootTimeout,
        by: "server".to_owned(),
        message: "its guest did not answer within 120 s".to_owned(),
    });
    record.restart =
        Restart { policy: RestartPolicy::OnFailure, attempts: 3, at: Some(Timestamp(1_800_000_038_000_000)) };
    record.ttl = Some(Millis(3_600_000));
    record.expires_at = Some(Timestamp(1_800_003_600_000_000));
    record
}

#[test]
fn it_is_written_like_this() {
    let record = full();
    let bytes = record.encode().unwrap();
    let json: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
    insta::assert_json_snapshot!(json);
    assert_eq!(VmRecord::decode(&bytes).unwrap(), record);
}

/// Version 1 as it was first written. Never edit the file: when the record changes, add the next one and migrate this.
#[test]
fn version_1_is_read() {
    let record = VmRecord::decode(include_bytes!("fixtures/record-1.json")).unwrap();
    // What it did not know: other disks, who asked, how it ended, that it is started again or ends.
    let mut expected = full();
    expected.spec.extra_disks.clear();
    expected.intent_by = "unknown".to_owned();
    expected.exit = None;
    expected.restart = Restart::new(RestartPolicy::Never);
    expected.ttl = None;
    expected.expires_at = None;
    assert_eq!(record, expected);
    let again = VmRecord::decode(&record.encode().unwrap()).unwrap();
    assert_eq!(again, record, "written back it is of this version");
}

/// Version 2, likewise.
#[test]
fn version_2_is_read() {
    let mut expected = full();
    // What it did not know.
    expected.spec.extra_disks.clear();
    assert_eq!(VmRecord::decode(include_bytes!("fixtures/record-2.json")).unwrap(), expected);
}

/// Version 3, likewise.
#[test]
fn version_3_is_read() {
    assert_eq!(VmRecord::decode(include_bytes!("fixtures/record-3.json")).unwrap(), full());
}

/// Version 4, likewise.
#[test]
fn version_4_is_read() {
    assert_eq!(VmRecord::decode(include_bytes!("fixtures/record-4.json")).unwrap(), full());
}

#[test]
fn every_older_version_has_its_migration() {
    for version in 1..RECORD_VERSION {
        assert!(std::path::Path::new(&format!("tests/fixtures/record-{version}.json")).exists(), "version {version}");
    }
    let error = VmRecord::decode(br#"{"version":0}"#).unwrap_err();
    assert_eq!(error.kind(), Kind::Corrupt);
}

#[test]
fn a_newer_one_is_refused_whatever_it_holds() {
    for text in [
        format!(r#"{{"version":{}}}"#, RECORD_VERSION + 1),
        format!(r#"{{"version":{},"id":[1,2],"phase":"dreaming"}}"#, RECORD_VERSION + 41),
    ] {
        let error = VmRecord::decode(text.as_bytes()).unwrap_err();
        assert_eq!(error.kind(), Kind::Unsupported);
        assert!(error.chain().contains("newer than this server's"), "{}", error.chain());
        assert!(error.next_step().unwrap().contains("newer"), "{:?}", error.next_step());
    }
}

/// Why, and where from, is there in quarantine and only there.
#[test]
fn a_quarantined_one_says_why() {
    let record = full();
    let quarantined = record.quarantined("a stranger is in its cgroup".to_owned(), record.phase_since);
    assert_eq!(VmRecord::decode(&quarantined.encode().unwrap()).unwrap(), quarantined);
    assert_eq!(quarantined.released(record.phase_since), record);
    for (phase, quarantine) in [(Phase::Quarantined, None), (Phase::Running, quarantined.quarantine.clone())] {
        let error = VmRecord::decode(&VmRecord { phase, quarantine, ..record.clone() }.encode().unwrap()).unwrap_err();
        assert_eq!(error.kind(), Kind::Corrupt);
    }
}

#[test]
fn damage_is_said_and_never_guessed_at() {
    let good = String::from_utf8(full().encode().unwrap()).unwrap();
    let bad = [
        String::new(),
        "null".to_owned(),
        "[]".to_owned(),
        "{}".to_owned(),
        good[..good.len() / 2].to_owned(),
        good.replace("\"failed\"", "\"dreaming\""),
        good.replace("\"vcpus\":1", "\"vcpus\":0"),
        good.replace("\"name\":\"web\"", "\"name\":\"../web\""),
        good.replace("\"disk_made\":true,", ""),
        good.replace("\"intent_by\":\"uid=1000\",", ""),
    ];
    for text in bad {
        let error = VmRecord::decode(text.as_bytes()).unwrap_err();
        assert_eq!(error.kind(), Kind::Corrupt, "{text}");
        assert!(error.chain().len() > "VM record: not readable: ".len(), "the cause is there: {}", error.chain());
    }
}

#[test]
fn a_machines_name_reads_back() {
    let id = full().machine();
    assert_eq!(id.to_string().parse::<MachineId>().unwrap(), id);
    for bad in ["", "-", "aaaaaaaaaaaaaaaa", "aaaaaaaaaaaaaaaa-", "aaaaaaaaaaaaaaaa-x", "AAAAAAAAAAAAAAAA-1", "a-1"] {
        assert!(bad.parse::<MachineId>().is_err(), "{bad}");
    }
}
