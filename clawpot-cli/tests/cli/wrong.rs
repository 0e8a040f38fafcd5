//! Bad input and missing servers: a clear word, nothing sent, the right exit code.

use std::os::unix::net::UnixListener;

use crate::fake::Fake;
use crate::{Ran, clawpot, ended};

fn refused(args: &[&str]) -> String {
    // A server that would take anything: it must not be asked.
    let fake = Fake::with_vm();
    let ran = fake.run(args);
    assert_eq!((ran.code, ran.out.as_str()), (Some(2), ""), "{args:?}: {}", ran.err);
    assert!(fake.state.creates.lock().unwrap().is_empty());
    let first = ran.err.lines().next().unwrap_or_default().to_owned();
    format!(
        "{}\n  {first}\n",
        args.iter().map(|arg| arg.chars().take(40).collect::<String>()).collect::<Vec<_>>().join(" ")
    )
}

#[test]
fn bad_input_is_refused_in_the_servers_words() {
    let long = "n".repeat(300);
    let mut all = String::new();
    for value in ["0", "33", "257", "4294967297", "-1", "two"] {
        all.push_str(&refused(&["create", "debian", &format!("--cpus={value}")]));
    }
    for value in ["0", "1", "4294967296", "64K", "99999999999999999999", "1.5G"] {
        all.push_str(&refused(&["create", "debian", &format!("--memory={value}")]));
    }
    for value in ["0", "5T", "lots"] {
        all.push_str(&refused(&["create", "debian", &format!("--disk={value}")]));
    }
    for value in ["", "a/b", "1st", "Web", long.as_str()] {
        all.push_str(&refused(&["create", "debian", &format!("--name={value}")]));
    }
    for image in ["", "../etc/passwd", "sha256:12"] {
        all.push_str(&refused(&["create", image]));
    }
    for args in [
        &["create", "debian", "--label", "novalue"][..],
        &["create", "debian", "-l", "a=1", "-l", "a=2"],
        &["create", "debian", "-e", "SURELY_NOT_SET_ANYWHERE"],
        &["create", "debian", "-e", "=x"],
        &["create", "debian", "-u", ""],
        &["create", "debian", "--workdir="],
        &["exec", "web", "--timeout", "0", "--", "true"],
        &["exec", "web", "--timeout", "soon", "--", "true"],
        &["exec", "web"],
        &["run", "debian"],
        &["logs", "web", "--tail", "0"],
        &["wait", "web", "--for", "happiness"],
        &["create", "debian", "--cpus", "-1"],
        &["exec", "web", "--timeout", "-1", "--", "true"],
        &["exec", "web", "-u", "", "--", "true"],
        &["rm"],
        &["frobnicate"],
    ] {
        all.push_str(&refused(args));
    }
    insta::assert_snapshot!("bad-input", all);
}

fn without_server(socket: &std::path::Path, args: &[&str]) -> Ran {
    let mut command = clawpot(args);
    let mut ran: Ran = command.env("CLAWPOT_SOCKET", socket).output().unwrap().into();
    ran.err = ran.err.replace(&*socket.parent().unwrap().to_string_lossy(), "DIR");
    ran
}

#[test]
fn a_missing_server_says_where_it_was_looked_for() {
    let dir = tempfile::tempdir().unwrap();
    let absent = without_server(&dir.path().join("api.sock"), &["ls"]);
    assert_eq!(absent.code, Some(1));
    insta::assert_snapshot!("server-absent", absent.err);

    let dead = dir.path().join("dead.sock");
    drop(UnixListener::bind(&dead).unwrap());
    let run = without_server(&dead, &["run", "debian", "--", "true"]);
    assert_eq!(run.code, Some(125));
    insta::assert_snapshot!("server-dead", run.err);

    let file = dir.path().join("file");
    std::fs::write(&file, "").unwrap();
    insta::assert_snapshot!("server-file", without_server(&file, &["exec", "web", "--", "true"]).err);

    let long = dir.path().join("x".repeat(200));
    assert!(without_server(&long, &["ls"]).err.starts_with("error: server on"));
    let version = without_server(&dead, &["version"]);
    assert_eq!(version.code, Some(0));
    assert!(version.out.contains("the socket exists but no server answers on it"), "{}", version.out);
}

/// One that hangs takes connections and says nothing.
#[test]
fn a_server_that_hangs_is_not_waited_for_by_who_asks_how_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let mute = dir.path().join("mute.sock");
    let _listening = UnixListener::bind(&mute).unwrap();
    let asked = ["version", "doctor"].map(|verb| clawpot(&[verb]).env("CLAWPOT_SOCKET", &mute).spawn().unwrap());
    for ran in asked.map(ended) {
        assert!(ran.out.contains("did not answer within 5s"), "{}{}", ran.out, ran.err);
    }
}

/// The option is at fault, not a variable that stands beside it.
#[test]
fn usage_shows_what_is_typed() {
    let mut command = clawpot(&["stop"]);
    let ran: Ran = command.env("CLAWPOT_SOCKET", "/nowhere").output().unwrap().into();
    assert!(ran.err.contains("Usage: clawpot stop <VM>...\n"), "{}", ran.err);
}

#[test]
fn the_servers_causes_and_hints_are_shown() {
    let fake = Fake::start();
    let ran = fake.run(&["create", "unknown"]);
    assert_eq!(ran.code, Some(1));
    insta::assert_snapshot!(ran.err, @r#"
error: image "unknown": creating a VM of it
  cause: no image has this name
  hint: `clawpot image ls` lists the images
"#);
    assert_eq!(fake.run(&["run", "unknown", "--", "true"]).code, Some(125));
}
