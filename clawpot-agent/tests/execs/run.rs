//! What runs, as whom, with what, and what is said when it cannot. Over real gRPC.

use std::path::Path;
use std::time::{Duration, Instant};

use crate::support::{Guest, LONG, guest, shell, start};
use bytes::Bytes;
use clawpot_common::v1::exec_failed::Reason;
use clawpot_common::v1::exec_input::Frame as In;
use clawpot_common::v1::exec_output::Frame as Out;
use clawpot_common::v1::{EnvVar, ExecSignal, ExecStart, TerminalSize};

async fn reason(guest: &Guest, start: ExecStart) -> (Option<Reason>, String) {
    let failed = guest.run(start).await.failed.unwrap_or_default();
    (Some(failed.reason()), failed.message)
}

#[tokio::test]
async fn streams_are_apart_and_the_code_is_the_programs() {
    let Some(guest) = guest().await else { return };
    let run = guest.run(shell("echo out; echo err >&2; exit 7")).await;
    assert_eq!((&run.stdout[..], &run.stderr[..], run.code()), (&b"out\n"[..], &b"err\n"[..], Some(7)));
    let exited = run.exited.unwrap();
    assert_eq!((exited.stdout_bytes, exited.stderr_bytes, exited.timed_out), (4, 4, false));
    assert!(exited.spawn_to_exit_us > 0);
}

#[tokio::test]
async fn a_signal_is_an_end_of_its_own() {
    let Some(guest) = guest().await else { return };
    assert_eq!(guest.run(shell("kill -TERM $$")).await.signal(), Some(15));
    let mut session =
        guest.open(In::Start(shell("trap 'echo caught; exit 3' USR1; echo ready; while :; do sleep 0.05; done"))).await;
    session.first_output().await;
    session.send(In::Signal(ExecSignal { number: libc::SIGUSR1 })).await;
    let run = session.finish().await;
    assert_eq!((run.text(), run.code()), ("caught\n".into(), Some(3)));
}

#[tokio::test]
async fn environment_directory_and_user() {
    let Some(guest) = guest().await else { return };
    let script = "echo $HOME $USER $LOGNAME $PATH $X; pwd; id -u; id -g; id -G";
    let variable = |name: &'static [u8], value: &'static [u8]| EnvVar {
        name: Bytes::from_static(name),
        value: Bytes::from_static(value),
    };
    let asked = ExecStart {
        cwd: "/tmp".into(),
        user: "4242:4243".into(),
        env: vec![variable(b"X", b"1"), variable(b"PATH", b"/bin:/usr/bin"), variable(b"X", b"2")],
        ..shell(script)
    };
    assert_eq!(guest.run(asked).await.text(), "/ 4242 4242 /bin:/usr/bin 2\n/tmp\n4242\n4243\n4243\n");
    let root = guest.run(ExecStart { cwd: String::new(), ..start(&["sh", "-c", "echo $HOME; pwd"]) }).await;
    assert_eq!(root.text(), "/root\n/root\n");
}

/// An image's working directory may be one that only root enters, and its commands be run as somebody else nevertheless.
#[tokio::test]
async fn a_named_directory_is_entered_whoever_the_user_is() {
    use std::os::unix::fs::DirBuilderExt;
    let Some(guest) = guest().await else { return };
    let own = guest.dir.path().join("roots-own");
    std::fs::DirBuilder::new().mode(0o700).create(&own).unwrap();
    let own = own.to_str().unwrap();
    let asked = ExecStart { cwd: own.into(), user: "4242:4243".into(), ..shell("pwd; id -u; ls || echo shut") };
    assert_eq!(guest.run(asked).await.text(), format!("{own}\n4242\nshut\n"));
}

#[tokio::test]
async fn the_child_inherits_nothing_of_the_agent() {
    let Some(guest) = guest().await else { return };
    let run = guest.run(shell("ls -l /proc/self/fd | grep -cE 'socket:|anon_inode:'; grep -E '^Sig(Blk|Ign)' /proc/self/status; cat /proc/self/cgroup")).await;
    let text = run.text();
    let mut lines = text.lines();
    // Neither the connection nor the runtime's epoll; what this test's own parent left open is not the agent's.
    assert_eq!(lines.next(), Some("0"));
    for line in lines.by_ref().take(2) {
        let (name, mask) = line.split_once(":\t").unwrap();
        let mask = u64::from_str_radix(mask, 16).unwrap();
        // What this test's own parent ignores is not the agent's; that Rust ignores SIGPIPE is.
        let ours = if name == "SigIgn" { mask & (1 << (libc::SIGPIPE - 1)) } else { mask };
        assert_eq!(ours, 0, "{line}");
    }
    assert!(text.contains("/exec-"), "{text}");
}

