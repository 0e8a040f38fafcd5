//! `Guest` over the fake host. Its programs: `true`, `exit N`, `echo WORDS`, `cat`, `sleep SECONDS`.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use clawpot_core::exec::{ExecEnd, ExecExited, ExecFailedReason, ExecInput, ExecOutput, ExecStart};
use clawpot_core::ports::{BoxStream, Guest, GuestEndpoint, Hello};
use clawpot_core::{MachineId, Timing, VmmEnd};
use clawpot_types::{Error, ExecId, Kind, Millis, Result};
use futures_util::StreamExt as _;
use tokio::time::Instant;

use crate::faults::{Line, Method};
use crate::host::{FakeExec, FakeHost, FakeProcess, Inventory, Shutdown};

#[derive(Debug)]
pub struct FakeGuest {
    host: Arc<FakeHost>,
    line: Line,
}

impl FakeGuest {
    /// Of the daemon that lives now.
    #[must_use]
    pub fn new(host: &Arc<FakeHost>) -> Self {
        Self { host: Arc::clone(host), line: host.faults.line() }
    }
}

/// How long an attempt takes when nobody answers.
const PATIENCE: Duration = Duration::from_millis(10);

#[async_trait]
impl Guest for FakeGuest {
    async fn hello(&self, id: &MachineId, endpoint: &GuestEndpoint) -> Result<Hello> {
        let answer = self.line.call(Method::GuestHello, || self.answers(id, endpoint)).await;
        if answer.is_err() {
            tokio::time::sleep(PATIENCE).await;
        }
        answer?;
        Ok(Hello {
            protocol: 1,
            agent_version: "fake".to_owned(),
            kernel_release: "6.1.0-fake".to_owned(),
            timings: vec![Timing { name: "booting.kernel".to_owned(), micros: 40_000 }],
        })
    }

    async fn exec(
        &self,
        id: &MachineId,
        endpoint: &GuestEndpoint,
        mut input: BoxStream<ExecInput>,
    ) -> Result<BoxStream<Result<ExecOutput>>> {
        self.line.call(Method::GuestExec, || self.answers(id, endpoint)).await?;
        let (exec, seen) = match input.next().await {
            Some(ExecInput::Start(start)) => match self.spawn(id, &start) {
                Ok(()) => (start.id, 0),
                Err((reason, message)) => return Ok(only(ExecOutput::Failed { reason, message })),
            },
            Some(ExecInput::Attach(attach)) => (attach.id, attach.stdout),
            _ => return Err(Error::new(Kind::InvalidArgument, "exec: the first frame must be start or attach")),
        };
        let attachment =
            Attachment { host: Arc::clone(&self.host), machine: id.clone(), exec, seen, input: Some(input) };
        Ok(attachment.into_stream())
    }

    async fn shutdown(&self, id: &MachineId, endpoint: &GuestEndpoint, _grace: Millis) -> Result<()> {
        let work = || {
            self.answers(id, endpoint)?;
            self.host.change(|inventory| {
                let Shutdown::After(time) = inventory.shutdown else { return };
                if let Some(FakeProcess::Lives { ends, .. }) = inventory.machines.get_mut(id).map(|m| &mut m.process) {
                    *ends = Some((Instant::now() + time, VmmEnd::Code(0)));
                }
            });
            Ok(())
        };
        self.line.call(Method::GuestShutdown, work).await
    }

    fn forget(&self, _id: &MachineId) {}
}

impl FakeGuest {
    fn answers(&self, id: &MachineId, endpoint: &GuestEndpoint) -> Result<()> {
        let mut inventory = self.host.lock();
        if *endpoint != crate::vmm::endpoint(id) {
            inventory.violation(format!("machine {id} was looked for at {endpoint:?}"));
            return Err(Error::new(Kind::FailedPrecondition, format!("guest {id}: another machine answers")));
        }
        let up = match inventory.machines.get(id).map(|machine| &machine.process) {
            Some(FakeProcess::Lives { ready_at: Some(at), .. }) => *at <= Instant::now(),
            _ => false,
        };
        if up { Ok(()) } else { Err(Error::new(Kind::Unavailable, format!("guest {id}: it does not answer"))) }
    }

