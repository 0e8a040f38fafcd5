//! A client of QEMU's machine protocol: one JSON object a line, over the machine's `api.sock`.
//!
//! A guest that has taken QEMU over speaks here: lines, events and waiting are bounded.

use std::path::Path;
use std::time::Duration;

use clawpot_types::{Error, Kind, Result};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;

/// Longest line that is read, bytes. The answers that are asked for here are under 1 KiB.
const LINE_LIMIT: u64 = 64 << 10;
/// Events that may come before an answer.
const EVENT_LIMIT: usize = 1000;
/// How long one command may take, from its sending to its answer.
const CALL_LIMIT: Duration = Duration::from_secs(10);

/// One connection. QEMU serves one at a time: drop it when done.
#[derive(Debug)]
pub struct Qmp {
    stream: BufReader<UnixStream>,
    next_id: u64,
}

/// `query-status`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Status {
    /// The guest's CPUs are running.
    pub running: bool,
    /// "running", "paused", "internal-error", …
    pub status: String,
}

#[derive(Deserialize)]
struct Line {
    id: Option<u64>,
    #[serde(rename = "return")]
    answer: Option<Value>,
    error: Option<Refusal>,
    event: Option<String>,
    #[serde(rename = "QMP")]
    greeting: Option<Value>,
}

#[derive(Deserialize)]
struct Refusal {
    class: String,
    desc: String,
}

impl Qmp {
    /// Connects and greets. `NotFound`, `Unavailable`: QEMU does not listen (yet).
    pub async fn connect(socket: &Path) -> Result<Self> {
        let stream = clawpot_host::unix::connect(socket).await?;
        let mut this = Self { stream: BufReader::new(stream), next_id: 0 };
        let greeting = limited("waiting for QEMU's greeting", this.line()).await?;
        if greeting.greeting.is_none() {
            return Err(Error::new(Kind::Corrupt, "waiting for QEMU's greeting: something else came"));
        }
        this.call("qmp_capabilities", Value::Null).await?;
        Ok(this)
    }

    pub async fn status(&mut self) -> Result<Status> {
        let answer = self.call("query-status", Value::Null).await?;
        serde_json::from_value(answer)
            .map_err(|error| Error::new(Kind::Corrupt, "QMP query-status: reading the answer").because(error))
    }

    /// The guest's CPUs stand still.
    pub async fn stop(&mut self) -> Result<()> {
        self.call("stop", Value::Null).await.map(drop)
    }

    /// They go on.
    pub async fn cont(&mut self) -> Result<()> {
        self.call("cont", Value::Null).await.map(drop)
    }

    /// QEMU flushes its disks and ends. Its answer may be cut off by its end.
    pub async fn quit(mut self) -> Result<()> {
        match self.call("quit", Value::Null).await {
            Err(error) if error.kind() == Kind::Unavailable => Ok(()),
            other => other.map(drop),
        }
    }

    /// One command and its answer; events in between are passed over.
    pub async fn call(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let what = format!("QMP {command}");
        limited(&what, self.exchange(command, arguments)).await
    }

    async fn exchange(&mut self, command: &str, arguments: Value) -> Result<Value> {
        self.next_id += 1;
        let id = self.next_id;
        let mut request = json!({ "execute": command, "id": id });
        if !arguments.is_null() {
            request["arguments"] = arguments;
        }
        let mut line = request.to_string();
        line.push('\n');
        let sent = self.stream.write_all(line.as_bytes()).await;
        sent.map_err(|error| Error::io("sending", error))?;
        for _ in 0..EVENT_LIMIT {
            let line = self.line().await?;
            if let Some(event) = line.event {
                tracing::debug!(event, "QMP");
            } else if line.id == Some(id) {
                return match (line.answer, line.error) {
                    (Some(answer), _) => Ok(answer),
                    (None, Some(Refusal { class, desc })) => {
                        Err(Error::new(Kind::Internal, format!("QEMU refuses: {class}: {}", shown(&desc))))
                    }
                    (None, None) => Err(Error::new(Kind::Corrupt, "an answer without result and without error")),
                };
            }
        }
        Err(Error::new(Kind::Corrupt, format!("{EVENT_LIMIT} lines came and none was the answer")))
    }

