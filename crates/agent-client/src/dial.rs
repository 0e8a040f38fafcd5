//! One connection to one machine's agent.

use std::io;
use std::net::SocketAddrV4;
use std::pin::Pin;
use std::sync::{Arc, Weak};
use std::task::{Context, Poll};
use std::time::Duration;

use clawpot_common::{AGENT_PORT, CONNECTION_WINDOW, STREAM_WINDOW};
use clawpot_core::ports::GuestEndpoint;
use clawpot_host::{connect, netns, unix};
use clawpot_types::{Error, Kind, Result};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tonic::transport::{Channel, Endpoint};

use crate::gather::Gather;

/// For a socket that is there the kernel answers at once; a guest that is not up yet answers nothing, and the next try should
/// not wait for TCP's own retransmission after 1 s.
const CONNECT: Duration = Duration::from_millis(250);
/// For the HTTP/2 handshake; a TCG guest on a loaded host takes up to a second.
const HANDSHAKE: Duration = Duration::from_secs(2);
/// A machine that is gone without a word is noticed after both of these.
const KEEP_ALIVE_EVERY: Duration = Duration::from_secs(20);
const KEEP_ALIVE_FOR: Duration = Duration::from_secs(20);

/// What both transports give.
pub(crate) trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}

/// An HTTP/2 channel over one connection.
#[derive(Clone, Debug)]
pub struct Connection {
    pub channel: Channel,
    /// Lives as long as the connection: hyper drops its stream when that has ended.
    open: Weak<()>,
}

impl Connection {
    /// Whether it had not ended by now.
    pub fn is_open(&self) -> bool {
        self.open.strong_count() > 0
    }
}

/// `Unavailable`: nobody listens there yet, or it was not quick enough. The two cannot be told apart, and whoever lost a guest
/// may try again in either case.
pub async fn dial(endpoint: &GuestEndpoint) -> Result<Connection> {
    let alive = Arc::new(());
    let open = Arc::downgrade(&alive);
    let stream = TokioIo::new(Watched { stream: Gather::new(stream(endpoint, None).await?), _alive: alive });
    // Used up by the first call: a channel never connects a second time, it is dropped and dialled anew.
    let mut once = Some(stream);
    let connector = tower::service_fn(move |_| {
        let stream = once.take();
        async move { stream.ok_or_else(|| io::Error::from(io::ErrorKind::NotConnected)) }
    });
    let guest = Endpoint::from_static("http://guest.invalid")
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .http2_keep_alive_interval(KEEP_ALIVE_EVERY)
        .keep_alive_timeout(KEEP_ALIVE_FOR);
    match tokio::time::timeout(HANDSHAKE, guest.connect_with_connector(connector)).await {
        Ok(Ok(channel)) => Ok(Connection { channel, open }),
        Ok(Err(error)) => Err(Error::new(Kind::Unavailable, "guest agent: opening HTTP/2").because(error)),
        Err(_) => {
            Err(Error::new(Kind::Unavailable, format!("guest agent: no HTTP/2 within {} s", HANDSHAKE.as_secs())))
        }
    }
}

/// A stream that tells when it is dropped.
struct Watched {
    stream: Gather<Box<dyn Stream>>,
    _alive: Arc<()>,
}

impl AsyncRead for Watched {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Watched {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// To `port` of the guest, by whichever way there is; `None`: to the agent's.
pub(crate) async fn stream(endpoint: &GuestEndpoint, port: Option<u16>) -> Result<Box<dyn Stream>> {
    match endpoint {
        GuestEndpoint::Vsock(socket) => {
            let reached = tokio::time::timeout(CONNECT, async {
                let mut stream = unix::connect(socket).await?;
                let shaken = connect::connect(&mut stream, port.map_or(AGENT_PORT, u32::from)).await;
                // Firecracker closes the connection where the guest has no listener yet.
                shaken
                    .map_err(|error| Error::new(Kind::Unavailable, "guest agent: CONNECT over vsock").because(error))?;
                Ok(Box::new(stream) as Box<dyn Stream>)
            });
            reached.await.unwrap_or_else(|_| Err(Error::new(Kind::Unavailable, "guest agent: no answer over vsock")))
        }
        GuestEndpoint::Tcp { netns, address } => {
            let address = SocketAddrV4::new(*address.ip(), port.unwrap_or(address.port()));
            let stream = netns::connect_tcp_in(netns, address, CONNECT).await.map_err(not_up_yet)?;
            stream.set_nodelay(true).map_err(|error| Error::io("guest agent: setting TCP_NODELAY", error))?;
            // A socket that waits for a dead guest's last acknowledgement would hold its netns for minutes.
            stream.set_zero_linger().map_err(|error| Error::io("guest agent: setting SO_LINGER", error))?;
            Ok(Box::new(stream))
        }
    }
}

/// Whatever the network says of a guest that boots, it may say otherwise in a moment.
fn not_up_yet(error: Error) -> Error {
    match error.kind() {
        Kind::Unavailable | Kind::NotFound => error,
        _ => Error::new(Kind::Unavailable, "guest agent: connecting to it").because(error),
    }
}
