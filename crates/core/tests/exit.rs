//! How a run ended, whole: each reason with what follows under each policy, and what a console tells of it.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use clawpot_core::exit::Cause;
use clawpot_core::plan::{Limits, Why};
use clawpot_core::{Desired, LastWords, Phase, Reason, Restart, RestartPolicy, VmmEnd};
use clawpot_types::{Error, Incarnation, Kind, Retry};

#[test]
fn the_table_is_this() {
    let mut table = String::new();
    for reason in Reason::ALL {
        table.push_str(&format!("{reason}\n"));
        for policy in RestartPolicy::ALL {
            let mut record = support::record();
            record.phase = Phase::Running;
            record.incarnation = Incarnation(1);
            record.restart = Restart::new(policy);
            let cause = Cause { reason, by: "guest", message: "it was so".to_owned(), retry: Retry::Later };
            let next = record.ended(&cause, support::START, &Limits::default());
            let again = match next.restart.at {
                Some(at) => format!("started again in {} s", at.since(support::START).as_secs()),
                None => "rests".to_owned(),
            };
            let wanted = match next.desired {
                Desired::Running => "running",
                Desired::Stopped => "stopped",
                Desired::Deleted => "deleted",
            };
            table.push_str(&format!("  {:<10} {:<8} {wanted} wanted, {again}\n", policy.as_str(), next.phase.as_str()));
        }
    }
    insta::assert_snapshot!(table);
}

#[test]
fn what_repeating_cannot_help_is_not_repeated() {
    let mut record = support::record();
    record.phase = Phase::Preparing;
    record.incarnation = Incarnation(1);
    record.restart = Restart::new(RestartPolicy::Always);
    let again = |cause: &Cause| record.ended(cause, support::START, &Limits::default()).restart.at.is_some();
    for (kind, expected) in [
        (Kind::Unavailable, true),
        (Kind::Exhausted, true),
        (Kind::Internal, true),
        (Kind::Corrupt, false),
        (Kind::NotFound, false),
        (Kind::Unsupported, false),
    ] {
        assert_eq!(again(&Cause::step(&Error::new(kind, "a step"))), expected, "{kind:?}");
    }
    assert!(!again(&Cause::of(&Why::DiskVanished)));
    assert!(again(&Cause::of(&Why::VmmExited(VmmEnd::Signal(9)))));
}

#[test]
fn what_is_known_first_stands() {
    let mut record = support::record();
    assert!(!record.note_exit(Reason::Stopped, "uid=0", "stopped".to_owned(), support::START), "nothing ran");
    record.incarnation = Incarnation(1);
    assert!(record.note_exit(Reason::VmmDied, "host", "killed by signal 9".to_owned(), support::START));
    assert!(!record.note_wish(Reason::Deleted, support::START));
    assert_eq!(record.exit.as_ref().unwrap().reason, Reason::VmmDied);
    record.incarnation = Incarnation(2);
    assert!(record.note_wish(Reason::Deleted, support::START));
    assert_eq!(record.exit.unwrap().message, "deleted by uid=1000");
}

#[test]
fn a_console_tells_how_its_guest_ended() {
    let of = |lines: &[&str]| LastWords::of(&lines.iter().map(|&line| line.to_owned()).collect::<Vec<_>>());
    assert_eq!(of(&[]), LastWords::Nothing);
    assert_eq!(of(&["agent: listening", "[   12.1] reboot: Restarting system"]), LastWords::Down);
    assert_eq!(of(&["[   12.1] reboot: Power down"]), LastWords::Down);
    let panic = "[    3.5] Kernel panic - not syncing: sysrq triggered crash";
    let told = LastWords::Panic("Kernel panic - not syncing: sysrq triggered crash".to_owned());
    assert_eq!(of(&[panic, "CPU: 0 PID: 1 Comm: sh", "Call Trace:", "Rebooting in 1 seconds.."]), told);
    assert_eq!(of(&[panic, "--- boot 2 ---", "agent: listening"]), LastWords::Nothing, "another boot's");
    assert_eq!(of(&["--- boot 2 ---", "[ 1.0] reboot: Restarting system"]), LastWords::Down);
    let long = format!("{panic}{}", "x".repeat(10_000));
    assert!(matches!(of(&[&long]), LastWords::Panic(words) if words.chars().count() == 200));
}