#[tokio::test]
async fn what_cannot_run_says_why() {
    let Some(guest) = guest().await else { return };
    let file = |name: &str, text: &str, mode: u32| {
        use std::os::unix::fs::PermissionsExt;
        let path = guest.dir.path().join(name);
        std::io::Write::write_all(&mut std::fs::File::create(&path).unwrap(), text.as_bytes()).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let plain = file("plain", "hello", 0o644);
    let binary = file("binary", "\u{7f}nonsense", 0o755);
    let script = file("script", "#!/nonexistent/interpreter\n", 0o755);
    for (asked, want, words) in [
        (start(&["no-such-program"]), Reason::NotFound, "not found in PATH"),
        (start(&["/no/such/program"]), Reason::NotFound, "no such file"),
        (start(&["/etc"]), Reason::NotExecutable, "is a directory"),
        (start(&[&plain]), Reason::NotExecutable, "permission denied"),
        (start(&[&binary]), Reason::NotExecutable, "not a program for this machine"),
        (start(&[&script]), Reason::NotExecutable, "interpreter"),
        (ExecStart { cwd: "/nonexistent".into(), ..shell("true") }, Reason::BadCwd, "/nonexistent"),
        (ExecStart { user: "no-such-user".into(), ..shell("true") }, Reason::BadUser, "no-such-user"),
        (ExecStart { exec_id: "../..".into(), ..shell("true") }, Reason::BadRequest, "exec id"),
        (start(&[]), Reason::BadRequest, "argv"),
    ] {
        let (got, message) = reason(&guest, asked).await;
        assert_eq!(got, Some(want), "{message}");
        assert!(message.contains(words), "{message}");
    }
    // The failed ones left neither process nor cgroup.
    assert_eq!(
        std::fs::read_dir(&guest.cgroups).unwrap().filter(|entry| entry.as_ref().unwrap().path().is_dir()).count(),
        0
    );
}

#[tokio::test]
async fn arguments_up_to_the_kernels_limits() {
    let Some(guest) = guest().await else { return };
    let (got, message) = reason(&guest, start(&["true", &"x".repeat(1 << 20)])).await;
    assert_eq!(got, Some(Reason::TooLong));
    assert!(message.contains("argv[1] is 1048576 bytes") && message.contains("131071"), "{message}");

    let one = "x".repeat(64 << 10);
    let mib = [&["sh", "-c", "echo $# ${#1}", "sh"][..], &[one.as_str(); 16]].concat();
    assert_eq!(guest.run(start(&mib)).await.text(), "16 65536\n");

    let over = [&["true"][..], &[one.as_str(); 100]].concat();
    let (got, message) = reason(&guest, start(&over)).await;
    assert_eq!(got, Some(Reason::TooLong));
    assert!(message.contains("bytes in all"), "{message}");
}

#[tokio::test]
async fn a_timeout_kills_a_tree_that_left_its_session() {
    let Some(guest) = guest().await else { return };
    let mark = guest.dir.path().join("alive");
    let script = format!(
        "setsid sh -c 'setsid sh -c \"while :; do date > {0}; sleep 0.02; done\" & sleep 1000' & sleep 1000",
        mark.display()
    );
    // On a busy machine the tree needs longer to stand.
    for timeout_ms in [400, 3000, 20_000] {
        let begun = Instant::now();
        let run = guest.run(ExecStart { timeout_ms, ..shell(&script) }).await;
        assert!(begun.elapsed() < LONG);
        assert!(run.exited.as_ref().unwrap().timed_out);
        assert_eq!(run.signal(), Some(9));
        if mark.exists() {
            break;
        }
    }
    assert!(mark.exists());
    // One that was killed while it opened the file makes it before it goes.
    guest.wait_for_no_process().await;
    std::fs::remove_file(&mark).unwrap();
    tokio::time::sleep(Duration::from_millis(150)).await;
    assert!(!mark.exists(), "a descendant lives on");
}

#[tokio::test]
async fn who_stays_in_the_background_holds_nobody_up() {
    let Some(guest) = guest().await else { return };
    let begun = Instant::now();
    let run = guest.run(shell("echo first; sleep 1000 & echo last")).await;
    assert_eq!((run.text(), run.code()), ("first\nlast\n".into(), Some(0)));
    assert!(begun.elapsed() < LONG);
    // It lives on, as a server that was started would.
    assert!(!guest.execs.cgroups.is_empty().unwrap());
}

#[tokio::test]
async fn a_terminal_is_one_stream_with_a_size() {
    let Some(guest) = guest().await else { return };
    if !Path::new("/dev/ptmx").exists() {
        eprintln!("SKIPPED: no /dev/ptmx");
        return;
    }
    let size = Some(TerminalSize { rows: 33, columns: 99 });
    let script = "tty; stty size; echo err >&2; echo $TERM; read line; stty size; echo got $line";
    let mut session = guest.open(In::Start(ExecStart { tty: true, stdin: true, size, ..shell(script) })).await;
    let mut text = String::new();
    while !text.contains("xterm") {
        text += std::str::from_utf8(&session.first_output().await).unwrap();
    }
    assert!(text.starts_with("/dev/pts/") && text.contains("33 99\r\nerr\r\n"), "{text:?}");
    session.send(In::Resize(TerminalSize { rows: 40, columns: 120 })).await;
    session.send(In::Stdin(clawpot_common::v1::ExecData { offset: 0, data: Bytes::from_static(b"word\n") })).await;
    let run = session.finish().await;
    assert!(run.text().contains("40 120\r\ngot word\r\n"), "{:?}", run.text());
    assert_eq!(run.code(), Some(0));
}

#[tokio::test]
async fn hello_is_asked_first() {
    let Some(guest) = guest().await else { return };
    let ask = |incarnation| clawpot_common::agent::v1::HelloRequest {
        protocol: 1,
        host_time_ns: 0,
        vm_id: "vm".into(),
        incarnation,
    };
    let mut client = guest.client.clone();
    assert_eq!(client.hello(ask(1)).await.unwrap().into_inner().protocol, 1);
    assert_eq!(client.hello(ask(2)).await.unwrap_err().code(), tonic::Code::FailedPrecondition);
}

#[tokio::test]
async fn the_first_frame_opens() {
    let Some(guest) = guest().await else { return };
    let run = guest.open(In::Signal(ExecSignal { number: 9 })).await.finish().await;
    assert_eq!(run.failed.unwrap().reason(), Reason::BadRequest);
    let run = guest.open(crate::support::attach("aaaaaaaaaaaaaaaa", 0, 0)).await.finish().await;
    assert_eq!(run.failed.unwrap().reason(), Reason::UnknownExec);
    let mut session = guest.open(In::Start(shell("true"))).await;
    assert!(matches!(session.next().await, Some(Ok(Out::Started(_)))));
}
