//! What is shown, as tables and as JSON.

use clawpot_common::v1::{Exit, Failure, Phase, RestartPolicy};
use rustix::process::Signal;

use crate::fake::vms::{broken, vm};
use crate::fake::{Fake, rest_event};
use crate::{Ran, ended, eventually, kill, line_of};

/// Times that differ from run to run.
pub fn steady(text: &str) -> String {
    let mut steady = String::new();
    for line in text.replace(env!("CARGO_PKG_VERSION"), "VERSION").lines() {
        let line = match line.split_once("_at\": \"") {
            Some((key, rest)) => format!("{key}_at\": \"TIME\"{}", if rest.ends_with(',') { "," } else { "" }),
            None => line.to_owned(),
        };
        steady.push_str(&line);
        steady.push('\n');
    }
    steady
}

fn three() -> Fake {
    let fake = Fake::with_vm();
    fake.state.put(vm("db", "debian"));
    let mut failed = vm("broken", "debian");
    let soon = |seconds| Some((std::time::SystemTime::now() + std::time::Duration::from_secs(seconds)).into());
    (failed.ttl_ms, failed.expires_at) = (7_200_000, soon(3_630));
    (failed.restart_attempts, failed.restart_at) = (3, soon(130));
    failed.restart = RestartPolicy::RestartOnFailure.into();
    failed.desired_by = "uid=1000".into();
    failed.last_exit = Some(Exit {
        reason: clawpot_common::v1::exit::Reason::BootTimeout.into(),
        by: "server".into(),
        message: "its guest did not answer within 60 s".into(),
        incarnation: 1,
        at: failed.phase_changed_at,
    });
    (failed.phase, failed.failure) = (Phase::Failed.into(), Some(broken()));
    failed.labels.clear();
    failed.address.clear();
    fake.state.put(failed);
    fake
}

fn shown(fake: &Fake, args: &[&str]) -> String {
    let ran = fake.run(args);
    assert_eq!((ran.code, ran.err.as_str()), (Some(0), ""), "{args:?}");
    ran.out
}

#[test]
fn tables() {
    let fake = three();
    insta::assert_snapshot!("ls", shown(&fake, &["ls"]));
    insta::assert_snapshot!("inspect", shown(&fake, &["inspect", "web"]));
    insta::assert_snapshot!("inspect-failed", shown(&fake, &["inspect", "broken"]));
    insta::assert_snapshot!("host", steady(&shown(&fake, &["host"])));
    assert!(shown(&fake, &["image", "ls"]).contains("debian  abababababab  350 MiB  erofs"));
    assert!(shown(&fake, &["image", "ls"]).contains("torn    -             -        unreadable"));
    assert_eq!(shown(&Fake::start(), &["ls"]), "NAME  ID  PHASE  IMAGE  CPUS  MEMORY  ADDRESS  AGE\n");
}

#[test]
fn json() {
    let fake = three();
    insta::assert_snapshot!("inspect-json", steady(&shown(&fake, &["-o", "json", "inspect", "broken"])));
    insta::assert_snapshot!("host-json", steady(&shown(&fake, &["host", "-o", "json"])));
    insta::assert_snapshot!("image-json", steady(&shown(&fake, &["image", "ls", "-o", "json"])));
    insta::assert_snapshot!("version-json", steady(&shown(&fake, &["version", "-o", "json"])));
    let all: serde_json::Value = serde_json::from_str(&shown(&fake, &["ls", "-o", "json"])).unwrap();
    assert_eq!(all.as_array().unwrap().len(), 3);
    assert_eq!(shown(&Fake::start(), &["ls", "-o", "json"]), "[]\n");
}

#[test]
fn lists_can_be_narrowed() {
    let fake = three();
    assert_eq!(shown(&fake, &["ls", "-q"]), "broken0000000000\ndb00000000000000\nweb0000000000000\n");
    assert_eq!(shown(&fake, &["ls", "-q", "-l", "team=red"]), "db00000000000000\nweb0000000000000\n");
    assert_eq!(shown(&fake, &["ls", "-q", "-l", "team=blue"]), "");
}

