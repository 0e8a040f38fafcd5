//! A process dies at the hit it was armed for, and not before.

#![cfg(feature = "on")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;

use clawpot_failpoint::{Point, reached};

const CHILD: &str = "CLAWPOT_FAILPOINT_CHILD";

/// Run by [`a_process_dies_at_the_hit_it_was_armed_for`] in a process of its own.
#[test]
fn child() {
    if std::env::var_os(CHILD).is_some() {
        for _ in 0..3 {
            reached(Point::NetNamed);
            reached(Point::NetTaps);
        }
    }
}

/// The signal that ended it, and its hits.
fn run(directory: &Path, order: Option<&str>) -> (Option<i32>, Vec<String>) {
    drop(std::fs::remove_file(directory.join("hits")));
    if let Some(order) = order {
        #[expect(clippy::disallowed_methods, reason = "a test's own file")]
        std::fs::write(directory.join("armed"), order).unwrap();
    }
    #[expect(clippy::disallowed_methods, reason = "this test is about a process's death")]
    let mut child = std::process::Command::new(std::env::current_exe().unwrap());
    let child = child.args(["--exact", "child"]).env(CHILD, "1").env("CLAWPOT_FAILPOINTS", directory);
    let status = child.output().unwrap().status;
    let hits = std::fs::read_to_string(directory.join("hits")).unwrap();
    (status.signal(), hits.lines().map(str::to_owned).collect())
}

#[test]
fn a_process_dies_at_the_hit_it_was_armed_for() {
    let directory = std::env::temp_dir().join(format!("clawpot-failpoint-{}", std::process::id()));
    std::fs::create_dir(&directory).unwrap();
    let pair = ["net.named", "net.taps_made"];
    assert_eq!(run(&directory, None), (None, [pair, pair, pair].concat().into_iter().map(str::to_owned).collect()));
    let (signal, hits) = run(&directory, Some("net.taps_made 2\n"));
    assert_eq!((signal, hits.len()), (Some(9), 4));
    assert!(!directory.join("armed").exists(), "the next one would die too");
    assert_eq!(run(&directory, Some("net.named")).1, ["net.named"]);
    assert_eq!(run(&directory, Some("net.veth_made 1")).0, None);
    std::fs::remove_dir_all(directory).unwrap();
}

#[test]
fn names_are_unique_and_are_areas_points() {
    let names: std::collections::BTreeSet<_> = Point::ALL.iter().map(|point| point.name()).collect();
    assert_eq!(names.len(), Point::ALL.len());
    assert!(
        names.iter().all(|name| name.split_once('.').is_some_and(|(area, rest)| !area.is_empty() && !rest.is_empty()))
    );
}
