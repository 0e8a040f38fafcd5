//! Exec: waits for a VM on its way up, then relays frames. Nothing is buffered here beyond one frame.

use std::sync::Arc;
use std::task::Poll;

use clawpot_core::admission::may_have_machine;
use clawpot_core::event::{ATTACH, EXEC};
use clawpot_core::exec::{ExecInput, ExecOutput, ExecStart};
use clawpot_core::ports::{BoxStream, Txn};
use clawpot_core::request::{Answer, Request, answer};
use clawpot_core::{MachineId, Phase, VmRecord};
use clawpot_types::{Error, Kind, Result, VmId};
use futures_util::StreamExt as _;
use tokio::sync::broadcast::error::RecvError;
use tracing::warn;

use super::{Service, because_quarantined, event, known};
use crate::live::{Link, Lives};

/// How long an exec waits at most until a running VM's guest is attached, a boot of 120 s before it included; attaching
/// takes the runner some milliseconds.
const READY: std::time::Duration = std::time::Duration::from_secs(150);

/// Characters of a program's name in an event.
const SHOWN_PROGRAM: usize = 200;

impl Service {
    /// One attachment to one exec in `vm`. `first` is `Start` or `Attach`; `rest` what the caller sends after.
    pub async fn exec(
        &self,
        vm: &str,
        first: ExecInput,
        rest: BoxStream<ExecInput>,
        actor: &str,
    ) -> Result<BoxStream<Result<ExecOutput>>> {
        let id = self.records.find(vm)?;
        let mut attachment = Attachment::new(self, &id);
        let (record, link) = self.ready(&id).await?;
        let first = match first {
            ExecInput::Start(start) => {
                self.tell_exec(&record, &start, actor).await;
                ExecInput::Start(with_defaults(start, &record))
            }
            ExecInput::Attach(attach) => {
                if self.lives.is_new_user(&id, &attach.id, actor) {
                    self.tell_of_command(&record, ATTACH, attach.id.to_string(), actor).await;
                }
                ExecInput::Attach(attach)
            }
            other => other,
        };
        let input = Box::pin(futures_util::stream::once(async { first }).chain(rest));
        let mut over = Box::pin(self.machine_over(id, link.machine.clone()));
        let mut output = tokio::select! {
            biased;
            output = self.deps.guest.exec(&link.machine, &link.endpoint, input) => output?,
            error = &mut over => return Err(error),
        };
        let mut over = Some(over);
        Ok(Box::pin(futures_util::stream::poll_fn(move |cx| {
            let Some(ended) = &mut over else { return Poll::Ready(None) };
            let next = match output.poll_next_unpin(cx) {
                // A connection into a machine that is gone breaks only when keep-alive gives up, many seconds later.
                Poll::Pending => ended.as_mut().poll(cx).map(|error| Some(Err(error))),
                ready => ready,
            };
            match &next {
                Poll::Ready(Some(Ok(ExecOutput::Exited(_) | ExecOutput::Failed { .. }))) => attachment.end(),
                Poll::Ready(Some(Err(_))) => over = None,
                _ => {}
            }
            next
        })))
    }

    /// Who ran which program; its arguments may be secrets. Written before it runs; on a store that cannot be written commands
    /// run all the same.
    async fn tell_exec(&self, record: &VmRecord, start: &ExecStart, actor: &str) {
        let program = start.argv.first().map(|program| String::from_utf8_lossy(program)).unwrap_or_default();
        let shown: String = program.chars().filter(|c| !c.is_control()).take(SHOWN_PROGRAM).collect();
        // It is known by this event, so that its client may come back without another.
        let _known = self.lives.is_new_user(&record.id, &start.id, actor);
        self.tell_of_command(record, EXEC, format!("{}: {shown}", start.id), actor).await;
    }

    async fn tell_of_command(&self, record: &VmRecord, kind: &'static str, message: String, actor: &str) {
        let told = event(&self.deps, record, kind, message, actor);
        if let Err(error) = self.records.store().txn(Txn { events: vec![told], ..Txn::default() }).await {
            warn!(vm = %record.id, error = error.chain(), "writing the event of a command");
        }
    }

