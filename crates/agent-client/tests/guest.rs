//! The port against agents over a Unix socket that speaks `CONNECT`: our own agent with real processes, and hostile ones.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use clawpot_agent::exec::{Cgroups, Shared, Surroundings};
use clawpot_agent::hello::{Identity, Timings, WallClock};
use clawpot_agent::reaper::{Reaper, Scope};
use clawpot_agent::server::{Service, serve};
use clawpot_agent_client::AgentClient;
use clawpot_common::agent::v1::agent_server::{Agent, AgentServer};
use clawpot_common::agent::v1::{HelloRequest, HelloResponse, ShutdownRequest, ShutdownResponse};
use clawpot_common::v1::exec_output::Frame;
use clawpot_common::{AGENT_PORT, v1};
use clawpot_core::MachineId;
use clawpot_core::exec::{ExecEnd, ExecInput, ExecOutput, ExecStart};
use clawpot_core::ports::{BoxStream, Guest, GuestEndpoint};
use clawpot_host::connect;
use clawpot_types::{ExecId, Incarnation, Kind, Millis, Result};
use futures_util::{StreamExt, stream};
use tokio::io::AsyncWriteExt;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

fn machine(incarnation: u64) -> MachineId {
    MachineId { vm: "aaaaaaaaaaaaaaaa".parse().unwrap(), incarnation: Incarnation(incarnation) }
}

fn id() -> ExecId {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!("exec{:012}", NEXT.fetch_add(1, Ordering::Relaxed)).parse().unwrap()
}

fn start(argv: &[&str]) -> ExecInput {
    ExecInput::Start(ExecStart {
        id: id(),
        argv: argv.iter().map(|word| Bytes::copy_from_slice(word.as_bytes())).collect(),
        env: Vec::new(),
        cwd: "/".into(),
        user: String::new(),
        timeout: Millis(0),
        stdin: false,
        tty: None,
    })
}

fn once(first: ExecInput) -> BoxStream<ExecInput> {
    stream::iter([first]).boxed()
}

/// Connections of the VM's socket, after their handshake.
fn connections(listener: UnixListener) -> ReceiverStream<std::io::Result<UnixStream>> {
    let (sender, receiver) = mpsc::channel(1);
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            // Whoever asked may have given up meanwhile.
            let asked = connect::accept(&mut stream).await.is_ok_and(|port| port == AGENT_PORT);
            if asked && stream.write_all(b"OK 1073741824\n").await.is_ok() {
                sender.send(Ok(stream)).await.unwrap();
            }
        }
    });
    ReceiverStream::new(receiver)
}

/// Our own agent at `socket`; `None` (and a line) where there is no right to make cgroups.
fn real_agent(socket: &Path, cgroups: &Path) -> Option<Arc<Shared>> {
    let made = match Cgroups::new(cgroups) {
        Ok(made) => made,
        Err(error) => {
            eprintln!("SKIPPED: cannot make {}: {error} (needs root and cgroup2)", cgroups.display());
            return None;
        }
    };
    let reaper = Reaper::new(Scope::Started);
    tokio::spawn(reaper.watch().unwrap());
    let surroundings = Surroundings {
        reaper,
        cgroups: made,
        root: "/".into(),
        files: None,
        memory: 8 << 20,
        patience: Duration::from_secs(30),
    };
    let execs = Shared::new(surroundings).unwrap();
    let service = Service {
        identity: Identity { vm_id: machine(1).vm.to_string(), incarnation: 1 },
        timings: Timings { agent_start: Duration::from_millis(5), ..Timings::default() },
        clock: WallClock { may_set: false },
        execs: execs.clone(),
        stop: mpsc::channel(1).0,
    };
    let incoming = connections(UnixListener::bind(socket).unwrap());
    tokio::spawn(async { serve(service, incoming).await.unwrap() });
    Some(execs)
}

