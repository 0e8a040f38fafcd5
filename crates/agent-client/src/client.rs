//! The port, and one kept connection per machine.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use clawpot_common::agent::v1::agent_client::AgentClient as Wire;
use clawpot_common::agent::v1::{HelloRequest, HelloResponse, ShutdownRequest};
use clawpot_common::{AGENT_PROTOCOL, MAX_MESSAGE_BYTES};
use clawpot_core::exec::{ExecInput, ExecOutput};
use clawpot_core::ports::{BoxStream, Guest, GuestEndpoint, Hello};
use clawpot_core::{MachineId, Timing};
use clawpot_types::{Error, Kind, Millis, Result};
use tonic::transport::Channel;
use tonic::{Code, Status};

use crate::dial::{self, Connection};
use crate::exec;

/// One attempt at a hello, on a connection that is open.
const HELLO: Duration = Duration::from_secs(2);
/// Until an agent says that it will shut down. Not until it has.
const SHUTDOWN: Duration = Duration::from_secs(2);
/// Longest text taken from a guest's hello, characters.
const MAX_TEXT: usize = 100;

#[derive(Debug, Default)]
pub struct AgentClient {
    connections: Mutex<BTreeMap<MachineId, Connection>>,
}

impl AgentClient {
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<MachineId, Connection>> {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The kept connection, or a new one.
    async fn channel(&self, id: &MachineId, endpoint: &GuestEndpoint) -> Result<Channel> {
        if let Some(kept) = self.lock().get(id).filter(|kept| kept.is_open()) {
            return Ok(kept.channel.clone());
        }
        let made = dial::dial(endpoint).await?;
        // Two callers may have dialled at once: the first one's connection serves both.
        let mut kept = self.lock();
        let entry = kept.entry(id.clone()).or_insert_with(|| made.clone());
        if !entry.is_open() {
            *entry = made;
        }
        Ok(entry.channel.clone())
    }

    fn wire(channel: Channel) -> Wire<Channel> {
        Wire::new(channel).max_decoding_message_size(MAX_MESSAGE_BYTES).max_encoding_message_size(MAX_MESSAGE_BYTES)
    }

    /// A connection that broke is not kept.
    fn failed(&self, id: &MachineId, doing: &str, status: &Status) -> Error {
        let error = told(doing, status);
        if error.kind() == Kind::Unavailable {
            self.forget(id);
        }
        error
    }
}

#[async_trait]
impl Guest for AgentClient {
    async fn hello(&self, id: &MachineId, endpoint: &GuestEndpoint) -> Result<Hello> {
        let channel = self.channel(id, endpoint).await?;
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let request = HelloRequest {
            protocol: AGENT_PROTOCOL,
            host_time_ns: u64::try_from(since.as_nanos()).unwrap_or(u64::MAX),
            vm_id: id.vm.to_string(),
            incarnation: id.incarnation.0,
        };
        match tokio::time::timeout(HELLO, Self::wire(channel).hello(request)).await {
            Ok(Ok(answer)) => hello(answer.into_inner()),
            Ok(Err(status)) => Err(self.failed(id, "saying hello", &status)),
            Err(_) => {
                self.forget(id);
                Err(Error::new(Kind::Timeout, format!("guest agent: no answer to hello within {} s", HELLO.as_secs())))
            }
        }
    }

    async fn exec(
        &self,
        id: &MachineId,
        endpoint: &GuestEndpoint,
        input: BoxStream<ExecInput>,
    ) -> Result<BoxStream<Result<ExecOutput>>> {
        let channel = self.channel(id, endpoint).await?;
        let (frames, attachment) = exec::outgoing(input);
        match Self::wire(channel).exec(frames).await {
            Ok(answer) => Ok(exec::incoming(answer.into_inner(), attachment)),
            Err(status) => Err(self.failed(id, "opening an exec", &status)),
        }
    }

    async fn shutdown(&self, id: &MachineId, endpoint: &GuestEndpoint, grace: Millis) -> Result<()> {
        let channel = self.channel(id, endpoint).await?;
        let request = ShutdownRequest { grace_ms: grace.0 };
        match tokio::time::timeout(SHUTDOWN, Self::wire(channel).shutdown(request)).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(status)) => Err(self.failed(id, "asking it to shut down", &status)),
            Err(_) => Err(Error::new(Kind::Timeout, "guest agent: no answer to shutdown")),
        }
    }

    fn forget(&self, id: &MachineId) {
        self.lock().remove(id);
    }
}

/// A guest's status as ours; its words are cut and cleaned.
pub(crate) fn told(doing: &str, status: &Status) -> Error {
    let kind = match status.code() {
        Code::FailedPrecondition => Kind::FailedPrecondition,
        Code::InvalidArgument => Kind::InvalidArgument,
        Code::NotFound => Kind::NotFound,
        Code::ResourceExhausted => Kind::Exhausted,
        Code::Unimplemented => Kind::Unsupported,
        Code::DeadlineExceeded => Kind::Timeout,
        // Whatever else a broken connection or a broken agent says.
        _ => Kind::Unavailable,
    };
    Error::new(kind, format!("guest agent: {doing}")).because(clean(status.message()))
}

/// What a guest says of itself, cut, cleaned and checked.
pub fn hello(answer: HelloResponse) -> Result<Hello> {
    if answer.protocol == 0 || answer.protocol > AGENT_PROTOCOL {
        let what = format!(
            "guest agent: it wants to speak protocol {}, this server knows 1 to {AGENT_PROTOCOL}",
            answer.protocol
        );
        return Err(Error::new(Kind::Unsupported, what));
    }
    let stretch = |name: &str, from: u64, to: u64| Timing { name: name.to_owned(), micros: to.saturating_sub(from) };
    Ok(Hello {
        protocol: answer.protocol,
        agent_version: clean(&answer.agent_version),
        kernel_release: clean(&answer.kernel_release),
        timings: vec![
            stretch("booting.kernel", 0, answer.agent_start_us),
            stretch("booting.rootfs", answer.agent_start_us, answer.rootfs_ready_us),
            stretch("booting.agent", answer.rootfs_ready_us, answer.listening_us),
        ],
    })
}

/// Text from a guest: short, and without what moves a terminal's cursor.
pub(crate) fn clean(text: &str) -> String {
    text.chars().take(MAX_TEXT * 5).map(|c| if c.is_control() { '?' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guests_words_are_bounded_and_clean() {
        assert_eq!(clean("a\x1b[2Jb\n"), "a?[2Jb?");
        assert_eq!(clean(&"x".repeat(10_000)).len(), 500);
        let status = Status::internal("\x07");
        assert_eq!(told("saying hello", &status).chain(), "guest agent: saying hello: ?");
    }

    #[test]
    fn an_unknown_protocol_is_refused() {
        let answer = HelloResponse { protocol: AGENT_PROTOCOL + 1, ..Default::default() };
        assert_eq!(hello(answer).unwrap_err().kind(), Kind::Unsupported);
    }

    #[test]
    fn stretches_of_a_lying_clock_are_zero_not_huge() {
        let answer =
            HelloResponse { protocol: 1, agent_start_us: 9, rootfs_ready_us: 5, listening_us: 7, ..Default::default() };
        let micros: Vec<_> = hello(answer).unwrap().timings.iter().map(|timing| timing.micros).collect();
        assert_eq!(micros, [9, 0, 2]);
    }
}
