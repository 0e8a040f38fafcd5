//! A VM's own socket where its VMM serves none: `CONNECT <port>\n` leads to a TCP port of the guest, as Firecracker's leads
//! to a vsock port.
//!
//! The socket lies beside the machine's root, in a directory that is root's alone: a VMM that its guest has taken over can
//! neither put another in its place nor connect. What does not lead anywhere is closed without a word, as Firecracker does.
//!
//! Each direction has one buffer and ends by itself; memory and connections are bounded.

use std::collections::BTreeMap;
use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use clawpot_core::MachineId;
use clawpot_host::fs::remove_file_if_exists;
use clawpot_host::{connect, netns, unix};
use clawpot_types::{Error, Kind, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf as FromGuest, OwnedWriteHalf as ToGuest};
use tokio::net::unix::{OwnedReadHalf as FromClient, OwnedWriteHalf as ToClient};
use tokio::net::{TcpStream, UnixListener, UnixStream};
use tokio::sync::oneshot;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Instant, sleep, sleep_until, timeout};

/// Connections to one VM at once; one more is closed. Two descriptors and two buffers each.
const CONNECTIONS: usize = 128;
/// Of each direction, bytes.
const BUFFER: usize = 32 << 10;
/// From the connection to the end of its first line.
const HANDSHAKE: Duration = Duration::from_secs(5);
/// For the guest to accept: room for TCP's second and third try, after 1 and 3 s.
const DIAL: Duration = Duration::from_secs(4);
/// How often a client that has said its last is looked at: whether it still listens.
const LOOK: Duration = Duration::from_secs(1);
/// For what a client that has gone left behind to reach the guest.
const LAST: Duration = Duration::from_secs(10);
/// Before the next try after an `accept` that failed, for want of descriptors or memory.
const PAUSE: Duration = Duration::from_secs(1);

/// The sockets of all machines of a VMM. Cheap to clone; clones share.
#[derive(Clone, Debug, Default)]
pub struct Relays {
    relays: Arc<Mutex<BTreeMap<MachineId, Relay>>>,
}

/// Where a guest is reached.
#[derive(Clone, Debug)]
pub struct Guest {
    pub netns: PathBuf,
    pub address: Ipv4Addr,
}

#[derive(Debug)]
struct Relay {
    /// Dropped: it is to end.
    _end: oneshot::Sender<()>,
    task: JoinHandle<()>,
}

impl Relays {
    /// Serves `socket` until [`Self::finish`] or until `exited` is done, in place of whoever served it before. Again is fine.
    /// To be called inside a runtime; blocks for some tens of microseconds.
    pub fn serve<E>(&self, id: &MachineId, socket: &Path, guest: Guest, exited: E) -> Result<()>
    where
        E: Future<Output = ()> + Send + 'static,
    {
        let mut relays = self.relays();
        if relays.get(id).is_some_and(|relay| !relay.task.is_finished()) {
            return Ok(());
        }
        // Of a daemon that is no more.
        remove_file_if_exists(socket)?;
        let listener = unix::listen(socket)?;
        let (end, ended) = oneshot::channel();
        let task = tokio::spawn(accept(id.clone(), listener, guest, async {
            tokio::select! {
                _ = ended => {}
                () = exited => {}
            }
        }));
        relays.insert(id.clone(), Relay { _end: end, task });
        Ok(())
    }

    /// Ends it. When this returns its connections are closed: none holds the machine's network namespace.
    pub async fn finish(&self, id: &MachineId) {
        let relay = self.relays().remove(id);
        let Some(Relay { _end: end, task }) = relay else { return };
        drop(end);
        if let Err(error) = task.await {
            tracing::error!(machine = %id, %error, "serving a machine's socket");
        }
    }

