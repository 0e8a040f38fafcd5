//! `exec`: exit codes, streams, signals.

use std::io::{Read as _, Write as _};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::fake::Fake;
use crate::fake::guest::Exec;
use crate::{ended, eventually, kill, run_with};

#[test]
fn the_exit_code_inside_is_the_exit_code_outside() {
    let fake = Fake::with_vm();
    for (command, code) in [
        (&["exit", "0"][..], 0),
        (&["exit", "7"], 7),
        (&["exit", "255"], 255),
        (&["die", "9"], 137),
        (&["die", "15"], 143),
        (&["late"], 124),
        (&["nosuch"], 127),
        (&["/etc"], 126),
        (&["huge"], 126),
        (&["badcwd"], 126),
        (&["baduser"], 125),
        (&["full"], 125),
    ] {
        let args = [&["exec", "web", "--"][..], command].concat();
        assert_eq!(fake.run(&args).code, Some(code), "{command:?}");
    }
    assert_eq!(fake.run(&["exec", "nobody", "--", "true"]).code, Some(125));
}

#[test]
fn what_cannot_run_is_explained() {
    let fake = Fake::with_vm();
    let said = |program| fake.run(&["exec", "web", "--", program]).err;
    insta::assert_snapshot!(["nosuch", "/etc", "huge", "badcwd", "baduser", "full", "late"].map(said).concat(), @r#"
error: VM web: nosuch: not found
  hint: is it installed in the image, and in the PATH there?
error: VM web: /etc: cannot be executed
  cause: /etc: is a directory
error: VM web: huge: its arguments and environment are too long
  cause: E2BIG
  hint: Linux takes 128 KiB in one argument and about 2 MiB in all: pass more through standard input
error: VM web: badcwd: its working directory cannot be used
  cause: /nowhere: no such directory
  hint: see --workdir
error: VM web: baduser: its user is unknown
  cause: no user "bob" in /etc/passwd
  hint: see --user
error: VM web: full: the guest has no room for it
  cause: no memory
clawpot: the command was killed: its --timeout is over
"#);
}

#[test]
fn streams_are_kept_apart() {
    let ran = Fake::with_vm().run(&["exec", "web", "both"]);
    assert_eq!((ran.code, ran.out.as_str(), ran.err.as_str()), (Some(0), "to stdout\n", "to stderr\n"));
}

#[test]
fn options_reach_the_process() {
    let fake = Fake::with_vm();
    let mut command = fake.clawpot(&[
        "exec",
        "-e",
        "A=b=c",
        "-e",
        "FROM_HERE",
        "-w",
        "/tmp",
        "-u",
        "bob:staff",
        "--timeout",
        "1500ms",
        "web",
        "--",
        "show",
    ]);
    command.env("FROM_HERE", "yes");
    let shown = String::from_utf8(command.output().unwrap().stdout).unwrap();
    insta::assert_snapshot!(shown, @r#"
env [("A", "b=c"), ("FROM_HERE", "yes")]
cwd "/tmp"
user "bob:staff"
timeout 1500
stdin true
tty false
size None
"#);
}

#[test]
fn sixty_four_mib_come_back_as_they_went() {
    let fake = Fake::with_vm();
    let input: Vec<u8> = (0..64u32 << 20).map(|i| u8::try_from((i / 7 + i / 65_537) % 251).unwrap()).collect();
    let mut child = fake.clawpot(&["exec", "web", "--", "cat"]).stdin(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let start = Instant::now();
    let (sent, back) = std::thread::scope(|scope| {
        let feeder = scope.spawn(|| stdin.write_all(&input).map(|()| drop(stdin)));
        let mut back = Vec::with_capacity(input.len());
        child.stdout.take().unwrap().read_to_end(&mut back).unwrap();
        (feeder.join().unwrap(), back)
    });
    sent.unwrap();
    println!("64 MiB there and back in {:?}", start.elapsed());
    assert!(back == input, "{} of {} bytes", back.len(), input.len());
    assert_eq!(ended(child).code, Some(0));
}

#[test]
fn a_process_without_input_gets_none() {
    let fake = Fake::with_vm();
    assert_eq!(run_with(fake.clawpot(&["exec", "web", "--", "cat"]), b"").code, Some(0));
    // A file is as good as a pipe.
    assert_eq!(fake.run(&["exec", "web", "--", "cat"]).code, Some(0));
}

#[test]
fn a_process_that_ends_early_leaves_its_input_unread() {
    let fake = Fake::with_vm();
    let ran = run_with(fake.clawpot(&["exec", "web", "--", "exit", "3"]), &vec![b'x'; 8 << 20]);
    assert_eq!(ran.code, Some(3));
}

#[test]
fn signals_are_forwarded() {
    let fake = Fake::with_vm();
    for (signal, number) in [(Signal::INT, 2), (Signal::TERM, 15), (Signal::HUP, 1), (Signal::USR1, 10)] {
        let mut child = fake.clawpot(&["exec", "web", "--", "sleep"]).spawn().unwrap();
        fake.until_attached(&mut child);
        kill(&child, signal);
        assert_eq!(ended(child).code, Some(128 + number));
        fake.state.guest.execs.lock().unwrap().clear();
    }
}

/// Until two came within the 2 s in which the second is meant: this test may be kept waiting for longer than that.
fn interrupt_again(child: &Child, exec: &Exec) {
    eventually("the second ends it", || {
        kill(child, Signal::INT);
        exec.inner.lock().unwrap().hung_up
    });
}

#[test]
fn a_second_interrupt_hangs_up() {
    let fake = Fake::with_vm();
    let mut child = fake.clawpot(&["exec", "web", "--", "stubborn"]).spawn().unwrap();
    fake.until_attached(&mut child);
    kill(&child, Signal::INT);
    let exec = fake.state.guest.only().unwrap();
    eventually("the first is forwarded", || exec.inner.lock().unwrap().signals == [2]);
    interrupt_again(&child, &exec);
    assert_eq!(ended(child).code, Some(130));
}

#[test]
fn a_reader_who_goes_ends_the_process() {
    let fake = Fake::with_vm();
    let mut child = fake.clawpot(&["exec", "web", "--", "yes"]).spawn().unwrap();
    let mut some = [0; 10];
    let mut stdout = child.stdout.take().unwrap();
    stdout.read_exact(&mut some).unwrap();
    drop(stdout);
    let ran = ended(child);
    // As a local `yes | head` would: 128 + SIGPIPE, and not a word.
    assert_eq!((ran.code, ran.err.as_str()), (Some(141), ""));
    let exec = fake.state.guest.only().unwrap();
    eventually("it is hung up", || exec.inner.lock().unwrap().hung_up);
}

#[test]
fn a_reader_who_pauses_stops_the_process_not_the_program() {
    let fake = Fake::with_vm();
    let mut child = fake.clawpot(&["exec", "web", "--", "yes"]).spawn().unwrap();
    eventually("it runs", || fake.state.guest.only().is_some());
    let exec = fake.state.guest.only().unwrap();
    let reached = || exec.inner.lock().unwrap().stdout.end();
    let mut before = 0;
    // What goes on writing although nobody reads comes there.
    while before == 0 || reached() > before {
        before = reached();
        assert!(before < 4 << 20, "{before} bytes are somewhere");
        std::thread::sleep(Duration::from_millis(300));
    }
    let memory = std::fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
    let peak = memory.lines().find(|line| line.starts_with("VmHWM")).unwrap().to_owned();
    println!("{peak}");
    // Signals still work: forwarded, then meant.
    kill(&child, Signal::INT);
    eventually("the first is forwarded", || exec.inner.lock().unwrap().signals == [2]);
    interrupt_again(&child, &exec);
    drop(child.stdout.take());
    assert_eq!(ended(child).code, Some(130));
}

#[test]
fn a_full_disk_ends_the_process_with_a_word() {
    let fake = Fake::with_vm();
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let child = fake.clawpot(&["exec", "web", "--", "yes"]).stdout(full).spawn().unwrap();
    let ran = ended(child);
    assert_eq!(ran.code, Some(125));
    assert!(ran.err.contains("No space left on device"), "{}", ran.err);
}
