//! An agent's service in this process, served over a Unix socket, and a caller for it.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use clawpot_agent::exec::{Cgroups, Shared, Surroundings};
use clawpot_agent::hello::{Identity, Timings, WallClock};
use clawpot_agent::reaper::{Reaper, Scope};
use clawpot_agent::server::{Service, serve};
use clawpot_common::agent::v1::agent_client::AgentClient;
use clawpot_common::v1::exec_exited::End;
use clawpot_common::v1::exec_input::Frame as In;
use clawpot_common::v1::exec_output::Frame as Out;
use clawpot_common::v1::{ExecAck, ExecAttach, ExecData, ExecExited, ExecFailed, ExecInput, ExecStart};
use tokio::net::UnixListener;
use tokio::sync::mpsc;
use tokio_stream::wrappers::{ReceiverStream, UnixListenerStream};
use tonic::transport::Channel;
use tonic::{Status, Streaming};

/// Far more than anything here takes.
pub const LONG: Duration = Duration::from_secs(60);

/// The execs' memory budget in these tests, bytes.
pub const MEMORY: usize = 8 << 20;

/// An agent to talk to. Leaves nothing behind when dropped.
pub struct Guest {
    pub client: AgentClient<Channel>,
    pub execs: Arc<Shared>,
    pub cgroups: PathBuf,
    pub dir: tempfile::TempDir,
    tasks: Vec<tokio::task::JoinHandle<()>>,
}

/// A guest, or `None` (and a line that says so) where there is no right to make cgroups.
pub async fn guest() -> Option<Guest> {
    guest_with(Duration::from_secs(30)).await
}

pub async fn guest_with(patience: Duration) -> Option<Guest> {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let name = format!("clawpot-agent-test-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
    let cgroups = cgroup2()?.join(name);
    let made = match Cgroups::new(&cgroups) {
        Ok(made) => made,
        Err(error) => {
            eprintln!("SKIPPED: cannot make {}: {error} (needs root)", cgroups.display());
            return None;
        }
    };
    let reaper = Reaper::new(Scope::Started);
    let reaping = reaper.watch().unwrap();
    let execs =
        Shared::new(Surroundings { reaper, cgroups: made, root: "/".into(), files: None, memory: MEMORY, patience })
            .unwrap();
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("agent.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let service = Service {
        identity: Identity { vm_id: "vm".into(), incarnation: 1 },
        timings: Timings::default(),
        clock: WallClock { may_set: false },
        execs: execs.clone(),
        stop: mpsc::channel(1).0,
    };
    let serving = async { serve(service, UnixListenerStream::new(listener)).await.unwrap() };
    let tasks = vec![tokio::spawn(reaping), tokio::spawn(serving)];
    let channel = clawpot_common::client::connect(&socket).await.unwrap();
    let client = AgentClient::new(channel).max_decoding_message_size(8 << 20);
    Some(Guest { client, execs, cgroups, dir, tasks })
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.execs.cgroups.kill_all().unwrap();
        for task in &self.tasks {
            task.abort();
        }
        // Those killed are reaped by whoever; their cgroups empty within milliseconds.
        for _ in 0..200 {
            self.execs.cgroups.sweep();
            let children = std::fs::read_dir(&self.cgroups).into_iter().flatten().flatten();
            for child in children.filter(|child| child.path().is_dir()) {
                std::fs::remove_dir(child.path()).ok();
            }
            if std::fs::remove_dir(&self.cgroups).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        eprintln!("left behind: {}", self.cgroups.display());
    }
}

fn cgroup2() -> Option<PathBuf> {
    let mounts = std::fs::read_to_string("/proc/mounts").unwrap();
    let found = mounts.lines().find_map(|line| {
        let mut fields = line.split(' ');
        let (path, format) = (fields.nth(1)?, fields.next()?);
        (format == "cgroup2").then(|| PathBuf::from(path))
    });
    if found.is_none() {
        eprintln!("SKIPPED: no cgroup2 is mounted");
    }
    found
}

/// A new id for each exec.
pub fn id() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!("exec{:012}", NEXT.fetch_add(1, Ordering::Relaxed))
}

pub fn start(argv: &[&str]) -> ExecStart {
    ExecStart {
        exec_id: id(),
        argv: argv.iter().map(|arg| Bytes::copy_from_slice(arg.as_bytes())).collect(),
        cwd: "/".into(),
        ..ExecStart::default()
    }
}

