//! From the request to a running VM, its first output, and its end.

use std::collections::BTreeMap;
use std::time::Instant;

use clawpot_common::v1::exec_output::Frame;
use clawpot_common::v1::vm_service_client::VmServiceClient;
use clawpot_common::v1::{CreateVmRequest, DeleteVmRequest, Phase, Vm, VmSpec, WatchVmsRequest};
use serde::Serialize;
use tonic::transport::Channel;

use crate::{Outcome, execs, micros};

/// One VM's life, µs from the sending of its create (its delete, for the last one).
#[derive(Debug, Default, Serialize)]
pub struct Life {
    /// The create was answered: the intent is on disk.
    accepted: u64,
    /// The client saw the phase Running: the agent had answered before.
    running: u64,
    /// The first byte of `echo`, whose exec was asked for at once.
    first_output: u64,
    /// The record's own phases and steps, as `GetVm` shows them.
    timings: BTreeMap<String, u64>,
    deleted: u64,
}

pub async fn measure(client: VmServiceClient<Channel>, image: &str, rounds: u32) -> Outcome<Vec<Life>> {
    let mut lives = Vec::new();
    for _ in 0..rounds {
        lives.push(live(client.clone(), image).await?);
    }
    Ok(lives)
}

async fn live(mut client: VmServiceClient<Channel>, image: &str) -> Outcome<Life> {
    let spec = VmSpec { image: image.to_owned(), ..VmSpec::default() };
    let begun = Instant::now();
    let vm = client.create_vm(CreateVmRequest { spec: Some(spec), ..Default::default() }).await?.into_inner();
    let accepted = micros(begun);
    let (running, first_output) =
        tokio::try_join!(until_running(client.clone(), &vm.id, begun), first_output(client.clone(), &vm.id, begun))?;
    let (running, vm) = running;
    let begun = Instant::now();
    let mut changes = client.watch_vms(WatchVmsRequest { vm: vm.id.clone(), ..Default::default() }).await?.into_inner();
    client.delete_vm(DeleteVmRequest { vm: vm.id.clone(), force: false }).await?;
    while !changes.message().await?.ok_or("the watch ended before the VM was gone")?.deleted {}
    Ok(Life { accepted, running, first_output, timings: timings(&vm), deleted: micros(begun) })
}

async fn until_running(mut client: VmServiceClient<Channel>, vm: &str, begun: Instant) -> Outcome<(u64, Vm)> {
    let mut changes = client.watch_vms(WatchVmsRequest { vm: vm.to_owned(), ..Default::default() }).await?.into_inner();
    loop {
        let vm = changes.message().await?.and_then(|change| change.vm).ok_or("the watch ended before the VM ran")?;
        match vm.phase() {
            Phase::Running => return Ok((micros(begun), vm)),
            Phase::Failed => return Err(format!("the VM failed: {:?}", vm.failure).into()),
            _ => {}
        }
    }
}

async fn first_output(client: VmServiceClient<Channel>, vm: &str, begun: Instant) -> Outcome<u64> {
    let mut exec = execs::Exec::start(client, vm, &["/bin/echo", "hello"]).await?;
    let mut first = None;
    loop {
        match exec.next().await? {
            Frame::Stdout(_) if first.is_none() => first = Some(micros(begun)),
            Frame::Exited(_) => return first.ok_or_else(|| "the command ended without output".into()),
            Frame::Failed(failed) => return Err(format!("the command failed: {}", failed.message).into()),
            _ => {}
        }
    }
}

fn timings(vm: &Vm) -> BTreeMap<String, u64> {
    let micros = |timing: &clawpot_common::v1::PhaseTiming| {
        let duration = timing.duration.unwrap_or_default();
        u64::try_from(duration.seconds * 1_000_000 + i64::from(duration.nanos) / 1_000).unwrap_or(0)
    };
    vm.timings.iter().map(|timing| (timing.name.clone(), micros(timing))).collect()
}
