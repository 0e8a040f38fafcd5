//! `doctor` on whatever host the tests run: it must work without a server, and its JSON must keep its shape.

use crate::fake::Fake;
use crate::{Ran, clawpot};

const CHECKS: [&str; 26] = [
    "server",
    "kvm",
    "qemu",
    "firecracker",
    "jailer",
    "tun",
    "modules",
    "cgroup",
    "one filesystem",
    "space",
    "e2fsprogs",
    "unpacking",
    "nft",
    "foreign rules",
    "ip_forward",
    "routes",
    "user ids",
    "paths",
    "swap",
    "ksm",
    "smt",
    "cpu flaws",
    "memory",
    "kvm timers",
    "kvm start",
    "host console",
];

fn findings(ran: &Ran) -> Vec<serde_json::Value> {
    let checks: Vec<serde_json::Value> = serde_json::from_str(&ran.out).unwrap();
    let failed = checks.iter().any(|check| check["level"] == "fail");
    assert_eq!(ran.code, Some(i32::from(failed)), "{}", ran.out);
    checks
}

#[test]
fn every_check_says_something_without_a_server() {
    let ran: Ran = clawpot(&["doctor", "-o", "json", "--socket", "/nonexistent"]).output().unwrap().into();
    let checks = findings(&ran);
    assert_eq!(checks.iter().map(|check| check["check"].as_str().unwrap()).collect::<Vec<_>>(), CHECKS);
    assert_eq!(checks[0]["level"], "unknown");
    for check in &checks {
        assert!(!check["found"].as_str().unwrap().is_empty());
        assert_eq!(check["fix"].is_null(), check["level"] == "ok", "{check}");
    }
}

#[test]
fn the_servers_probe_is_heard() {
    let fake = Fake::start();
    let checks = findings(&fake.run(&["doctor", "-o", "json"]));
    assert_eq!(checks[0]["found"], format!("version {}, VMs run on qemu 7.2.22", env!("CARGO_PKG_VERSION")));
    let kvm = checks[1]["found"].as_str().unwrap();
    assert!(!kvm.contains("API 12") || kvm.contains("the server says: no /dev/kvm on this host"), "{kvm}");
    let table = fake.run(&["doctor"]);
    assert!(table.out.starts_with("RESULT"), "{}", table.out);
}