    fn relays(&self) -> MutexGuard<'_, BTreeMap<MachineId, Relay>> {
        // Whatever panicked, the map stays whole.
        self.relays.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn accept(id: MachineId, listener: UnixListener, guest: Guest, ended: impl Future<Output = ()>) {
    let mut connections = JoinSet::new();
    let mut next = Instant::now();
    tokio::pin!(ended);
    loop {
        let accepted = async {
            sleep_until(next).await;
            listener.accept().await
        };
        tokio::select! {
            () = &mut ended => break,
            Some(done) = connections.join_next() => {
                let done: Result<(), _> = done.unwrap_or_else(|panic| {
                    Err(Error::new(Kind::Internal, "a connection panicked").because(panic))
                });
                if let Err(error) = done {
                    tracing::debug!(machine = %id, error = error.chain(), "a connection to the machine's socket");
                }
            }
            accepted = accepted => match accepted {
                Ok((client, _)) if connections.len() < CONNECTIONS => {
                    connections.spawn(connection(client, guest.clone()));
                }
                Ok(_) => tracing::debug!(machine = %id, CONNECTIONS, "too many connections to the machine's socket"),
                Err(error) => {
                    tracing::warn!(machine = %id, %error, "accepting a connection to the machine's socket");
                    next = Instant::now() + PAUSE;
                }
            }
        }
    }
    connections.shutdown().await;
}

async fn connection(mut client: UnixStream, guest: Guest) -> Result<()> {
    let what = "reading which port is wanted";
    let port = match timeout(HANDSHAKE, connect::accept(&mut client)).await {
        Ok(port) => port.map_err(|error| Error::io(what, error))?,
        Err(_) => return Err(Error::new(Kind::Timeout, format!("{what}: nothing for {} s", HANDSHAKE.as_secs()))),
    };
    let port = u16::try_from(port).ok().filter(|port| *port != 0);
    let port = port.ok_or_else(|| Error::new(Kind::InvalidArgument, format!("{what}: there is no such TCP port")))?;
    let guest = netns::connect_tcp_in(&guest.netns, SocketAddrV4::new(guest.address, port), DIAL).await?;
    let failed = |error| Error::io(format!("connected to port {port}"), error);
    // However this ends, nothing is left that waits for a dead guest's last acknowledgement and holds its namespace for
    // minutes. What is lost by it is waited for in `carry`.
    guest.set_zero_linger().map_err(failed)?;
    let own = guest.local_addr().map_err(failed)?.port();
    connect::confirm(&mut client, own.into()).await.map_err(failed)?;
    carry(client, guest).await.map_err(failed)
}

/// Both ways, until both have ended, the guest's kernel has reset it, or nobody is left at our side.
async fn carry(client: UnixStream, guest: TcpStream) -> io::Result<()> {
    let (mut from_client, mut to_client) = client.into_split();
    let (mut from_guest, mut to_guest) = guest.into_split();
    let mut received = None;
    {
        let down = down(&mut from_guest, &mut to_client);
        tokio::pin!(down);
        let sent = {
            let up = up(&mut from_client, &mut to_guest);
            tokio::pin!(up);
            loop {
                tokio::select! {
                    sent = &mut up => break sent,
                    ended = &mut down, if received.is_none() => received = Some(ended?),
                }
            }
        };
        if received.is_none() {
            tokio::select! {
                ended = &mut down => ended?,
                () = gone(from_client.as_ref()) => {}
            }
        }
        sent?;
    }
    netns::acknowledged(to_guest.as_ref(), LAST).await.map_err(io::Error::other)
}

/// An error is the guest's.
async fn up(from: &mut FromClient, to: &mut ToGuest) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    // A client that goes with answers unread is an error here; that is an end like any other.
    while let Ok(read @ 1..) = from.read(&mut buffer).await {
        let piece = buffer.get(..read).unwrap_or_default();
        tokio::select! {
            biased;
            written = to.write_all(piece) => written?,
            () = async { gone(from.as_ref()).await; sleep(LAST).await } => {
                return Err(io::Error::new(io::ErrorKind::TimedOut, "the client has gone, and the guest does not read"));
            }
        }
    }
    drop(buffer);
    to.shutdown().await
}

/// An error is the guest's.
async fn down(from: &mut FromGuest, to: &mut ToClient) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    loop {
        let read = from.read(&mut buffer).await?;
        let piece = buffer.get(..read).unwrap_or_default();
        let heard = if piece.is_empty() { to.shutdown().await } else { to.write_all(piece).await };
        if piece.is_empty() || heard.is_err() {
            return Ok(());
        }
    }
}

/// Returns when nobody has the other end any more. The kernel tells a full close from a half one, the runtime does not.
async fn gone(client: &UnixStream) {
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    loop {
        sleep(LOOK).await;
        let mut fds = [PollFd::new(client, PollFlags::empty())];
        if poll(&mut fds, Some(&now)).is_ok() && fds.iter().any(|fd| fd.revents().contains(PollFlags::HUP)) {
            return;
        }
    }
}
