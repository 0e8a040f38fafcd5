//! `/init` of every VM: boots, then serves the host until it asks for the end.

use std::process::ExitCode;
use std::sync::Arc;

use clawpot_agent::boot::{self, Booted, cmdline::Transport};
use clawpot_agent::builder::{self, Builder};
use clawpot_agent::console::{chain, say};
use clawpot_agent::exec::{Cgroups, PATIENCE, Shared, Surroundings};
use clawpot_agent::hello::{Identity, Timings, WallClock};
use clawpot_agent::listen::Listener;
use clawpot_agent::reaper::{Reaper, Scope};
use clawpot_agent::server::{Service, serve};
use clawpot_agent::{shutdown, since_kernel_start};
use clawpot_common::AGENT_PORT;
use tokio::sync::mpsc;

fn main() -> ExitCode {
    let started = since_kernel_start();
    if std::process::id() != 1 {
        say("this is the first process of a clawpot VM; it does nothing elsewhere");
        return ExitCode::FAILURE;
    }
    let error = match boot::boot() {
        Ok(booted) => run(booted, started),
        Err(error) => error.into(),
    };
    say(format_args!("cannot go on: {}; stopping the machine", chain(&*error)));
    rustix::fs::sync();
    say(format_args!("stopping: {}", shutdown::end()));
    // The kernel panics when PID 1 ends, and with `panic=-1` restarts: the last way to stop.
    ExitCode::FAILURE
}

type Failure = Box<dyn std::error::Error>;

/// Serves; comes back only with why it cannot any longer.
fn run(booted: Booted, started: std::time::Duration) -> Failure {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return format!("starting the runtime: {error}").into(),
    };
    match runtime.block_on(serve_host(booted, started)) {
        Ok(never) => never,
        Err(failure) => failure,
    }
}

async fn serve_host(mut booted: Booted, started: std::time::Duration) -> Result<Failure, Failure> {
    let reaper = Reaper::new(Scope::Everyone);
    tokio::spawn(reaper.watch()?);
    let execs = Shared::new(Surroundings {
        reaper,
        cgroups: Cgroups::new(boot::mounts::EXECS.as_ref())?,
        root: "/".into(),
        files: Some(boot::PROCESS_FILES),
        memory: memory_for_execs(),
        patience: PATIENCE,
    })?;
    let listener = listen(&booted, AGENT_PORT)?;
    start_builder(&booted, &execs);
    let listening = booted.phases.reached("listen");
    say(format_args!("listening after {} ms:{}", listening.as_millis(), booted.phases));
    let (stop, mut stops) = mpsc::channel(1);
    let service = Service {
        identity: Identity { vm_id: booted.commands.vm, incarnation: booted.commands.incarnation },
        timings: Timings { agent_start: started, rootfs_ready: booted.rootfs_ready, listening },
        clock: WallClock { may_set: true },
        execs: Arc::clone(&execs),
        stop,
    };
    let ending = async {
        match stops.recv().await {
            Some(stop) => shutdown::run(stop, &execs, &booted.volumes, &booted.disk).await,
            None => std::io::Error::other("nobody can ask for the end any more"),
        }
    };
    tokio::select! {
        served = serve(service, listener.incoming()) => {
            served?;
            Err("the listener has ended".into())
        }
        error = ending => Ok(error.into()),
    }
}

fn listen(booted: &Booted, port: u32) -> std::io::Result<Listener> {
    match (booted.commands.transport, &booted.management) {
        (Transport::Tcp, Some(device)) => Listener::tcp(device, port),
        _ => Listener::vsock(port),
    }
}

/// Where the image is a builder's. That it does not work stops nothing else.
fn start_builder(booted: &Booted, execs: &Arc<Shared>) {
    let start = || -> Result<bool, Failure> {
        let own_disk = rustix::fs::fstat(&booted.disk)?.st_dev;
        let Some(config) = builder::Config::read(own_disk)? else { return Ok(false) };
        let incoming = listen(booted, clawpot_common::builder::PORT)?.incoming();
        let builder = Builder::new(config, Arc::clone(execs));
        tokio::spawn(async move {
            if let Err(error) = builder::serve(builder, incoming).await {
                say(format_args!("builder: {error}"));
            }
        });
        Ok(true)
    };
    match start() {
        Ok(true) => say(format_args!("this is a builder, on port {}", clawpot_common::builder::PORT)),
        Ok(false) => {}
        Err(failure) => say(format_args!("this is to be a builder, but cannot: {}", chain(&*failure))),
    }
}

/// Bytes of output that execs may hold together: a sixteenth of the machine's memory, within 4 to 64 MiB.
fn memory_for_execs() -> usize {
    let info = rustix::system::sysinfo();
    let total = info.totalram.saturating_mul(info.mem_unit.into());
    usize::try_from(total / 16).unwrap_or(usize::MAX).clamp(4 << 20, 64 << 20)
}
