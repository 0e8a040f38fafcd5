//! The guests' name server: answers by asking the host's own resolvers. Guests are hostile: what one sends is bounded in
//! size, number and time, and nobody else's answers depend on it.

mod answer;
mod front;
mod limits;
mod upstream;

use std::net::{TcpListener, UdpSocket};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

use clawpot_types::{Error, Kind, Result};
use rustix::net::SocketType;
use rustix::net::sockopt::socket_type;
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinSet;

use front::Front;
use upstream::Upstream;

/// Where the host's resolvers are named.
pub const RESOLV_CONF: &str = "/etc/resolv.conf";

#[derive(Clone, Debug)]
pub struct Settings {
    /// Read again when it changes.
    pub resolv_conf: PathBuf,
}

/// Serves on `sockets` (UDP sockets, TCP listeners) until SIGTERM. To be called inside a runtime.
pub async fn serve(sockets: Vec<OwnedFd>, settings: Settings) -> Result<()> {
    let failed = |what: &str| {
        let what = what.to_owned();
        move |error: std::io::Error| Error::io(what, error)
    };
    let front = Arc::new(Front::new(Upstream::new(settings.resolv_conf)));
    let mut doors = JoinSet::new();
    for socket in sockets {
        rustix::io::ioctl_fionbio(&socket, true).map_err(|errno| failed("preparing a socket")(errno.into()))?;
        let kind = socket_type(&socket).map_err(|errno| failed("looking at a socket")(errno.into()))?;
        let front = Arc::clone(&front);
        if kind == SocketType::DGRAM {
            let socket =
                tokio::net::UdpSocket::from_std(UdpSocket::from(socket)).map_err(failed("taking a UDP socket"))?;
            doors.spawn(front.udp(Arc::new(socket)));
        } else {
            let listener = TcpListener::from(socket);
            let listener = tokio::net::TcpListener::from_std(listener).map_err(failed("taking a TCP listener"))?;
            doors.spawn(front.tcp(listener));
        }
    }
    let mut terminate = signal(SignalKind::terminate()).map_err(failed("watching for SIGTERM"))?;
    tracing::info!(doors = doors.len(), "the resolver serves");
    tokio::select! {
        biased;
        _ = terminate.recv() => Ok(()),
        ended = doors.join_next() => {
            let error = Error::new(Kind::Internal, "a door of the resolver closed");
            Err(match ended {
                Some(Err(panic)) => error.because(panic),
                _ => error,
            })
        }
    }
}
