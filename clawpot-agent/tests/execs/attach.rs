//! Attachments come and go, the exec stays; nothing is lost that need not be, and memory is bounded. Over real gRPC.

use std::time::Duration;

use crate::support::{LONG, MEMORY, Session, attach, guest, guest_with, shell};
use bytes::Bytes;
use clawpot_common::v1::exec_failed::Reason;
use clawpot_common::v1::exec_input::Frame as In;
use clawpot_common::v1::exec_output::Frame as Out;
use clawpot_common::v1::{ExecAck, ExecData, ExecHangup, ExecStart, ExecStdinEnd};
use clawpot_common::{EXEC_CHUNK, STDIN_WINDOW};

fn stdin(offset: u64, data: &[u8]) -> In {
    In::Stdin(ExecData { offset, data: Bytes::copy_from_slice(data) })
}

fn with_stdin(script: &str) -> ExecStart {
    ExecStart { stdin: true, ..shell(script) }
}

/// Reads until nothing comes for a while.
async fn drain(session: &mut Session) -> u64 {
    while let Ok(frame) = tokio::time::timeout(Duration::from_millis(400), session.next()).await {
        frame.unwrap().unwrap();
    }
    session.stdout
}

#[tokio::test]
async fn a_lost_stream_is_taken_up_where_it_broke() {
    let Some(guest) = guest().await else { return };
    let asked = shell("i=0; while [ $i -lt 3000 ]; do echo line $i; i=$((i+1)); done; echo done >&2; exit 5");
    let id = asked.exec_id.clone();
    let mut first = guest.open(In::Start(asked)).await;
    let mut text = first.first_output().await.to_vec();
    let at = first.stdout;
    drop(first);
    tokio::time::sleep(Duration::from_millis(300)).await;
    let rest = guest.open(attach(&id, at, 0)).await.finish().await;
    text.extend_from_slice(&rest.stdout);
    let want: String = (0..3000).map(|i| format!("line {i}\n")).collect();
    assert!(text == want.as_bytes());
    assert_eq!((&rest.stderr[..], rest.code()), (&b"done\n"[..], Some(5)));
}

#[tokio::test]
async fn an_ended_exec_is_kept_for_a_lost_caller() {
    let Some(guest) = guest().await else { return };
    let asked = shell("echo kept; exit 9");
    let mut first = guest.open(In::Start(asked.clone())).await;
    first.acks = false;
    // One that acknowledges, and has nothing yet.
    first.send(In::Ack(ExecAck::default())).await;
    while !matches!(first.next().await.unwrap().unwrap(), Out::Exited(_)) {}
    drop(first);
    // There again, also for one who asks to start it.
    let again = guest.open(In::Start(asked.clone())).await.finish().await;
    assert_eq!((again.text(), again.code()), ("kept\n".into(), Some(9)));
    // Many others that were fetched wholly do not drive out one that was not.
    let mut lost = guest.open(In::Start(shell("echo lost"))).await;
    lost.acks = false;
    lost.send(In::Ack(ExecAck::default())).await;
    let lost_id = match lost.next().await.unwrap().unwrap() {
        Out::Started(started) => started.exec_id,
        other => panic!("{other:?}"),
    };
    drop(lost);
    for _ in 0..70 {
        assert_eq!(guest.run(shell("exit 0")).await.code(), Some(0));
    }
    assert_eq!(guest.open(attach(&lost_id, 0, 0)).await.finish().await.text(), "lost\n");
    let gone = guest.open(attach(&asked.exec_id, 5, 0)).await.finish().await;
    assert_eq!(gone.failed.unwrap().reason(), Reason::UnknownExec);
}

#[tokio::test]
async fn a_relay_that_lost_its_caller_acknowledges_nothing() {
    let Some(guest) = guest().await else { return };
    let asked = shell("head -c 100000 /dev/zero; sleep 0.3; echo end");
    let id = asked.exec_id.clone();
    let mut first = guest.open(In::Start(asked)).await;
    first.first_output().await;
    let have = first.stdout;
    first.acks = false;
    // Its side ends in good order, and it still takes what comes; but its caller got none of that.
    let Session { send, mut output, .. } = first;
    drop(send);
    while !matches!(output.message().await.unwrap().unwrap().frame, Some(Out::Exited(_))) {}
    let rest = guest.open(attach(&id, have, 0)).await.finish().await;
    assert_eq!(have + u64::try_from(rest.stdout.len()).unwrap(), 100_004);
}

