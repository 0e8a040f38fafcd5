//! A client of Firecracker's API socket: one connection per call, each with a limit, each answer bounded.

use std::path::{Path, PathBuf};

use bytes::Bytes;
use clawpot_types::{Error, Kind, Result};
use http::{Request, StatusCode, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::net::UnixStream;
use tokio::task::JoinSet;

use super::api::{Call, Fault, InstanceInfo, Method, VersionAnswer};

/// Longest answer that is read, in bytes. The longest that Firecracker has for us is under 1 KiB.
const ANSWER_LIMIT: usize = 64 << 10;

/// Talks to the Firecracker that listens at a socket. The path may be longer than `sun_path`.
#[derive(Clone, Debug)]
pub struct Client {
    socket: PathBuf,
}

impl Client {
    #[must_use]
    pub fn new(socket: PathBuf) -> Self {
        Self { socket }
    }

    /// `NotFound`, `Unavailable`: it does not listen (yet).
    pub async fn info(&self) -> Result<InstanceInfo> {
        self.ask(&Call::get("/")).await
    }

    pub async fn version(&self) -> Result<VersionAnswer> {
        self.ask(&Call::get("/version")).await
    }

    /// A call whose answer holds nothing. `FailedPrecondition`: refused, with Firecracker's own words as the cause.
    pub async fn tell(&self, call: &Call) -> Result<()> {
        self.answer(call).await.map(drop)
    }

    async fn ask<T: DeserializeOwned>(&self, call: &Call) -> Result<T> {
        let answer = self.answer(call).await?;
        serde_json::from_slice(&answer)
            .map_err(|error| Error::new(Kind::Corrupt, format!("{}: reading the answer", what(call))).because(error))
    }

    async fn answer(&self, call: &Call) -> Result<Bytes> {
        let limit = call.limit();
        let (status, body) = tokio::time::timeout(limit, exchange(&self.socket, call)).await.unwrap_or_else(|_| {
            Err(Error::new(Kind::Timeout, format!("{}: no answer within {} s", what(call), limit.as_secs())))
        })?;
        if status.is_success() { Ok(body) } else { Err(refused(call, status, &body)) }
    }
}

fn what(call: &Call) -> String {
    format!("Firecracker's API: {} {}", method(call.method), call.path)
}

fn method(method: Method) -> http::Method {
    match method {
        Method::Get => http::Method::GET,
        Method::Put => http::Method::PUT,
    }
}

fn refused(call: &Call, status: StatusCode, body: &[u8]) -> Error {
    let said = match serde_json::from_slice::<Fault>(body) {
        Ok(fault) => fault.fault_message,
        Err(_) => String::from_utf8_lossy(body).chars().take(500).collect(),
    };
    let said: String = said.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    let kind = if status.is_client_error() { Kind::FailedPrecondition } else { Kind::Internal };
    Error::new(kind, format!("{}: refused with {}", what(call), status.as_u16())).because(said.trim())
}

async fn exchange(socket: &Path, call: &Call) -> Result<(StatusCode, Bytes)> {
    let stream = clawpot_host::unix::connect(socket).await.map_err(|error| error.context(what(call)))?;
    let failed = |error: hyper::Error| Error::new(Kind::Unavailable, what(call)).because(error);
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake::<_, Full<Bytes>>(TokioIo::<UnixStream>::new(stream))
            .await
            .map_err(failed)?;
    // Whoever drops this call drops the connection with it.
    let mut driver = JoinSet::new();
    driver.spawn(connection);
    let response = sender.send_request(request(call)?).await.map_err(failed)?;
    let (head, body) = response.into_parts();
    let body = Limited::new(body, ANSWER_LIMIT)
        .collect()
        .await
        .map_err(|error| Error::new(Kind::Unavailable, format!("{}: reading the answer", what(call))).because(error))?;
    Ok((head.status, body.to_bytes()))
}

fn request(call: &Call) -> Result<Request<Full<Bytes>>> {
    let body = match &call.body {
        Value::Null => Bytes::new(),
        body => Bytes::from(body.to_string()),
    };
    Request::builder()
        .method(method(call.method))
        .uri(&call.path)
        .header(header::HOST, "localhost")
        .header(header::ACCEPT, "application/json")
        .header(header::CONTENT_TYPE, "application/json")
        .body(Full::new(body))
        .map_err(|error| Error::new(Kind::Internal, what(call)).because(error))
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;
    use crate::firecracker::api::InstanceState;

    /// Answers one connection with `answer` and returns what was asked.
    async fn serve_once(socket: &Path, answer: String) -> tokio::task::JoinHandle<String> {
        let listener = clawpot_host::unix::listen(socket).unwrap();
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut asked = vec![0; 4096];
            let read = stream.read(&mut asked).await.unwrap();
            // The other side may hang up over an answer that is too long.
            drop(stream.write_all(answer.as_bytes()).await);
            String::from_utf8(asked[..read].to_vec()).unwrap()
        })
    }

    fn response(status: &str, body: &str) -> String {
        format!("HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}", body.len())
    }

    #[tokio::test]
    async fn asks_over_a_long_path() {
        let temp = tempfile::tempdir().unwrap();
        let deep = temp.path().join("d".repeat(100)).join("e".repeat(100));
        std::fs::create_dir_all(&deep).unwrap();
        let socket = deep.join("api.sock");
        let body = r#"{"id":"a-1","state":"Running","vmm_version":"1.16.1","app_name":"Firecracker"}"#;
        let server = serve_once(&socket, response("200 OK", body)).await;
        let info = Client::new(socket).info().await.unwrap();
        assert_eq!(info.state, InstanceState::Running);
        assert!(server.await.unwrap().starts_with("GET / HTTP/1.1\r\nhost: localhost\r\n"));
    }

    #[tokio::test]
    async fn a_refusal_keeps_what_firecracker_said() {
        let temp = tempfile::tempdir().unwrap();
        let socket = temp.path().join("s");
        let body = r#"{"fault_message":"Invalid boot source:\nno such file"}"#;
        let server = serve_once(&socket, response("400 Bad Request", body)).await;
        let call = Call::start().unwrap();
        let error = Client::new(socket).tell(&call).await.unwrap_err();
        assert_eq!(
            error.chain(),
            "Firecracker's API: PUT /actions: refused with 400: Invalid boot source: no such file"
        );
        assert_eq!(error.kind(), Kind::FailedPrecondition);
        assert!(server.await.unwrap().ends_with(r#"{"action_type":"InstanceStart"}"#));
    }

    #[tokio::test]
    async fn nobody_there_and_nonsense_are_told_apart() {
        let temp = tempfile::tempdir().unwrap();
        let client = Client::new(temp.path().join("none"));
        assert_eq!(client.info().await.unwrap_err().kind(), Kind::NotFound);

        let socket = temp.path().join("endless");
        let body = "x".repeat(ANSWER_LIMIT + 1);
        let server = serve_once(&socket, response("200 OK", &body)).await;
        let error = Client::new(socket).info().await.unwrap_err();
        assert_eq!(error.kind(), Kind::Unavailable, "{}", error.chain());
        server.await.unwrap();

        let socket = temp.path().join("hangup");
        let server = serve_once(&socket, "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nab".to_owned()).await;
        assert_eq!(Client::new(socket).info().await.unwrap_err().kind(), Kind::Unavailable);
        server.await.unwrap();
    }
}