    fn spawn(&self, id: &MachineId, start: &ExecStart) -> Result<(), (ExecFailedReason, String)> {
        let words: Vec<String> = start.argv.iter().map(|word| String::from_utf8_lossy(word).into_owned()).collect();
        let number = || words.get(1).and_then(|word| word.parse::<u32>().ok()).unwrap_or(0);
        let now = Instant::now();
        let (output, ends_at, code) = match words.first().map(String::as_str) {
            Some("true") => (String::new(), Some(now), 0),
            Some("exit") => (String::new(), Some(now), number()),
            Some("echo") => (words[1..].join(" ") + "\n", Some(now), 0),
            Some("sleep") => (String::new(), Some(now + Duration::from_secs(number().into())), 0),
            Some("cat") => (String::new(), None, 0),
            other => return Err((ExecFailedReason::NotFound, format!("{other:?}: no such program"))),
        };
        let end = ExecEnd::Code(i32::try_from(code).unwrap_or(i32::MAX));
        let exec = FakeExec { output: output.into_bytes(), ends_at, end, killed: false };
        self.host.change(|inventory| {
            if let Some(machine) = inventory.machines.get_mut(id) {
                machine.execs.entry(start.id.clone()).or_insert(exec);
            }
        });
        Ok(())
    }
}

fn only(output: ExecOutput) -> BoxStream<Result<ExecOutput>> {
    futures_util::stream::iter([Ok(output)]).boxed()
}

struct Attachment {
    host: Arc<FakeHost>,
    machine: MachineId,
    exec: ExecId,
    /// Bytes of output that this attachment has told.
    seen: u64,
    input: Option<BoxStream<ExecInput>>,
}

impl Attachment {
    fn into_stream(self) -> BoxStream<Result<ExecOutput>> {
        let started = ExecOutput::Started { id: self.exec.clone(), pid: 2, stdin: 0 };
        let rest = futures_util::stream::unfold(Some(self), |attachment| async move {
            let mut attachment = attachment?;
            let output = attachment.next().await;
            let ended = matches!(output, Err(_) | Ok(ExecOutput::Exited(_) | ExecOutput::Failed { .. }));
            Some((output, (!ended).then_some(attachment)))
        });
        only(started).chain(rest).boxed()
    }

    async fn next(&mut self) -> Result<ExecOutput> {
        loop {
            let (host, machine, exec, seen) =
                (Arc::clone(&self.host), self.machine.clone(), self.exec.clone(), self.seen);
            let told = host.wait_for(|inventory| output(inventory, &machine, &exec, seen));
            let Some(input) = &mut self.input else { break };
            tokio::select! {
                biased;
                output = told => return self.tell(output),
                frame = input.next() => self.take(frame),
            }
        }
        let (host, machine, exec, seen) = (Arc::clone(&self.host), self.machine.clone(), self.exec.clone(), self.seen);
        let output = host.wait_for(|inventory| output(inventory, &machine, &exec, seen)).await;
        self.tell(output)
    }

    fn tell(&mut self, output: Result<ExecOutput>) -> Result<ExecOutput> {
        if let Ok(ExecOutput::Stdout { data, .. }) = &output {
            self.seen += u64::try_from(data.len()).unwrap_or(0);
        }
        output
    }

    fn take(&mut self, frame: Option<ExecInput>) {
        let Some(frame) = frame else {
            self.input = None;
            return;
        };
        self.host.change(|inventory| {
            let machine = inventory.machines.get_mut(&self.machine);
            let Some(exec) = machine.and_then(|machine| machine.execs.get_mut(&self.exec)) else { return };
            match frame {
                ExecInput::Stdin { data, .. } => exec.output.extend_from_slice(&data),
                ExecInput::StdinEnd { .. } => {
                    exec.ends_at.get_or_insert_with(Instant::now);
                }
                ExecInput::Hangup | ExecInput::Signal(_) => exec.killed = true,
                _ => {}
            }
        });
    }
}

/// What there is to tell of an exec; `None`: nothing yet.
fn output(inventory: &Inventory, machine: &MachineId, exec: &ExecId, seen: u64) -> Option<Result<ExecOutput>> {
    let lost = || Err(Error::new(Kind::Unavailable, format!("guest {machine}: the connection was lost")));
    let Some(found) = inventory.machines.get(machine) else { return Some(lost()) };
    if !matches!(found.process, FakeProcess::Lives { .. }) {
        return Some(lost());
    }
    let Some(exec) = found.execs.get(exec) else {
        let message = format!("exec {exec}: not known");
        return Some(Ok(ExecOutput::Failed { reason: ExecFailedReason::UnknownExec, message }));
    };
    let start = usize::try_from(seen).unwrap_or(usize::MAX).min(exec.output.len());
    if start < exec.output.len() {
        let data = Bytes::copy_from_slice(&exec.output[start..]);
        return Some(Ok(ExecOutput::Stdout { offset: seen, data }));
    }
    let over = exec.killed || exec.ends_at.is_some_and(|at| at <= Instant::now());
    over.then(|| {
        let end = if exec.killed { ExecEnd::Signal(9) } else { exec.end };
        let stdout_bytes = u64::try_from(exec.output.len()).unwrap_or(0);
        let exited = ExecExited { end, timed_out: false, spawn_to_exit_us: 0, stdout_bytes, stderr_bytes: 0 };
        Ok(ExecOutput::Exited(exited))
    })
}
