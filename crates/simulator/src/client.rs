//! Clients as they are: they ask again when an answer is lost, hang up when they like, and believe what they are told.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use clawpot_core::Desired;
use clawpot_core::exec::{ExecAttach, ExecEnd, ExecInput, ExecOutput, ExecStart};
use clawpot_core::ports::Check;
use clawpot_testkit::time::mix;
use clawpot_types::{Error, ExecId, Kind, MiB, Millis, Result, Retry, Revision, VmId};
use futures_util::StreamExt as _;

use crate::operation::{Operation, Program, Target, VolumeVerb, body, volume_name};
use crate::world::World;

const ACTOR: &str = "uid=1000";
/// How often a client asks again before it gives up.
const ATTEMPTS: usize = 8;
const PAUSE: Duration = Duration::from_millis(50);

/// Does what a client does for `operation`; `number` tells one exec from another.
pub async fn act(world: Arc<World>, operation: Operation, number: u64) {
    match operation {
        Operation::Create { request, altered } => create(&world, request, altered).await,
        Operation::Keep(target, life) => keep(&world, &target, life.map(Millis)).await,
        Operation::Start(target) => start(&world, &target).await,
        Operation::Stop(target, grace) => stop(&world, &target, Millis(grace)).await,
        Operation::Delete(target) => delete(&world, &target, false).await,
        Operation::Force(target) => delete(&world, &target, true).await,
        Operation::Exec(target, program, leaves) => {
            let word = target_word(&world, &target);
            let running = exec(&world, &word, &program, number);
            match leaves {
                // Its client goes away in the middle.
                Some(after) => drop(tokio::time::timeout(Duration::from_millis(after), running).await),
                None => drop(running.await),
            }
        }
        Operation::Read(target) => read(&world, &target).await,
        Operation::Logs(target) => logs(&world, &target).await,
        Operation::Events(target) => events(&world, &target).await,
        Operation::Volume(number, verb) => volume(&world, number, verb).await,
        // What befalls the host is no client's.
        _ => {}
    }
}

/// The word by which a client means a VM.
#[must_use]
pub fn target_word(world: &World, target: &Target) -> String {
    match target {
        Target::Name(number) => format!("vm-{number}"),
        Target::Nth(number) => nth(world.oracle.vms().into_keys().collect(), *number),
        Target::Once(number) => nth(world.oracle.known(), *number),
        Target::Nobody => "nobody".to_owned(),
    }
}

fn nth(vms: Vec<VmId>, number: u64) -> String {
    let count = u64::try_from(vms.len()).unwrap_or(1).max(1);
    let at = usize::try_from(number % count).unwrap_or(0);
    vms.get(at).map_or_else(|| "nobody".to_owned(), |id| id.as_str().to_owned())
}

/// Asks until there is an answer that asking again would not change.
async fn insist<T>(world: &World, question: impl AsyncFn(clawpot_control::Service) -> Result<T>) -> Option<Result<T>> {
    let mut last = None;
    for _ in 0..ATTEMPTS {
        match world.ask(&question).await {
            None => {}
            Some(Err(error)) if error.retry() == Retry::Later => last = Some(Err(error)),
            answer => return answer,
        }
        tokio::time::sleep(PAUSE).await;
    }
    last
}

async fn create(world: &World, request: u64, altered: bool) {
    let body = body(request, altered);
    let request = format!("r-{request}");
    let answer =
        insist(world, async |service| service.create(&request, body.clone(), ACTOR).await.map(|(_, record)| record))
            .await;
    match answer {
        // Another body for a known request is refused.
        Some(Ok(record)) if record.spec.memory != body.spec.memory => {
            world.oracle.broken(format!("request {request} with another body was answered with VM {}", record.id));
        }
        Some(Ok(_)) if altered => {}
        Some(Ok(record)) => world.oracle.created(&request, &record.id),
        Some(Err(error)) => unhappy(world, "create", &error),
        None => {}
    }
}