#[test]
fn names_and_prefixes_are_the_servers_to_resolve() {
    let fake = three();
    for given in ["web", "web0", "web0000000000000"] {
        assert!(shown(&fake, &["inspect", given]).contains("web0000000000000"), "{given}");
    }
    let ran = fake.run(&["inspect", "nobody"]);
    assert_eq!(ran.code, Some(1));
    insta::assert_snapshot!(ran.err, @r#"
error: VM "nobody": not found
  hint: `clawpot ls` lists the VMs
"#);
}

#[test]
fn colours_are_for_terminals_unless_wished_for() {
    let fake = three();
    let coloured = |args: &[&str], no_color: bool| {
        let mut command = fake.clawpot(args);
        if no_color {
            command.env("NO_COLOR", "1");
        }
        let ran: Ran = command.output().unwrap().into();
        format!("{}{}", ran.out, ran.err).contains('\x1b')
    };
    assert!(!coloured(&["ls"], false));
    assert!(coloured(&["ls", "--color", "always"], false));
    assert!(coloured(&["inspect", "nobody", "--color=always"], true));
    assert!(!coloured(&["ls", "--color", "never"], false));
    assert!(!coloured(&["ls"], true));
}

#[test]
fn a_closed_pipe_is_success() {
    let fake = Fake::start();
    for n in 0..2_000 {
        fake.state.vms.lock().unwrap().insert(format!("{n:016}"), vm(&format!("vm-{n}"), "debian"));
    }
    for args in [&["ls"][..], &["ls", "-o", "json"], &["ls", "-q"], &["events"], &["completions", "bash"]] {
        let mut child = fake.clawpot(args).spawn().unwrap();
        drop(child.stdout.take());
        let ran = ended(child);
        assert_eq!((ran.code, ran.err.as_str()), (Some(0), ""), "{args:?}");
    }
}

#[test]
fn a_full_disk_is_not() {
    let fake = three();
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let ran: Ran = fake.clawpot(&["ls"]).stdout(full).output().unwrap().into();
    assert_eq!(ran.code, Some(1));
    assert!(ran.err.contains("No space left on device"), "{}", ran.err);
}

#[test]
fn events_are_listed_and_followed_across_a_restart() {
    let mut fake = Fake::with_vm();
    *fake.state.events.lock().unwrap() = (1..=5).map(|id| rest_event(id, &format!("event {id}"))).collect();
    insta::assert_snapshot!("events", shown(&fake, &["events"]));
    insta::assert_snapshot!("events-json", shown(&fake, &["events", "web", "-o", "json"]));

    let mut child = fake.clawpot(&["events", "-f", "-o", "json"]).spawn().unwrap();
    let mut next = || {
        let line = line_of(child.stdout.as_mut().unwrap());
        serde_json::from_str::<serde_json::Value>(&line).unwrap()["id"].as_u64().unwrap()
    };
    assert_eq!([next(), next(), next(), next(), next()], [1, 2, 3, 4, 5]);
    fake.kill();
    // Two of one change have its revision as their id, both.
    fake.state.events.lock().unwrap().extend([rest_event(6, "while it was away"), rest_event(6, "why")]);
    fake.revive();
    assert_eq!([next(), next()], [6, 6]);
    fake.kill();
    fake.state.events.lock().unwrap().extend([rest_event(7, "one"), rest_event(7, "two"), rest_event(8, "three")]);
    fake.revive();
    assert_eq!([next(), next(), next()], [7, 7, 8]);
    kill(&child, Signal::INT);
    let ran = ended(child);
    assert_eq!((ran.code, ran.out.as_str()), (Some(0), ""));
}

#[test]
fn logs_are_shown_and_followed_across_a_restart() {
    let mut fake = Fake::with_vm();
    let line = |n: u32| format!("[{n:5}] line\r\n");
    fake.state.console.lock().unwrap().extend((0..200).map(line).collect::<String>().bytes());
    assert!(shown(&fake, &["logs", "web"]).ends_with("[  199] line\r\n"));
    assert_eq!(shown(&fake, &["logs", "web", "--tail", "2"]), "[  198] line\r\n[  199] line\r\n");

    let mut child = fake.clawpot(&["logs", "-f", "-n", "1", "web"]).spawn().unwrap();
    assert_eq!(line_of(child.stdout.as_mut().unwrap()), line(199));
    fake.kill();
    fake.state.console.lock().unwrap().extend((200..203).map(line).collect::<String>().bytes());
    fake.revive();
    for n in 200..203 {
        assert_eq!(line_of(child.stdout.as_mut().unwrap()), line(n));
    }
    kill(&child, Signal::INT);
    let ran = ended(child);
    assert_eq!((ran.code, ran.out.as_str()), (Some(0), ""));
}

#[test]
fn stop_start_and_rm_wait_until_it_is_done() {
    let fake = three();
    assert_eq!(shown(&fake, &["stop", "web", "--grace", "1500ms"]), "web\n");
    assert_eq!(fake.state.stops.lock().unwrap()[0].grace_ms, 1_500);
    assert_eq!(fake.state.find("web").unwrap().phase(), Phase::Stopped);
    assert_eq!(shown(&fake, &["start", "web"]), "web\n");
    assert_eq!(fake.state.find("web").unwrap().phase(), Phase::Running);
    // It had failed before: that is not the outcome of this start.
    assert_eq!(shown(&fake, &["start", "broken"]), "broken\n");
    assert_eq!(shown(&fake, &["rm", "web", "db"]), "web\ndb\n");
    assert_eq!(shown(&fake, &["ls", "-q"]), "broken0000000000\n");
    let ran = fake.run(&["rm", "web", "broken", "--force"]);
    assert_eq!((ran.code, ran.out.as_str()), (Some(1), "broken\n"));
    assert!(ran.err.starts_with("error: VM \"web\": not found"), "{}", ran.err);
    assert!(fake.state.deletes.lock().unwrap().last().unwrap().force);
}

#[test]
fn a_time_to_live_is_set_and_taken_away() {
    let fake = three();
    assert_eq!(shown(&fake, &["ttl", "web", "90m"]), "web\n");
    assert_eq!(fake.state.find("web").unwrap().ttl_ms, 5_400_000);
    assert_eq!(shown(&fake, &["ttl", "web", "never"]), "web\n");
    assert_eq!(fake.state.find("web").unwrap().ttl_ms, 0);
    for bad in ["0", "-1", "soon", "5y"] {
        let ran = fake.run(&["ttl", "web", "--", bad]);
        assert!(ran.code == Some(2) && ran.err.contains("or `never`"), "{bad}: {}", ran.err);
    }
    shown(&fake, &["create", "debian", "--name", "short", "--ttl", "1h", "--restart", "on-failure"]);
    let asked = fake.state.creates.lock().unwrap().pop().unwrap();
    assert_eq!((asked.ttl_ms, asked.restart()), (3_600_000, RestartPolicy::RestartOnFailure));
}

#[test]
fn wait_ends_with_the_phase_the_failure_or_the_time() {
    let fake = Fake::with_vm();
    assert_eq!(fake.run(&["wait", "web"]).code, Some(0));
    let late = fake.run(&["wait", "web", "--for", "stopped", "--timeout", "100ms"]);
    assert_eq!((late.code, late.err.as_str()), (Some(124), "error: VM web: not stopped within 100ms\n"));
    let mut child = fake.clawpot(&["wait", "web", "--for", "gone"]).spawn().unwrap();
    std::thread::sleep(std::time::Duration::from_millis(100));
    assert!(child.try_wait().unwrap().is_none());
    shown(&fake, &["rm", "web", "--no-wait"]);
    assert_eq!(ended(child).code, Some(0));
    assert_eq!(fake.run(&["wait", "web", "--for", "gone"]).code, Some(0));
    assert_eq!(fake.run(&["wait", "web"]).code, Some(1));
}

#[test]
fn a_failure_is_told_with_its_console() {
    let fake = Fake::start();
    let ran = fake.run(&["create", "broken", "--name", "broken", "--wait"]);
    assert_eq!((ran.code, ran.out.as_str()), (Some(1), ""));
    insta::assert_snapshot!(ran.err, @r#"
error: VM broken: it failed while booting
  cause: the guest did not say hello within 60 s
  | [    0.512] Kernel panic - not syncing: No working init found.
  | ^[[2Jpwned
  hint: look at the console: `clawpot logs broken`
"#);
    let cleanup = Failure { cleanup: "netns cp3f-7: unmounting it: busy".into(), hint: String::new(), ..broken() };
    let mut failed = vm("two", "debian");
    (failed.phase, failed.failure) = (Phase::Quarantined.into(), Some(cleanup));
    fake.state.put(failed);
    insta::assert_snapshot!(fake.run(&["wait", "two"]).err, @r#"
error: VM two: it is quarantined
  cause: the guest did not say hello within 60 s
  cause: and cleaning up failed too: netns cp3f-7: unmounting it: busy
  | [    0.512] Kernel panic - not syncing: No working init found.
  | ^[[2Jpwned
  hint: `clawpot logs two` shows its console
"#);
    eventually("it is listed", || shown(&fake, &["ls"]).contains("quarantined"));
}
