//! A server that is killed under a running `exec`.

use std::io::{Read as _, Write as _};
use std::process::{Child, Stdio};
use std::time::Duration;

use rustix::process::Signal;

use crate::fake::Fake;
use crate::fake::guest::Inner;
use crate::{ended, eventually, kill, line_of};

fn started(fake: &Fake, args: &[&str]) -> Child {
    let mut child = fake.clawpot(args).stdin(Stdio::piped()).spawn().unwrap();
    fake.until_attached(&mut child);
    child
}

fn guest<T>(fake: &Fake, act: impl FnOnce(&mut Inner) -> T) -> T {
    fake.state.guest.only().unwrap().with(act)
}

#[test]
fn nothing_is_missed_and_nothing_comes_twice() {
    let mut fake = Fake::with_vm();
    let mut child = started(&fake, &["exec", "web", "--", "cat"]);
    let mut stdin = child.stdin.take().unwrap();
    let mut stdout = child.stdout.take().unwrap();
    let input: Vec<u8> = (0..24u32 << 20).map(|i| u8::try_from(i % 249).unwrap()).collect();
    let want = input.clone();
    // A part for each loss of the server, and one for after the last: it does not end before.
    let (go_on, told) = std::sync::mpsc::channel();
    let feeder = std::thread::spawn(move || {
        for part in input.chunks(input.len().div_ceil(5)) {
            told.recv().unwrap();
            stdin.write_all(part).unwrap();
        }
    });
    let reader = std::thread::spawn(move || {
        let mut back = Vec::new();
        stdout.read_to_end(&mut back).unwrap();
        back
    });
    for _ in 0..4 {
        let before = guest(&fake, |inner| inner.stdout.end());
        go_on.send(()).unwrap();
        eventually("it goes on", || guest(&fake, |inner| inner.stdout.end() > before + (2 << 20)));
        fake.kill();
        std::thread::sleep(Duration::from_millis(50));
        fake.revive();
    }
    go_on.send(()).unwrap();
    feeder.join().unwrap();
    let ran = ended(child);
    assert_eq!(ran.code, Some(0), "{}", ran.err);
    assert!(reader.join().unwrap() == want);
    assert!(ran.err.contains("the server is gone") && ran.err.contains("attached again"), "{}", ran.err);
}

#[test]
fn output_that_left_the_ring_is_reported_with_its_bytes() {
    let mut fake = Fake::with_vm();
    let mut child = started(&fake, &["exec", "web", "--", "stubborn"]);
    guest(&fake, |inner| inner.stdout.kept.extend(b"first"));
    let mut first = [0; 5];
    child.stdout.as_mut().unwrap().read_exact(&mut first).unwrap();
    fake.kill();
    guest(&fake, |inner| {
        inner.stdout.kept.extend(b"while nobody looked, the last");
        inner.stdout.forget_below(6 + 21);
        inner.stderr.kept.extend(b"kept\n");
        inner.ended = Some(clawpot_common::v1::exec_exited::End::Code(5));
    });
    fake.revive();
    let ran = ended(child);
    assert_eq!((ran.code, ran.out.as_str()), (Some(5), "the last"));
    insta::assert_snapshot!(ran.err, @r#"
clawpot: the server is gone; looking for it for 60 s (--reconnect-timeout)
clawpot: attached again
clawpot: 21 bytes of stdout are lost (bytes 6 to 27): they had left the buffer before this program could fetch them
kept
"#);
}

#[test]
fn it_gives_up_when_its_time_is_over() {
    let mut fake = Fake::with_vm();
    // The last try is made 0.95 s before that is over: it ends by itself, with the reason that is asked for here.
    let child = started(&fake, &["exec", "web", "--reconnect-timeout", "2500ms", "--", "stubborn"]);
    fake.kill();
    let ran = ended(child);
    assert_eq!(ran.code, Some(125));
    assert!(ran.err.contains("error: VM web: stubborn: staying attached: the connection"), "{}", ran.err);
}

#[test]
fn who_is_tired_of_waiting_may_leave() {
    let mut fake = Fake::with_vm();
    let mut child = started(&fake, &["exec", "web", "--", "stubborn"]);
    fake.kill();
    assert!(line_of(child.stderr.as_mut().unwrap()).contains("the server is gone"));
    kill(&child, Signal::INT);
    let ran = ended(child);
    assert_eq!(ran.code, Some(130));
    assert!(ran.err.contains("may still run"), "{}", ran.err);
}

#[test]
fn an_exec_that_the_guest_forgot_is_an_error() {
    let mut fake = Fake::with_vm();
    let child = started(&fake, &["exec", "web", "--", "stubborn"]);
    fake.kill();
    fake.state.guest.execs.lock().unwrap().clear();
    fake.revive();
    let ran = ended(child);
    assert_eq!(ran.code, Some(125));
    assert!(ran.err.contains("the guest no longer knows it"), "{}", ran.err);
}

#[test]
fn a_vm_that_is_gone_is_an_error() {
    let mut fake = Fake::with_vm();
    let child = started(&fake, &["exec", "web", "--", "stubborn"]);
    fake.kill();
    fake.state.vms.lock().unwrap().clear();
    fake.revive();
    let ran = ended(child);
    assert_eq!(ran.code, Some(125));
    assert!(ran.err.contains("not found"), "{}", ran.err);
}