#[tokio::test]
async fn a_simple_caller_that_never_acknowledges_gets_everything() {
    let Some(guest) = guest().await else { return };
    let mut session = guest.open(In::Start(shell("head -c 3000000 /dev/zero"))).await;
    session.acks = false;
    let Session { send, mut output, .. } = session;
    drop(send);
    let mut got = 0;
    while let Some(frame) = output.message().await.unwrap() {
        if let Some(Out::Stdout(data)) = frame.frame {
            got += data.data.len();
        }
    }
    assert_eq!(got, 3_000_000);
}

#[tokio::test]
async fn a_later_attachment_ends_the_earlier() {
    let Some(guest) = guest().await else { return };
    let asked = with_stdin("cat");
    let id = asked.exec_id.clone();
    let mut first = guest.open(In::Start(asked)).await;
    first.send(stdin(0, b"one")).await;
    first.first_output().await;
    let mut second = guest.open(attach(&id, 3, 0)).await;
    match second.next().await.unwrap().unwrap() {
        Out::Started(started) => assert_eq!(started.stdin_offset, 3),
        other => panic!("{other:?}"),
    }
    let mut ended = first.next().await;
    while let Some(Ok(_)) = ended {
        ended = first.next().await;
    }
    assert_eq!(ended.unwrap().unwrap_err().code(), tonic::Code::Aborted);
    second.send(stdin(3, b"two")).await;
    second.send(In::StdinEnd(ExecStdinEnd { offset: 6 })).await;
    assert_eq!(second.finish().await.text(), "two");
}

#[tokio::test]
async fn without_acknowledgement_the_process_stands_still() {
    let Some(guest) = guest().await else { return };
    let asked = shell("yes | tee /dev/stderr");
    let mut session = guest.open(In::Start(asked)).await;
    session.acks = false;
    let stuck = drain(&mut session).await;
    assert!(guest.execs.budget.used() <= 2 * (256 << 10), "{}", guest.execs.budget.used());
    session.send(In::Ack(ExecAck { stdout_offset: session.stdout, stderr_offset: session.stderr })).await;
    while session.stdout <= stuck {
        tokio::time::timeout(LONG, session.next()).await.expect("it goes on").unwrap().unwrap();
    }
    drain(&mut session).await;
    // A hang-up gets through however full everything is.
    session.send(In::Hangup(ExecHangup {})).await;
    assert_eq!(session.finish().await.signal(), Some(9));
}

#[tokio::test]
async fn a_caller_that_is_lost_for_long_loses_the_oldest() {
    let Some(guest) = guest_with(Duration::from_millis(300)).await else { return };
    let asked = shell("head -c 3000000 /dev/zero; echo end");
    let id = asked.exec_id.clone();
    let mut lost = guest.open(In::Start(asked)).await;
    assert!(matches!(lost.next().await, Some(Ok(Out::Started(_)))));
    drop(lost);
    guest.wait_for_no_process().await;
    let mut session = guest.open(attach(&id, 0, 0)).await;
    session.next().await.unwrap().unwrap();
    match session.next().await.unwrap().unwrap() {
        Out::Lost(lost) => assert!(lost.from == 0 && lost.to > 2_000_000, "{lost:?}"),
        other => panic!("{other:?}"),
    }
    let run = session.finish().await;
    assert!(run.stdout.ends_with(b"end\n") && run.code() == Some(0));
    assert_eq!(run.exited.unwrap().stdout_bytes, 3_000_004);
}

#[tokio::test]
async fn a_caller_that_is_lost_briefly_loses_nothing() {
    let Some(guest) = guest().await else { return };
    let asked = shell("head -c 3000000 /dev/zero");
    let id = asked.exec_id.clone();
    drop(guest.open(In::Start(asked)).await);
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(guest.execs.budget.used() <= 256 << 10);
    assert_eq!(guest.open(attach(&id, 0, 0)).await.finish().await.stdout.len(), 3_000_000);
}