pub fn shell(script: &str) -> ExecStart {
    start(&["/bin/sh", "-c", script])
}

pub fn attach(exec_id: &str, stdout_offset: u64, stderr_offset: u64) -> In {
    In::Attach(ExecAttach { vm: String::new(), exec_id: exec_id.into(), stdout_offset, stderr_offset })
}

/// One attachment.
pub struct Session {
    pub send: mpsc::Sender<ExecInput>,
    pub output: Streaming<ExecOutputMessage>,
    pub stdout: u64,
    pub stderr: u64,
    /// Whether [`Session::next`] acknowledges.
    pub acks: bool,
}

type ExecOutputMessage = clawpot_common::v1::ExecOutput;

/// Everything an exec did.
#[derive(Debug, Default)]
pub struct Run {
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    pub exited: Option<ExecExited>,
    pub failed: Option<ExecFailed>,
}

impl Run {
    pub fn code(&self) -> Option<i32> {
        match self.exited.as_ref()?.end? {
            End::Code(code) => Some(code),
            End::Signal(_) => None,
        }
    }

    pub fn signal(&self) -> Option<i32> {
        match self.exited.as_ref()?.end? {
            End::Signal(signal) => Some(signal),
            End::Code(_) => None,
        }
    }

    pub fn text(&self) -> String {
        String::from_utf8(self.stdout.clone()).unwrap()
    }
}

impl Guest {
    pub async fn open(&self, first: In) -> Session {
        let (send, receive) = mpsc::channel(8);
        let (stdout, stderr) = match &first {
            In::Attach(at) => (at.stdout_offset, at.stderr_offset),
            _ => (0, 0),
        };
        send.send(ExecInput { frame: Some(first) }).await.unwrap();
        let output = self.client.clone().exec(ReceiverStream::new(receive)).await.unwrap().into_inner();
        Session { send, output, stdout, stderr, acks: true }
    }

    pub async fn wait_for_no_process(&self) {
        let begun = Instant::now();
        while !self.execs.cgroups.is_empty().unwrap() {
            assert!(begun.elapsed() < LONG, "processes are left");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Runs to its end without input.
    pub async fn run(&self, start: ExecStart) -> Run {
        self.open(In::Start(start)).await.finish().await
    }
}

impl Session {
    pub async fn send(&self, frame: In) {
        self.send.send(ExecInput { frame: Some(frame) }).await.unwrap();
    }

    /// The next frame; checks that data comes without gap or repetition.
    pub async fn next(&mut self) -> Option<Result<Out, Status>> {
        let frame = match self.output.message().await {
            Ok(frame) => frame?.frame.unwrap(),
            Err(status) => return Some(Err(status)),
        };
        match &frame {
            Out::Stdout(ExecData { offset, data }) => {
                assert_eq!(*offset, self.stdout);
                self.stdout += u64::try_from(data.len()).unwrap();
            }
            Out::Stderr(ExecData { offset, data }) => {
                assert_eq!(*offset, self.stderr);
                self.stderr += u64::try_from(data.len()).unwrap();
            }
            Out::Lost(lost) => match lost.stream() {
                clawpot_common::v1::exec_lost::Stream::Stderr => self.stderr = lost.to,
                _ => self.stdout = lost.to,
            },
            _ => {}
        }
        if self.acks && matches!(frame, Out::Stdout(_) | Out::Stderr(_)) {
            let ack = ExecAck { stdout_offset: self.stdout, stderr_offset: self.stderr };
            // The agent may have ended the stream by now.
            self.send.send(ExecInput { frame: Some(In::Ack(ack)) }).await.ok();
        }
        Some(Ok(frame))
    }

    /// Reads until the first stdout and returns it.
    pub async fn first_output(&mut self) -> Bytes {
        loop {
            if let Out::Stdout(data) = self.next().await.unwrap().unwrap() {
                return data.data;
            }
        }
    }

    /// Everything from here to the end.
    pub async fn finish(mut self) -> Run {
        let mut run = Run::default();
        while let Some(frame) = self.next().await {
            match frame.unwrap() {
                Out::Stdout(data) => run.stdout.extend_from_slice(&data.data),
                Out::Stderr(data) => run.stderr.extend_from_slice(&data.data),
                Out::Exited(exited) => run.exited = Some(exited),
                Out::Failed(failed) => run.failed = Some(failed),
                Out::Started(_) | Out::Lost(_) | Out::StdinAck(_) => {}
            }
        }
        run
    }
}