/// Asked once: what became of it when no answer came, the next look tells.
async fn volume(world: &World, number: u64, verb: VolumeVerb) {
    let Some(name) = volume_name(number) else { return };
    let asked = name.clone();
    let answer = world.ask(async |service| match verb {
        VolumeVerb::Create => service.create_volume(asked, MiB(1024), ACTOR).await.map(drop),
        VolumeVerb::Resize(size) => service.resize_volume(asked, MiB(size), ACTOR).await.map(drop),
        VolumeVerb::Copy(other) => match volume_name(other) {
            Some(copy) => service.copy_volume(asked, copy, ACTOR).await.map(drop),
            None => Ok(()),
        },
        VolumeVerb::Check => service.check_volume(asked, Check::Whole, ACTOR).await.map(drop),
        VolumeVerb::Repair => service.check_volume(asked, Check::Repair, ACTOR).await.map(drop),
        VolumeVerb::Delete => service.delete_volume(asked, ACTOR).await,
        VolumeVerb::Read => match service.list_volumes().await {
            Ok((_, unreadable)) => {
                unreadable.into_iter().for_each(|(key, _)| world.oracle.broken(format!("{key} cannot be read")));
                service.get_volume(&asked).await.map(drop)
            }
            Err(error) => Err(error),
        },
    });
    if let Some(Err(error)) = answer.await {
        unhappy(world, &format!("volume {name}: {verb:?}"), &error);
    }
}

async fn start(world: &World, target: &Target) {
    let word = target_word(world, target);
    let answer = insist(world, async |service| {
        service.start(&word, ACTOR).await.map(|(revision, record)| (record.id.clone(), revision))
    });
    told(world, "start", answer.await, Desired::Running);
}

async fn stop(world: &World, target: &Target, grace: Millis) {
    let word = target_word(world, target);
    let answer = insist(world, async |service| {
        service.stop(&word, grace, ACTOR).await.map(|(revision, record)| (record.id.clone(), revision))
    });
    told(world, "stop", answer.await, Desired::Stopped);
}

async fn keep(world: &World, target: &Target, life: Option<Millis>) {
    let word = target_word(world, target);
    let answer = insist(world, async |service| service.keep(&word, life, ACTOR).await.map(drop));
    if let Some(Err(error)) = answer.await {
        unhappy(world, "keep", &error);
    }
}

async fn delete(world: &World, target: &Target, force: bool) {
    let word = target_word(world, target);
    let answer = insist(world, async |service| {
        if force && let Ok(id) = service.records().find(&word) {
            world.host.give_up(&id);
        }
        service.delete(&word, force, ACTOR).await.map(|id| (id, Revision(0)))
    });
    told(world, "delete", answer.await, Desired::Deleted);
}

fn told(world: &World, what: &str, answer: Option<Result<(VmId, Revision)>>, desired: Desired) {
    match answer {
        Some(Ok((id, revision))) => world.oracle.acknowledged(&id, revision, desired),
        Some(Err(error)) => unhappy(world, what, &error),
        None => {}
    }
}

/// In a run in which nothing went wrong, nothing is wrong.
fn unhappy(world: &World, what: &str, error: &Error) {
    world.tell(format!("{what}: {:?}: {}", error.kind(), error.chain()));
    let expected = matches!(
        error.kind(),
        Kind::NotFound | Kind::AlreadyExists | Kind::FailedPrecondition | Kind::InvalidArgument | Kind::Exhausted
    );
    if !expected && world.weather.always_calm() {
        world.oracle.broken(format!("{what} failed though nothing went wrong: {:?}: {}", error.kind(), error.chain()));
    }
}

impl Program {
    fn argv(&self) -> Vec<String> {
        match self {
            Self::True => vec!["true".to_owned()],
            Self::Exit(code) => vec!["exit".to_owned(), code.to_string()],
            Self::Echo => vec!["echo".to_owned(), "hello".to_owned()],
            Self::Sleep(seconds) => vec!["sleep".to_owned(), seconds.to_string()],
            Self::Cat => vec!["cat".to_owned()],
        }
    }

    fn expected(&self) -> (ExecEnd, &'static str) {
        match self {
            Self::Exit(code) => (ExecEnd::Code((*code).into()), ""),
            Self::Echo => (ExecEnd::Code(0), "hello\n"),
            Self::Cat => (ExecEnd::Code(0), "fed"),
            Self::True | Self::Sleep(_) => (ExecEnd::Code(0), ""),
        }
    }
}

