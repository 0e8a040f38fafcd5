//! Warm execs: `/bin/true` again and again in a VM that runs.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

use clawpot_common::v1::exec_output::Frame;
use clawpot_common::v1::vm_service_client::VmServiceClient;
use clawpot_common::v1::{ExecAttach, ExecInput, ExecOutput, ExecStart, exec_input};
use serde::Serialize;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use tonic::transport::Channel;

use crate::{Outcome, micros};

/// Rounds that are not counted: connections are opened, pages read, code translated.
const WARM_UP: u32 = 20;

#[derive(Debug, Serialize)]
pub struct RoundTrip {
    /// From the sending of the start to the receipt of the exit, µs.
    total: u64,
    /// What the guest says it took from spawn to exit, µs.
    spawn_to_exit: u64,
    /// The same way there and back without a process: attaching to an exec that the guest does not know, µs.
    relay: u64,
}

pub async fn measure(client: VmServiceClient<Channel>, vm: &str, rounds: u32) -> Outcome<Vec<RoundTrip>> {
    let mut trips = Vec::new();
    for round in 0..rounds + WARM_UP {
        let trip = one(client.clone(), vm).await?;
        if round >= WARM_UP {
            trips.push(trip);
        }
    }
    Ok(trips)
}

async fn one(client: VmServiceClient<Channel>, vm: &str) -> Outcome<RoundTrip> {
    let begun = Instant::now();
    let mut exec = Exec::start(client.clone(), vm, &["/bin/true"]).await?;
    let (total, spawn_to_exit) = loop {
        match exec.next().await? {
            Frame::Exited(exited) => break (micros(begun), exited.spawn_to_exit_us),
            Frame::Failed(failed) => return Err(format!("/bin/true failed: {}", failed.message).into()),
            _ => {}
        }
    };
    let begun = Instant::now();
    let attach = ExecAttach { vm: vm.to_owned(), exec_id: id()?, ..Default::default() };
    match Exec::open(client, exec_input::Frame::Attach(attach)).await?.next().await? {
        Frame::Failed(_) => Ok(RoundTrip { total, spawn_to_exit, relay: micros(begun) }),
        other => Err(format!("attaching to an unknown exec was answered by {other:?}").into()),
    }
}

/// A command whose output is read frame by frame.
pub struct Exec {
    frames: Streaming<ExecOutput>,
    /// Kept, so that the server does not take its end for the client's.
    _input: mpsc::Sender<ExecInput>,
}

impl Exec {
    pub async fn start(client: VmServiceClient<Channel>, vm: &str, argv: &[&'static str]) -> Outcome<Self> {
        let start = ExecStart {
            vm: vm.to_owned(),
            exec_id: id()?,
            argv: argv.iter().map(|word| word.as_bytes().into()).collect(),
            ..Default::default()
        };
        Self::open(client, exec_input::Frame::Start(start)).await
    }

    async fn open(mut client: VmServiceClient<Channel>, first: exec_input::Frame) -> Outcome<Self> {
        let (input, frames) = mpsc::channel(4);
        input.send(ExecInput { frame: Some(first) }).await?;
        let frames = client.exec(ReceiverStream::new(frames)).await?.into_inner();
        Ok(Self { frames, _input: input })
    }

    pub async fn next(&mut self) -> Outcome<Frame> {
        let frame = self.frames.message().await?.and_then(|output| output.frame);
        frame.ok_or_else(|| "the exec's stream ended before the exec did".into())
    }
}

/// 16 digits that no other exec of this bench has.
fn id() -> Outcome<String> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_nanos();
    Ok(format!("{:0>16}", format!("{now:x}")).chars().rev().take(16).collect())
}