/// As whoever asks a guest does: it asks again while no connection comes about. The client gives each 250 ms, which a busy machine
/// may take for itself.
async fn patiently<T>(mut ask: impl AsyncFnMut() -> Result<T>) -> Result<T> {
    let begun = Instant::now();
    loop {
        match ask().await {
            Err(error) if error.kind() == Kind::Unavailable && begun.elapsed() < Duration::from_secs(60) => {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            done => return done,
        }
    }
}

async fn all(mut output: BoxStream<Result<ExecOutput>>) -> Vec<Result<ExecOutput>> {
    let mut frames = Vec::new();
    while let Some(frame) = output.next().await {
        frames.push(frame);
    }
    frames
}

#[tokio::test]
async fn our_own_agent_through_the_port() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("v.sock");
    let mounts = std::fs::read_to_string("/proc/mounts").unwrap();
    let cgroup2 = mounts.lines().find(|line| line.contains(" cgroup2 ")).and_then(|line| line.split(' ').nth(1));
    let cgroups =
        Path::new(cgroup2.unwrap_or("/nonexistent")).join(format!("clawpot-guest-test-{}", std::process::id()));
    let Some(execs) = real_agent(&socket, &cgroups) else { return };
    let endpoint = GuestEndpoint::Vsock(socket.clone());
    let client = AgentClient::new();

    let hello = patiently(async || client.hello(&machine(1), &endpoint).await).await.unwrap();
    assert_eq!((hello.protocol, hello.timings[0].micros), (1, 5000));
    let other = patiently(async || client.hello(&machine(2), &endpoint).await).await.unwrap_err();
    assert_eq!(other.kind(), Kind::FailedPrecondition);

    let script = || once(start(&["sh", "-c", "echo out; echo err >&2; exit 4"]));
    let output = patiently(async || client.exec(&machine(1), &endpoint, script()).await).await.unwrap();
    let frames: Vec<_> = all(output).await.into_iter().map(Result::unwrap).collect();
    assert!(matches!(frames.first(), Some(ExecOutput::Started { .. })));
    assert!(frames.contains(&ExecOutput::Stdout { offset: 0, data: Bytes::from_static(b"out\n") }));
    assert!(frames.contains(&ExecOutput::Stderr { offset: 0, data: Bytes::from_static(b"err\n") }));
    assert!(matches!(frames.last(), Some(ExecOutput::Exited(exited)) if exited.end == ExecEnd::Code(4)));

    client.shutdown(&machine(1), &endpoint, Millis(1)).await.unwrap_err();
    execs.cgroups.sweep();
    for _ in 0..6000 {
        let children = std::fs::read_dir(&cgroups).unwrap().flatten().filter(|entry| entry.path().is_dir());
        children.for_each(|child| std::fs::remove_dir(child.path()).unwrap_or_default());
        if std::fs::remove_dir(&cgroups).is_ok() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("left behind: {}", cgroups.display());
}

/// An agent that sends `frames` and then nothing, or ends its stream.
struct Hostile {
    frames: Vec<Frame>,
    hangs: bool,
}

#[tonic::async_trait]
impl Agent for Hostile {
    async fn hello(&self, request: Request<HelloRequest>) -> Result<Response<HelloResponse>, Status> {
        if self.hangs {
            std::future::pending::<()>().await;
        }
        let incarnation = request.get_ref().incarnation;
        let kernel_release = "\x1b[2J".repeat(1000);
        Ok(Response::new(HelloResponse { protocol: 1, incarnation, kernel_release, ..Default::default() }))
    }

    type ExecStream = futures_util::stream::BoxStream<'static, Result<v1::ExecOutput, Status>>;

    async fn exec(&self, _: Request<Streaming<v1::ExecInput>>) -> Result<Response<Self::ExecStream>, Status> {
        let frames = self.frames.clone().into_iter().map(|frame| Ok(v1::ExecOutput { frame: Some(frame) }));
        Ok(Response::new(stream::iter(frames).boxed()))
    }

    async fn shutdown(&self, _: Request<ShutdownRequest>) -> Result<Response<ShutdownResponse>, Status> {
        Ok(Response::new(ShutdownResponse {}))
    }
}

fn hostile(socket: &Path, agent: Hostile) -> tokio::task::JoinHandle<()> {
    let incoming = connections(UnixListener::bind(socket).unwrap());
    let server = tonic::transport::Server::builder().add_service(AgentServer::new(agent));
    tokio::spawn(async { server.serve_with_incoming(incoming).await.unwrap() })
}

/// The error with which a stream of these frames ends.
async fn error_of(frames: Vec<Frame>) -> String {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("v.sock");
    let server = hostile(&socket, Hostile { frames, hangs: false });
    let endpoint = GuestEndpoint::Vsock(socket);
    let client = AgentClient::new();
    let started = async || client.exec(&machine(1), &endpoint, once(start(&["true"]))).await;
    let output = patiently(started).await.unwrap();
    let mut frames = all(output).await;
    server.abort();
    frames.pop().unwrap().unwrap_err().chain()
}

#[tokio::test]
async fn a_hostile_agent_is_caught() {
    let data = |offset, length| Frame::Stdout(v1::ExecData { offset, data: vec![0; length].into() });
    assert!(error_of(vec![data(0, 4), data(8, 1)]).await.contains("output at offset 8 where 4 was due"));
    assert!(error_of(vec![data(0, 200 << 10)]).await.contains("over 128 KiB"));
    // Not even decoded.
    assert!(error_of(vec![data(0, 9 << 20)]).await.contains("decoded message length too large"));
    assert!(error_of(vec![Frame::Exited(v1::ExecExited::default())]).await.contains("an end that is none"));
}

/// A client that lost its server goes on trying then; a timeout would be its end.
#[tokio::test]
async fn a_guest_that_takes_no_connection_in_time_is_unavailable() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("busy");
    let _never_accepts = tokio::net::UnixListener::bind(&socket).unwrap();
    let client = AgentClient::new();
    let called = client.exec(&machine(1), &GuestEndpoint::Vsock(socket), once(start(&["true"]))).await;
    assert_eq!(called.err().unwrap().kind(), Kind::Unavailable);
}

