//! Connections: who opened them, how many there are, and their end when nothing comes of them.
//!
//! One that is over a limit of [`crate::limits`] is still let in for some seconds, to hear on its first call which limit that
//! is. Beyond so many of these it is closed at once: taking in and closing costs nothing that others would wait for.

use std::future::Future as _;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use clawpot_types::Error;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{UnixListener, UnixStream};
use tokio::time::Sleep;
use tonic::Status;
use tonic::transport::server::Connected;
use tracing::warn;

use crate::api::access::Caller;
use crate::api::status::status;
use crate::limits;
use crate::shares::{Held, Shares};

/// After an accept that failed: most likely there are no file descriptors left, and trying on would only heat the CPU.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Between two warnings of refused connections.
const QUIET: Duration = Duration::from_secs(10);

/// One listening socket.
#[derive(Debug)]
pub struct Entrance {
    listener: UnixListener,
    connections: Shares,
    refusals: Shares,
    /// How long a connection lives: until its first request at most, or in all.
    life: Life,
    told: Option<Instant>,
}

#[derive(Clone, Copy, Debug)]
enum Life {
    UntilHeard(Duration),
    InAll(Duration),
}

impl Entrance {
    /// Of the API. `own`: the server's user.
    pub fn api(listener: UnixListener, own: u32) -> Self {
        Self::new(listener, own, limits::CONNECTIONS, Life::UntilHeard(limits::FIRST_REQUEST))
    }

    /// Of `/metrics`.
    pub fn metrics(listener: UnixListener, own: u32) -> Self {
        Self::new(listener, own, limits::SCRAPERS, Life::InAll(limits::SCRAPER_LIFE))
    }

    fn new(listener: UnixListener, own: u32, connections: limits::Share, life: Life) -> Self {
        let [connections, refusals] = [connections, limits::REFUSALS].map(|share| Shares::new(share, own));
        Self { listener, connections, refusals, life, told: None }
    }