    /// Returns once no exec of this machine can say anything any more, and why.
    pub(crate) fn machine_over(&self, id: VmId, machine: MachineId) -> impl Future<Output = Error> + Send + 'static {
        let (records, mut changes) = (self.records.clone(), self.records.subscribe());
        async move {
            loop {
                match known(&id, records.get(&id)) {
                    Err(error) => return error,
                    Ok((_, record)) if record.machine() != machine => {
                        return Error::new(Kind::Unavailable, format!("VM {}: it was started anew", record.name));
                    }
                    Ok((_, record)) => match record.phase {
                        Phase::Failed => return denied(&record, "it has failed"),
                        Phase::Quarantined => return denied(&record, "it is quarantined"),
                        Phase::Stopped => return denied(&record, "it was stopped meanwhile"),
                        Phase::Deleting => {
                            let what = format!("VM {}: it is being deleted, and so is its command", record.name);
                            return Error::new(Kind::FailedPrecondition, what);
                        }
                        _ => {}
                    },
                }
                if let Err(RecvError::Closed) = changes.recv().await {
                    return Error::new(Kind::Unavailable, "the server is going");
                }
            }
        }
    }

    /// The VM's guest, once it answers. Waits while the VM is on its way to Running.
    pub(crate) async fn ready(&self, id: &VmId) -> Result<(Arc<VmRecord>, Link)> {
        let mut changes = self.records.subscribe();
        let asked = self.deps.clock.now();
        loop {
            let (_, record) = known(id, self.records.get(id))?;
            match answer(Request::Exec, record.phase, record.desired) {
                Answer::Deny(_) if started_again(&record) => {}
                Answer::Deny(why) => return Err(denied(&record, why)),
                Answer::Accept => {
                    let link = self.lives.link(id).filter(|link| link.machine == record.machine());
                    if let Some(link) = link {
                        return Ok((record, link));
                    }
                    // Running before this daemon was: its runner attaches in a moment, or cannot.
                    if self.deps.clock.now().since(asked) > READY {
                        let what = format!("VM {}: it runs, but its guest cannot be attached", record.name);
                        return Err(Error::new(Kind::Unavailable, what).hint(format!(
                            "look at `clawpot logs {0}` and the server's log; `clawpot stop {0}` ends it",
                            record.name
                        )));
                    }
                    tokio::time::sleep(std::time::Duration::from_millis(10)).await;
                    continue;
                }
                Answer::Await | Answer::Ignore => {}
            }
            loop {
                match changes.recv().await {
                    Ok(changed) if changed.id != *id => {}
                    Ok(_) | Err(RecvError::Lagged(_)) => break,
                    Err(RecvError::Closed) => return Err(Error::new(Kind::Unavailable, "the server is going")),
                }
            }
        }
    }
}

/// It has failed, and its owner has asked for another start since, or its policy will.
fn started_again(record: &VmRecord) -> bool {
    record.phase == Phase::Failed && may_have_machine(record)
}

fn denied(record: &VmRecord, why: &str) -> Error {
    let mut error =
        Error::new(Kind::FailedPrecondition, format!("VM {}: cannot run a command in it: {why}", record.name));
    if let (Phase::Failed, Some(failure)) = (record.phase, &record.failure) {
        error = error.because(failure.message.clone());
        let start = format!("look at `clawpot logs {0}`, then `clawpot start {0}`", record.name);
        return error.hint(failure.hint.clone().unwrap_or(start));
    }
    if record.phase == Phase::Quarantined {
        return because_quarantined(record, error);
    }
    error.hint(format!("clawpot start {}", record.name))
}

/// The exec's own settings win over the VM's.
fn with_defaults(mut start: ExecStart, record: &VmRecord) -> ExecStart {
    let spec = &record.spec;
    let mut env: Vec<_> = spec
        .env
        .iter()
        .map(|(name, value)| (name.clone().into_bytes().into(), value.clone().into_bytes().into()))
        .filter(|(name, _)| !start.env.iter().any(|(own, _)| own == name))
        .collect();
    env.append(&mut start.env);
    start.env = env;
    if start.cwd.is_empty() {
        start.cwd.clone_from(&spec.cwd);
    }
    if start.user.is_empty() {
        start.user.clone_from(&spec.user);
    }
    start
}

/// Counts a client as attached for as long as it lives.
pub(crate) struct Attachment {
    lives: Arc<Lives>,
    clock: Arc<dyn clawpot_core::ports::Clock>,
    id: VmId,
    ended: bool,
}

impl Attachment {
    pub(crate) fn new(service: &Service, id: &VmId) -> Self {
        service.lives.attach(id);
        Self { lives: service.lives.clone(), clock: service.deps.clock.clone(), id: id.clone(), ended: false }
    }

    fn end(&mut self) {
        self.ended = true;
    }
}

impl Drop for Attachment {
    fn drop(&mut self) {
        self.lives.detach(&self.id, self.ended, self.clock.now());
    }
}