#[tokio::test]
async fn a_silent_agent_is_given_up_and_its_words_are_cut() {
    let dir = tempfile::tempdir().unwrap();
    let (silent, loud) = (dir.path().join("silent"), dir.path().join("loud"));
    hostile(&silent, Hostile { frames: Vec::new(), hangs: true });
    hostile(&loud, Hostile { frames: Vec::new(), hangs: false });
    let client = AgentClient::new();
    let begun = Instant::now();
    let (silent, loud) = (GuestEndpoint::Vsock(silent), GuestEndpoint::Vsock(loud));
    let error = patiently(async || client.hello(&machine(1), &silent).await).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Timeout);
    assert!(begun.elapsed() < Duration::from_secs(60), "it would hang for ever");
    let hello = patiently(async || client.hello(&machine(2), &loud).await).await.unwrap();
    assert!(hello.kernel_release.len() <= 500 && !hello.kernel_release.contains('\x1b'));
}

#[tokio::test]
async fn nobody_there_is_unavailable() {
    let dir = tempfile::tempdir().unwrap();
    let client = AgentClient::new();
    let absent = client.hello(&machine(1), &GuestEndpoint::Vsock(dir.path().join("absent"))).await.unwrap_err();
    assert!(matches!(absent.kind(), Kind::NotFound | Kind::Unavailable), "{}", absent.chain());
    // Firecracker's socket while the guest has no listener: it closes.
    let socket = dir.path().join("v.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            drop(stream)
        }
    });
    let refused = client.hello(&machine(1), &GuestEndpoint::Vsock(socket)).await.unwrap_err();
    assert_eq!(refused.kind(), Kind::Unavailable, "{}", refused.chain());
}

#[tokio::test]
async fn a_broken_connection_is_dialled_anew() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("v.sock");
    let endpoint = GuestEndpoint::Vsock(socket.clone());
    let client = AgentClient::new();
    let server = hostile(&socket, Hostile { frames: Vec::new(), hangs: false });
    patiently(async || client.hello(&machine(1), &endpoint).await).await.unwrap();
    patiently(async || client.hello(&machine(1), &endpoint).await).await.unwrap();
    // Its connections end with it.
    server.abort();
    std::fs::remove_file(&socket).unwrap();
    tokio::time::sleep(Duration::from_millis(50)).await;
    let server = hostile(&socket, Hostile { frames: Vec::new(), hangs: false });
    patiently(async || client.hello(&machine(1), &endpoint).await).await.unwrap();
    server.abort();
}

/// An agent that says `started` and no more, and tells when its caller's input is over.
struct Patient(mpsc::Sender<()>);

#[tonic::async_trait]
impl Agent for Patient {
    async fn hello(&self, _: Request<HelloRequest>) -> Result<Response<HelloResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    type ExecStream = futures_util::stream::BoxStream<'static, Result<v1::ExecOutput, Status>>;

    async fn exec(&self, request: Request<Streaming<v1::ExecInput>>) -> Result<Response<Self::ExecStream>, Status> {
        let (mut input, over) = (request.into_inner(), self.0.clone());
        tokio::spawn(async move {
            while let Ok(Some(_)) = input.message().await {}
            over.send(()).await.unwrap_or_default();
        });
        let started = v1::ExecStarted { exec_id: id().to_string(), pid: 2, stdin_offset: 0 };
        let first = Ok(v1::ExecOutput { frame: Some(Frame::Started(started)) });
        Ok(Response::new(stream::iter([first]).chain(stream::pending()).boxed()))
    }

    async fn shutdown(&self, _: Request<ShutdownRequest>) -> Result<Response<ShutdownResponse>, Status> {
        Err(Status::unimplemented(""))
    }
}

/// Or the exec's HTTP/2 stream, its connection and the guest's network namespace would stay until the guest is given up.
#[tokio::test]
async fn an_exec_whose_output_nobody_holds_has_no_input_any_more() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("v.sock");
    let (over, mut is_over) = mpsc::channel(1);
    let incoming = connections(UnixListener::bind(&socket).unwrap());
    let server = tonic::transport::Server::builder().add_service(AgentServer::new(Patient(over)));
    let server = tokio::spawn(async { server.serve_with_incoming(incoming).await.unwrap() });

    let client = AgentClient::new();
    let endpoint = GuestEndpoint::Vsock(socket);
    let open_for_ever = || once(start(&["cat"])).chain(stream::pending()).boxed();
    let mut output = patiently(async || client.exec(&machine(1), &endpoint, open_for_ever()).await).await.unwrap();
    assert!(matches!(output.next().await, Some(Ok(ExecOutput::Started { .. }))));
    drop(output);
    tokio::time::timeout(Duration::from_secs(60), is_over.recv()).await.unwrap().unwrap();
    server.abort();
}