/// Runs the program to its end, attaching again when the connection breaks.
///
/// # Errors
/// What the last attempt said.
pub async fn exec(world: &World, word: &str, program: &Program, number: u64) -> Result<()> {
    let id = exec_id(number);
    let mut output = String::new();
    let mut started = false;
    let mut last = Error::new(Kind::Unavailable, "the daemon died each time");
    for _ in 0..ATTEMPTS {
        let (first, rest) = frames(program, &id, started, &output);
        let attached = world.ask(async |service| service.exec(word, first, rest, "uid=0").await);
        match attached.await {
            Some(Ok(mut frames)) => loop {
                // A dead daemon's stream ends with it.
                let Some(frame) = world.ask(async |_| frames.next().await).await else { break };
                match frame {
                    Some(Ok(ExecOutput::Started { .. })) => started = true,
                    Some(Ok(ExecOutput::Stdout { offset, data })) => {
                        check_offset(world, &output, offset);
                        output.push_str(&String::from_utf8_lossy(&data));
                    }
                    Some(Ok(ExecOutput::Exited(exited))) => {
                        check_end(world, program, exited.end, &output);
                        return Ok(());
                    }
                    Some(Ok(ExecOutput::Failed { message, .. })) => return Err(Error::new(Kind::NotFound, message)),
                    Some(Ok(_)) => {}
                    Some(Err(error)) => {
                        last = error;
                        break;
                    }
                    None => {
                        world.oracle.broken(format!("exec in {word}: its output ended without an end"));
                        return Ok(());
                    }
                }
            },
            Some(Err(error)) if error.retry() == Retry::Later => last = error,
            Some(Err(error)) => return Err(error),
            None => {}
        }
        tokio::time::sleep(PAUSE).await;
    }
    Err(last)
}

type Input = clawpot_core::ports::BoxStream<ExecInput>;

fn frames(program: &Program, id: &ExecId, started: bool, output: &str) -> (ExecInput, Input) {
    let seen = u64::try_from(output.len()).unwrap_or(0);
    let mut rest = Vec::new();
    if *program == Program::Cat {
        if !started {
            rest.push(ExecInput::Stdin { offset: 0, data: Bytes::from_static(b"fed") });
        }
        rest.push(ExecInput::StdinEnd { offset: 3 });
    }
    let first = if started {
        ExecInput::Attach(ExecAttach { id: id.clone(), stdout: seen, stderr: 0 })
    } else {
        ExecInput::Start(ExecStart {
            id: id.clone(),
            argv: program.argv().into_iter().map(|word| word.into_bytes().into()).collect(),
            env: Vec::new(),
            cwd: String::new(),
            user: String::new(),
            timeout: Millis(0),
            stdin: *program == Program::Cat,
            tty: None,
        })
    };
    (first, futures_util::stream::iter(rest).chain(futures_util::stream::pending()).boxed())
}

fn check_offset(world: &World, output: &str, offset: u64) {
    if usize::try_from(offset) != Ok(output.len()) {
        world.oracle.broken(format!("exec: output at {offset} follows {} bytes", output.len()));
    }
}

fn check_end(world: &World, program: &Program, end: ExecEnd, output: &str) {
    let expected = program.expected();
    // What the fake's cat was fed twice, when its client had to begin again, is the fake's.
    if (end, output) != expected && *program != Program::Cat {
        world.oracle.broken(format!("exec of {program:?} ended with {end:?} and {output:?}"));
    }
}

fn exec_id(number: u64) -> ExecId {
    let mut bytes = [0; ExecId::LEN];
    bytes[..8].copy_from_slice(&mix(number).to_le_bytes());
    bytes[8..].copy_from_slice(&mix(mix(number)).to_le_bytes());
    ExecId::from_random(bytes)
}

async fn read(world: &World, target: &Target) {
    let word = target_word(world, target);
    let seen = world
        .ask(async |service| {
            let page = service.list(&BTreeMap::new(), 3, "")?;
            if !page.next.is_empty() {
                service.list(&BTreeMap::new(), 3, &page.next)?;
            }
            service.get(&word)
        })
        .await;
    if let Some(Err(error)) = seen {
        unhappy(world, "get", &error);
    }
}

async fn logs(world: &World, target: &Target) {
    let word = target_word(world, target);
    let lines = world.ask(async |service| {
        let mut lines = service.console(&word, 5, false).await?;
        while let Some(line) = lines.next().await {
            line?;
        }
        Ok(())
    });
    if let Some(Err(error)) = lines.await {
        unhappy(world, "logs", &error);
    }
}

async fn events(world: &World, target: &Target) {
    let word = target_word(world, target);
    let told = world.ask(async |service| {
        let events = service.events(&word, Revision(0), 0).await?;
        if !events.is_sorted_by_key(|event| event.id) {
            world.oracle.broken("events are out of order");
        }
        // Only its beginning: what is kept of one VM.
        let mut coming = service.watch_events(&word, Revision(0)).await?;
        if !events.is_empty() {
            coming.next().await;
        }
        Ok(())
    });
    if let Some(Err(error)) = told.await {
        unhappy(world, "events", &error);
    }
}
