//! Work inside another network namespace. `setns` happens only on threads that end there: a pooled thread that stayed
//! behind would run someone else's work in the wrong namespace.

use std::fs::File;
use std::net::SocketAddrV4;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use clawpot_types::{Error, Kind, Result};
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use tokio::net::{TcpSocket, TcpStream};

/// An open namespace, for [`crate::process::Spawn::netns`].
pub fn open(path: &Path) -> Result<OwnedFd> {
    File::open(path)
        .map(OwnedFd::from)
        .map_err(|error| Error::io(format!("opening the network namespace {}", path.display()), error))
}

/// The caller's own.
pub fn current() -> Result<OwnedFd> {
    open(Path::new("/proc/thread-self/ns/net"))
}

/// Runs `work` on a new thread inside the namespace at `path`; the thread ends with it. Blocks until then.
pub fn in_netns<T, F>(path: &Path, work: F) -> Result<T>
where
    T: Send,
    F: FnOnce() -> Result<T> + Send,
{
    let netns = open(path)?;
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new()
            .name("netns".to_owned())
            .spawn_scoped(scope, || {
                enter(&netns, path)?;
                work()
            })
            .map_err(|error| Error::io("starting a thread for a network namespace", error))?;
        thread.join().unwrap_or_else(|_| Err(panicked(path)))
    })
}

/// [`in_netns`] for a caller that must not block. A caller that goes away does not stop the work.
pub async fn in_netns_async<T, F>(path: PathBuf, work: F) -> Result<T>
where
    T: Send + 'static,
    F: FnOnce() -> Result<T> + Send + 'static,
{
    let netns = open(&path)?;
    let (sender, receiver) = tokio::sync::oneshot::channel();
    let inside = path.clone();
    std::thread::Builder::new()
        .name("netns".to_owned())
        .spawn(move || {
            let result = enter(&netns, &inside).and_then(|()| work());
            // The caller may have gone.
            drop(sender.send(result));
        })
        .map_err(|error| Error::io("starting a thread for a network namespace", error))?;
    receiver.await.unwrap_or_else(|_| Err(panicked(&path)))
}

fn panicked(path: &Path) -> Error {
    Error::new(Kind::Internal, format!("working in the network namespace {}: the work panicked", path.display()))
}

fn enter(netns: &impl AsFd, path: &Path) -> Result<()> {
    move_into_link_name_space(netns.as_fd(), Some(LinkNameSpaceType::Network))
        .map_err(|errno| crate::failed(format!("entering the network namespace {}", path.display()), errno))
}

/// A TCP connection made from inside the namespace at `netns`, with `TCP_NODELAY`. The socket is made there and stays
/// there; only that takes a thread, connecting is done by the caller's runtime.
/// `Timeout`, `Unavailable` (refused), `NotFound` (no namespace).
pub async fn connect_tcp_in(netns: &Path, address: SocketAddrV4, timeout: Duration) -> Result<TcpStream> {
    let what = || format!("connecting to {address} in {}", netns.display());
    let socket = in_netns_async(netns.to_owned(), || {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        rustix::net::socket_with(AddressFamily::INET, SocketType::STREAM, flags, None)
            .map_err(|errno| crate::failed("making a TCP socket", errno))
    })
    .await
    .map_err(|error| error.context(what()))?;
    let socket = TcpSocket::from_std_stream(socket.into());
    let stream = match tokio::time::timeout(timeout, socket.connect(address.into())).await {
        Ok(connected) => connected.map_err(|error| connect_error(what(), error))?,
        Err(_) => {
            return Err(Error::new(Kind::Timeout, format!("{}: no answer within {} ms", what(), timeout.as_millis())));
        }
    };
    stream.set_nodelay(true).map_err(|error| Error::io(what(), error))?;
    Ok(stream)
}

