//! The doors: UDP and TCP as RFC 1035 has them.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::time::{sleep, timeout};

use super::answer::{Way, answer};
use super::limits::Limits;
use super::upstream::Upstream;

/// Queries in hand: of one guest, of all. A browser's start asks some dozens at once.
const QUERIES: (u32, u32) = (64, 512);
/// Open TCP connections: of one guest, of all.
const CONNECTIONS: (u32, u32) = (8, 128);

/// A query is a name and a few options.
const LONGEST_QUERY: usize = 4096;

/// For the next query of a TCP connection to come, and for an answer to be taken.
const IDLE: Duration = Duration::from_secs(10);

/// After an error that may go on for a while, such as running out of descriptors.
const BREATHER: Duration = Duration::from_millis(100);

#[derive(Debug)]
pub(super) struct Front {
    upstream: Upstream,
    queries: Arc<Limits>,
    connections: Arc<Limits>,
}

impl Front {
    pub(super) fn new(upstream: Upstream) -> Self {
        Self {
            upstream,
            queries: Limits::new(QUERIES.0, QUERIES.1),
            connections: Limits::new(CONNECTIONS.0, CONNECTIONS.1),
        }
    }

    /// For ever.
    pub(super) async fn udp(self: Arc<Self>, socket: Arc<UdpSocket>) {
        let mut bytes = vec![0; LONGEST_QUERY];
        loop {
            let (length, from) = match socket.recv_from(&mut bytes).await {
                Ok(received) => received,
                Err(error) => {
                    // ICMP's complaints about an earlier answer come here too.
                    tracing::debug!(%error, "receiving a query");
                    sleep(Duration::from_millis(1)).await;
                    continue;
                }
            };
            // The guest asks again; by then others may have been served.
            let Some(permit) = self.queries.admit(from.ip()) else { continue };
            let (front, socket, question) = (Arc::clone(&self), Arc::clone(&socket), bytes[..length].to_vec());
            tokio::spawn(async move {
                if let Some(reply) = answer(&front.upstream, &question, Way::Udp).await
                    && let Err(error) = socket.send_to(&reply, from).await
                {
                    tracing::debug!(%from, %error, "sending an answer");
                }
                drop(permit);
            });
        }
    }

    /// For ever.
    pub(super) async fn tcp(self: Arc<Self>, listener: TcpListener) {
        loop {
            let (stream, from) = match listener.accept().await {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "accepting a connection");
                    sleep(BREATHER).await;
                    continue;
                }
            };
            let Some(permit) = self.connections.admit(from.ip()) else { continue };
            let front = Arc::clone(&self);
            tokio::spawn(async move {
                if let Err(error) = front.connection(stream, from).await {
                    tracing::debug!(%from, %error, "a connection ended");
                }
                drop(permit);
            });
        }
    }

    /// One query after the other, until the guest closes, idles or sends what is none.
    async fn connection(&self, mut stream: TcpStream, from: SocketAddr) -> std::io::Result<()> {
        stream.set_nodelay(true)?;
        loop {
            let Some(question) = timeout(IDLE, read_query(&mut stream)).await?? else { return Ok(()) };
            let Some(permit) = self.queries.admit(from.ip()) else { return Ok(()) };
            let Some(reply) = answer(&self.upstream, &question, Way::Tcp).await else { return Ok(()) };
            drop(permit);
            let length = u16::try_from(reply.len()).map_err(std::io::Error::other)?;
            let message = [&length.to_be_bytes()[..], &reply].concat();
            timeout(IDLE, stream.write_all(&message)).await??;
        }
    }
}

/// `None`: the other side has closed, or sends more than a query can be.
async fn read_query(stream: &mut TcpStream) -> std::io::Result<Option<Vec<u8>>> {
    let mut length = [0; 2];
    if let Err(error) = stream.read_exact(&mut length).await {
        return if error.kind() == std::io::ErrorKind::UnexpectedEof { Ok(None) } else { Err(error) };
    }
    let length = usize::from(u16::from_be_bytes(length));
    if length > LONGEST_QUERY {
        return Ok(None);
    }
    let mut question = vec![0; length];
    stream.read_exact(&mut question).await?;
    Ok(Some(question))
}