    async fn line(&mut self) -> Result<Line> {
        let mut bytes = Vec::new();
        let read = (&mut self.stream).take(LINE_LIMIT).read_until(b'\n', &mut bytes).await;
        match read.map_err(|error| Error::io("reading", error))? {
            0 => return Err(Error::new(Kind::Unavailable, "QEMU closed the connection")),
            _ if bytes.last() != Some(&b'\n') => {
                return Err(Error::new(Kind::Corrupt, format!("a line is cut off or over {LINE_LIMIT} bytes")));
            }
            _ => {}
        }
        serde_json::from_slice(&bytes).map_err(|error| Error::new(Kind::Corrupt, "reading a line").because(error))
    }
}

async fn limited<T>(what: &str, work: impl Future<Output = Result<T>>) -> Result<T> {
    match tokio::time::timeout(CALL_LIMIT, work).await {
        Ok(done) => done.map_err(|error| error.context(what)),
        Err(_) => Err(Error::new(Kind::Timeout, format!("{what}: no answer within {} s", CALL_LIMIT.as_secs()))),
    }
}

fn shown(text: &str) -> String {
    text.chars().take(300).map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const GREETING: &str =
        r#"{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}}, "capabilities": ["oob"]}}"#;

    /// A QEMU that greets, then answers each line of the client with the next of `answers`.
    async fn qemu(greeting: &'static str, answers: Vec<String>) -> (tempfile::TempDir, Result<Qmp>) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api.sock");
        let listener = clawpot_host::unix::listen(&path).unwrap();
        tokio::spawn(async move {
            let (stream, _) = listener.accept().await.unwrap();
            let mut stream = BufReader::new(stream);
            stream.write_all(format!("{greeting}\r\n").as_bytes()).await.unwrap();
            for answer in answers {
                let mut line = String::new();
                stream.read_line(&mut line).await.unwrap();
                if stream.write_all(answer.as_bytes()).await.is_err() {
                    return;
                }
            }
        });
        let client = Qmp::connect(&path).await;
        (dir, client)
    }

    fn lines(lines: &[&str]) -> Vec<String> {
        lines.iter().map(|line| format!("{line}\r\n")).collect()
    }

    #[tokio::test]
    async fn events_are_passed_over_and_answers_matched() {
        let event = r#"{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "RESUME"}"#;
        let stray = r#"{"return": {}, "id": 99}"#;
        let status = r#"{"return": {"status": "running", "singlestep": false, "running": true}, "id": 2}"#;
        let refusal = r#"{"id": 3, "error": {"class": "GenericError", "desc": "no\u001b[2Jway"}}"#;
        let answers = [r#"{"return": {}, "id": 1}"#, &format!("{event}\r\n{stray}\r\n{status}"), refusal];
        let (_dir, client) = qemu(GREETING, lines(&answers)).await;
        let mut client = client.unwrap();
        assert_eq!(client.status().await.unwrap(), Status { running: true, status: "running".to_owned() });
        let error = client.stop().await.unwrap_err();
        assert_eq!(error.chain(), "QMP stop: QEMU refuses: GenericError: no [2Jway");
        // QEMU is gone.
        assert_eq!(client.status().await.unwrap_err().kind(), Kind::Unavailable);
    }

    #[tokio::test]
    async fn what_is_not_qmp_is_an_error_of_bounded_size() {
        for greeting in ["HTTP/1.1 200 OK", r#"{"return": {}}"#, "{"] {
            let (_dir, client) = qemu(greeting, Vec::new()).await;
            assert_eq!(client.unwrap_err().kind(), Kind::Corrupt, "{greeting}");
        }
        let ok = r#"{"return": {}, "id": 1}"#.to_owned() + "\n";
        let (_dir, client) = qemu(GREETING, vec![ok.clone(), "x".repeat(1 << 20)]).await;
        assert_eq!(client.unwrap().status().await.unwrap_err().kind(), Kind::Corrupt);
        let events = r#"{"event": "NIC_RX_FILTER_CHANGED"}"#.to_owned() + "\n";
        let (_dir, client) = qemu(GREETING, vec![ok, events.repeat(EVENT_LIMIT + 10)]).await;
        assert_eq!(client.unwrap().status().await.unwrap_err().kind(), Kind::Corrupt);
    }
}