/// Returns once the other side has acknowledged everything that was written, an end included; at the latest after `limit`.
/// Whoever closes a socket with zero linger earlier than that loses what is on its way.
pub async fn acknowledged(stream: &TcpStream, limit: Duration) -> Result<()> {
    let deadline = tokio::time::Instant::now() + limit;
    let mut pause = Duration::from_millis(1);
    while unacknowledged(stream).map_err(|error| Error::io("looking at a TCP socket's queue", error))? > 0 {
        if tokio::time::Instant::now() >= deadline {
            break;
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(Duration::from_millis(50));
    }
    Ok(())
}

/// Bytes.
fn unacknowledged(stream: &TcpStream) -> std::io::Result<i32> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: SIOCOUTQ, which is called TIOCOUTQ for terminals, writes one int to where it is told; the socket is open.
    match unsafe { libc::ioctl(stream.as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) } {
        0 => Ok(bytes),
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// The other side is not there yet, by any of the errnos that say so.
fn connect_error(what: String, error: std::io::Error) -> Error {
    use std::io::ErrorKind as Io;
    match error.kind() {
        Io::HostUnreachable | Io::NetworkUnreachable | Io::NetworkDown | Io::AddrNotAvailable => {
            Error::new(Kind::Unavailable, what).because(error)
        }
        _ => Error::io(what, error),
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt;

    use super::*;

    const OWN: &str = "/proc/self/ns/net";

    /// `setns` into the own namespace needs CAP_SYS_ADMIN too.
    fn may_enter() -> bool {
        let may = in_netns(Path::new(OWN), || Ok(())).is_ok();
        if !may {
            eprintln!("SKIPPED: entering a network namespace needs CAP_SYS_ADMIN");
        }
        may
    }

    #[test]
    fn work_is_done_inside_and_the_caller_stays_outside() {
        if !may_enter() {
            return;
        }
        let inode = || std::fs::read_link("/proc/thread-self/ns/net").unwrap();
        let before = inode();
        // A thread that lives in a namespace of its own lends us a path to it.
        let (sender, receiver) = std::sync::mpsc::channel();
        let (done, wait) = std::sync::mpsc::channel::<()>();
        let other = std::thread::spawn(move || {
            // SAFETY: only this thread's network namespace changes, no memory or descriptor is unshared.
            unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) }.unwrap();
            sender.send(format!("/proc/{}/task/{}/ns/net", std::process::id(), gettid())).unwrap();
            wait.recv().unwrap_err();
        });
        let path = receiver.recv().unwrap();
        let inside =
            in_netns(Path::new(&path), || Ok(std::fs::read_link("/proc/thread-self/ns/net").unwrap())).unwrap();
        assert_ne!(inside, before);
        assert_eq!(inode(), before);
        drop(done);
        other.join().unwrap();
    }

    fn gettid() -> i32 {
        rustix::thread::gettid().as_raw_nonzero().get()
    }

    #[test]
    fn errors_come_back() {
        let error = in_netns::<(), _>(Path::new("/nonexistent"), || Ok(())).unwrap_err();
        assert_eq!(error.kind(), Kind::NotFound);
        if may_enter() {
            assert_eq!(in_netns::<(), _>(Path::new(OWN), || panic!("on purpose")).unwrap_err().kind(), Kind::Internal);
        }
    }

    #[tokio::test]
    async fn connects_and_tells_why_not() {
        if !may_enter() {
            return;
        }
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let std::net::SocketAddr::V4(address) = listener.local_addr().unwrap() else { panic!("not IPv4") };
        let second = Duration::from_secs(1);
        let mut stream = connect_tcp_in(Path::new(OWN), address, second).await.unwrap();
        let (mut other, _) = listener.accept().await.unwrap();
        // More than the other side's kernel takes by itself.
        let sent = tokio::time::timeout(second / 10, stream.write_all(&vec![7; 32 << 20])).await;
        assert!(sent.is_err(), "the whole was taken");
        let started = std::time::Instant::now();
        acknowledged(&stream, second / 10).await.unwrap();
        assert!(started.elapsed() >= second / 10);
        let reading = tokio::spawn(async move { tokio::io::copy(&mut other, &mut tokio::io::sink()).await });
        acknowledged(&stream, second * 10).await.unwrap();
        assert_eq!(unacknowledged(&stream).unwrap(), 0);
        drop(stream);
        reading.await.unwrap().unwrap();
        drop(listener);
        let refused = connect_tcp_in(Path::new(OWN), address, second).await.unwrap_err();
        assert_eq!(refused.kind(), Kind::Unavailable);
    }
}
