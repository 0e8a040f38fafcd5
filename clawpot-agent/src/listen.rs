//! Where the host comes in, and nobody else.

use std::io::{self, IoSlice};
use std::net::SocketAddrV4;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use clawpot_types::guest::{MANAGEMENT_ADDRESS, MANAGEMENT_HOST_ADDRESS};
use futures_core::Stream;
use futures_util::stream;
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, listen, socket_with, sockopt};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio_vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockAddr, VsockListener, VsockStream};

use crate::console::say;

/// Largest write to vsock, bytes: VMMs and kernels were seen to lose or wedge on larger packets.
const VSOCK_WRITE: usize = 16 << 10;

/// Connections that wait to be accepted.
const BACKLOG: i32 = 64;

/// How long a failing accept (no descriptors, no memory) is left alone.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A listener for the host.
#[derive(Debug)]
pub enum Listener {
    Vsock(VsockListener),
    Tcp(TcpListener),
}

impl Listener {
    /// A vsock port.
    pub fn vsock(port: u32) -> io::Result<Self> {
        VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, port)).map(Self::Vsock)
    }

    /// A TCP port on the management NIC. Bound to the device: a packet for this address that comes in elsewhere, or
    /// from a process of the guest, finds no listener.
    pub fn tcp(device: &str, port: u32) -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::INET, SocketType::STREAM, flags, None)?;
        sockopt::set_socket_reuseaddr(&socket, true)?;
        crate::boot::network::bind_to_device(&socket, device)?;
        let port = u16::try_from(port).map_err(io::Error::other)?;
        bind(&socket, &SocketAddrV4::new(MANAGEMENT_ADDRESS, port))?;
        listen(&socket, BACKLOG)?;
        TcpListener::from_std(socket.into()).map(Self::Tcp)
    }

    /// Those who come in and may.
    pub fn incoming(self) -> impl Stream<Item = io::Result<Connection>> {
        stream::unfold(self, |listener| async {
            loop {
                match listener.accept().await {
                    Ok(Some(connection)) => return Some((Ok(connection), listener)),
                    Ok(None) => {}
                    Err(error) => {
                        say(format_args!("accepting a connection: {error}"));
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                    }
                }
            }
        })
    }

    /// The next connection, if it is from the host.
    async fn accept(&self) -> io::Result<Option<Connection>> {
        match self {
            Self::Vsock(listener) => {
                let (stream, peer) = std::future::poll_fn(|cx| listener.poll_accept(cx)).await?;
                Ok((peer.cid() == VMADDR_CID_HOST).then_some(Connection::Vsock(stream)))
            }
            Self::Tcp(listener) => {
                let (stream, peer) = listener.accept().await?;
                stream.set_nodelay(true)?;
                Ok(is_host(peer.ip()).then_some(Connection::Tcp(stream)))
            }
        }
    }
}

fn is_host(address: std::net::IpAddr) -> bool {
    address == MANAGEMENT_HOST_ADDRESS
}

/// A connection from the host.
#[derive(Debug)]
pub enum Connection {
    /// Its writes are cut to 16 KiB.
    Vsock(VsockStream),
    Tcp(TcpStream),
}

impl AsyncRead for Connection {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Vsock(stream) => Pin::new(stream).poll_read(cx, buf),
            Self::Tcp(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Connection {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Vsock(stream) => Pin::new(stream).poll_write(cx, cut(buf)),
            Self::Tcp(stream) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            // One piece at a time: what is vectored in our sum would be one packet.
            Self::Vsock(stream) => {
                let first = bufs.iter().find(|buf| !buf.is_empty()).map_or(&[][..], |buf| &**buf);
                Pin::new(stream).poll_write(cx, cut(first))
            }
            Self::Tcp(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
        }
    }

    /// Without it hyper gathers small frames into one buffer first, which serves vsock better than pieces.
    fn is_write_vectored(&self) -> bool {
        matches!(self, Self::Tcp(stream) if stream.is_write_vectored())
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Vsock(stream) => Pin::new(stream).poll_flush(cx),
            Self::Tcp(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Vsock(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Tcp(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}

fn cut(buf: &[u8]) -> &[u8] {
    &buf[..buf.len().min(VSOCK_WRITE)]
}