    /// The next connection. Never ends.
    pub async fn next(&mut self) -> Peer {
        loop {
            match self.listener.accept().await {
                Ok((stream, _)) => {
                    if let Some(peer) = self.let_in(stream) {
                        return peer;
                    }
                }
                Err(error) => {
                    warn!(%error, "taking in a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    /// As tonic takes them.
    pub fn connections(self) -> impl futures_core::Stream<Item = io::Result<Peer>> {
        futures_util::stream::unfold(self, |mut entrance| async move { Some((Ok(entrance.next().await), entrance)) })
    }

    fn let_in(&mut self, stream: UnixStream) -> Option<Peer> {
        let caller = Caller::of(&stream);
        let error = match self.connections.take(caller.uid(), 1) {
            Ok(held) => return Some(Peer::new(stream, caller, None, self.life, held)),
            Err(error) => error,
        };
        if self.told.is_none_or(|told| told.elapsed() > QUIET) {
            warn!(error = error.chain(), "a connection is refused");
            self.told = Some(Instant::now());
        }
        let held = self.refusals.take(caller.uid(), 1).ok()?;
        Some(Peer::new(stream, caller, Some(error), Life::InAll(limits::REFUSAL_LIFE), held))
    }
}

impl axum::serve::Listener for Entrance {
    type Io = Peer;
    type Addr = ();

    async fn accept(&mut self) -> (Peer, ()) {
        loop {
            let peer = self.next().await;
            // HTTP/1 has nobody here who could say why.
            if peer.visit.refused().is_none() {
                return (peer, ());
            }
        }
    }

    fn local_addr(&self) -> io::Result<()> {
        Ok(())
    }
}

/// What is known of a connection. Each of its requests has it among its extensions.
#[derive(Clone, Debug)]
pub struct Visit {
    caller: Caller,
    /// Why nothing that it asks is done.
    refused: Option<Arc<Status>>,
    /// Whether a request has come.
    heard: Arc<AtomicBool>,
}

impl Visit {
    pub const fn caller(&self) -> &Caller {
        &self.caller
    }

    pub fn refused(&self) -> Option<&Status> {
        self.refused.as_deref()
    }

    /// A request has come.
    pub fn hear(&self) {
        self.heard.store(true, Ordering::Relaxed);
    }
}

/// A connection that knows who opened it. Asked once, at its beginning: what the peer becomes later does not matter.
#[derive(Debug)]
pub struct Peer {
    stream: UnixStream,
    visit: Visit,
    end: Option<Pin<Box<Sleep>>>,
    /// Whether a request keeps it from ending.
    for_silence: bool,
    /// Its place among the others.
    _held: Held,
}

impl Peer {
    fn new(stream: UnixStream, caller: Caller, refused: Option<Error>, life: Life, held: Held) -> Self {
        let (for_silence, life) = match life {
            Life::UntilHeard(life) => (true, life),
            Life::InAll(life) => (false, life),
        };
        let visit = Visit { caller, refused: refused.map(|error| Arc::new(status(error))), heard: Arc::default() };
        Self { stream, visit, end: Some(Box::pin(tokio::time::sleep(life))), for_silence, _held: held }
    }

    /// Looked at before every read and write: one of them is always waited for.
    fn in_time(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        if self.for_silence && self.visit.heard.load(Ordering::Relaxed) {
            self.end = None;
        }
        let over = self.end.as_mut().is_some_and(|end| end.as_mut().poll(cx).is_ready());
        if over { Err(io::ErrorKind::TimedOut.into()) } else { Ok(()) }
    }
}

impl Connected for Peer {
    type ConnectInfo = Visit;

    fn connect_info(&self) -> Visit {
        self.visit.clone()
    }
}

impl AsyncRead for Peer {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.in_time(cx)?;
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Peer {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.in_time(cx)?;
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.in_time(cx)?;
        Pin::new(&mut self.stream).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    const SHARE: limits::Share = limits::Share { what: "connections", all: 4, user: 2, root: 1 };

    fn entrance(dir: &tempfile::TempDir, life: Life) -> (Entrance, std::path::PathBuf) {
        let path = dir.path().join("s");
        (Entrance::new(UnixListener::bind(&path).unwrap(), u32::MAX, SHARE, life), path)
    }

    #[tokio::test]
    async fn the_kernel_tells_who_has_connected() {
        let dir = tempfile::tempdir().unwrap();
        let (mut entrance, path) = entrance(&dir, Life::UntilHeard(Duration::from_secs(60)));
        let _client = UnixStream::connect(&path).await.unwrap();
        let Caller::Local { uid, groups } = entrance.next().await.connect_info().caller().clone() else {
            panic!("the kernel knows")
        };
        assert_eq!(uid, rustix::process::geteuid().as_raw());
        assert!(groups.contains(&rustix::process::getegid().as_raw()));
    }

    #[tokio::test]
    async fn one_too_many_is_told_so_and_there_is_room_when_one_has_gone() {
        let dir = tempfile::tempdir().unwrap();
        let (mut entrance, path) = entrance(&dir, Life::UntilHeard(Duration::from_secs(60)));
        let mut clients = Vec::new();
        let mut peers = Vec::new();
        for _ in 0..3 {
            clients.push(UnixStream::connect(&path).await.unwrap());
            peers.push(entrance.next().await);
        }
        let refused: Vec<_> = peers.iter().map(|peer| peer.visit.refused().map(Status::message)).collect();
        let uid = rustix::process::geteuid().as_raw();
        let said = format!("connections: uid={uid} has 2: at most 2 for one user");
        assert_eq!(refused, [None, None, Some(said.as_str())]);
        peers.remove(0);
        clients.push(UnixStream::connect(&path).await.unwrap());
        assert!(entrance.next().await.visit.refused().is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_connection_ends_and_one_that_asked_does_not() {
        let dir = tempfile::tempdir().unwrap();
        let life = Duration::from_secs(10);
        let (mut entrance, path) = entrance(&dir, Life::UntilHeard(life));
        let mut client = UnixStream::connect(&path).await.unwrap();
        let mut silent = entrance.next().await;
        let mut byte = [0];
        let ended = tokio::time::timeout(life * 2, silent.read(&mut byte)).await.expect("it waits no longer");
        assert_eq!(ended.unwrap_err().kind(), io::ErrorKind::TimedOut);
        assert!(silent.write(b"x").await.is_err(), "not for writing either");
        drop(silent);
        assert_eq!(client.read(&mut byte).await.unwrap(), 0, "and its client sees the end");

        let mut client = UnixStream::connect(&path).await.unwrap();
        let mut asking = entrance.next().await;
        asking.visit.hear();
        tokio::time::timeout(life * 2, asking.read(&mut byte)).await.expect_err("it waits for more");
        client.write_all(b"x").await.unwrap();
        assert_eq!(asking.read(&mut byte).await.unwrap(), 1);
    }
}