#[tokio::test]
async fn what_was_sent_twice_counts_once_and_a_gap_is_refused() {
    let Some(guest) = guest().await else { return };
    let session = guest.open(In::Start(with_stdin("cat"))).await;
    session.send(stdin(0, b"abc")).await;
    session.send(stdin(0, b"abcd")).await;
    session.send(stdin(2, b"cdef")).await;
    session.send(In::StdinEnd(ExecStdinEnd { offset: 6 })).await;
    assert_eq!(session.finish().await.text(), "abcdef");

    let session = guest.open(In::Start(with_stdin("cat"))).await;
    session.send(stdin(1, b"x")).await;
    assert_eq!(session.finish().await.failed.unwrap().reason(), Reason::BadRequest);

    let session = guest.open(In::Start(with_stdin("sleep 60"))).await;
    let mut offset = 0;
    for _ in 0..2 * STDIN_WINDOW / EXEC_CHUNK + 4 {
        let frame = clawpot_common::v1::ExecInput { frame: Some(stdin(offset, &vec![0; EXEC_CHUNK])) };
        // The agent ends the stream at some point.
        session.send.send(frame).await.ok();
        offset += u64::try_from(EXEC_CHUNK).unwrap();
    }
    let failed = session.finish().await.failed.unwrap();
    assert!(failed.message.contains("without acknowledgement"), "{}", failed.message);
}

#[tokio::test]
async fn a_process_that_does_not_read_is_no_obstacle() {
    let Some(guest) = guest().await else { return };
    let go = guest.dir.path().join("go");
    let script = format!("exec 0<&-; echo ready; until [ -e {} ]; do sleep 0.05; done; echo bye", go.display());
    let mut session = guest.open(In::Start(with_stdin(&script))).await;
    session.first_output().await;
    let total = u64::try_from(64 * EXEC_CHUNK).unwrap();
    let run = pump(session, total, || drop(std::fs::File::create(go).unwrap())).await;
    assert_eq!((run.0, run.1), (total, 4));
}

#[tokio::test]
async fn sixty_four_mib_in_and_out_in_constant_memory() {
    let Some(guest) = guest().await else { return };
    let total = 64 << 20;
    let session = guest.open(In::Start(with_stdin("cat"))).await;
    let before = resident();
    let (acked, out) = pump(session, total, || {}).await;
    assert_eq!((acked, out), (total, total));
    let grown = resident().saturating_sub(before);
    assert!(grown < 16 << 20, "{grown} bytes more than before");
    assert!(guest.execs.budget.used() < MEMORY);
}

/// Sends `total` bytes as a caller should: never more than the window on the way. Checks what comes back.
/// Returns bytes of stdin acknowledged and of stdout received. `acknowledged` is called when all have been.
async fn pump(session: Session, total: u64, acknowledged: impl FnOnce()) -> (u64, u64) {
    let Session { send, mut output, stdout, .. } = session;
    let (acks, mut acked) = tokio::sync::watch::channel(0);
    let byte = |at: u64| u8::try_from(at % 251).unwrap();
    let sending = {
        let send = send.clone();
        async move {
            let mut offset = 0;
            while offset < total {
                let window = u64::try_from(STDIN_WINDOW).unwrap();
                let target = offset + u64::try_from(EXEC_CHUNK).unwrap();
                if acked.wait_for(|acked| target <= acked + window).await.is_err() {
                    return;
                }
                let data: Vec<u8> = (offset..target).map(byte).collect();
                send.send(clawpot_common::v1::ExecInput { frame: Some(stdin(offset, &data)) }).await.unwrap();
                offset = target;
            }
            let end = In::StdinEnd(ExecStdinEnd { offset });
            send.send(clawpot_common::v1::ExecInput { frame: Some(end) }).await.unwrap();
        }
    };
    let receiving = async move {
        let mut got = stdout;
        let (mut told, mut acknowledged) = (0, Some(acknowledged));
        while let Some(frame) = output.message().await.unwrap() {
            match frame.frame.unwrap() {
                Out::Stdout(data) => {
                    assert_eq!(data.offset, got);
                    if stdout == 0 {
                        assert!(data.data.iter().zip(got..).all(|(have, at)| *have == byte(at)));
                    }
                    got += u64::try_from(data.data.len()).unwrap();
                    let ack = In::Ack(ExecAck { stdout_offset: got, stderr_offset: 0 });
                    send.send(clawpot_common::v1::ExecInput { frame: Some(ack) }).await.unwrap();
                }
                Out::StdinAck(ack) => {
                    told = ack.offset;
                    acks.send_replace(told);
                    if told == total
                        && let Some(acknowledged) = acknowledged.take()
                    {
                        acknowledged();
                    }
                }
                Out::Exited(_) => return (told, got - stdout),
                Out::Started(_) => {}
                other => panic!("{other:?}"),
            }
        }
        panic!("no end");
    };
    tokio::join!(sending, receiving).1
}

/// Resident memory of this process, bytes.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_ascii_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
}
