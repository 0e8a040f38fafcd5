//! Writes this program's standard output and error in a thread of its own, so that a reader who pauses does not keep
//! signals from being forwarded.

use std::io;
use std::os::fd::BorrowedFd;

use bytes::Bytes;
use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use tokio::sync::mpsc;

use super::inbox::Stream;
use crate::failure::Failure;

/// Chunks that wait to be written; with [`clawpot_common::EXEC_CHUNK`] bytes each the memory that it takes.
const CHUNKS: usize = 4;

#[derive(Debug)]
pub struct Writer {
    /// Taken when all has been given to it.
    pub chunks: Option<mpsc::Sender<(Stream, Bytes)>>,
    /// Why it gave up; closed when everything has been written.
    pub failed: mpsc::Receiver<io::Error>,
}

impl Writer {
    pub fn start() -> Result<Self, Failure> {
        let (chunks, mut from) = mpsc::channel::<(Stream, Bytes)>(CHUNKS);
        let (to, failed) = mpsc::channel(1);
        let writer = std::thread::Builder::new().name("stdout".to_owned()).spawn(move || {
            while let Some((stream, data)) = from.blocking_recv() {
                if let Err(errno) = write_all(stream, &data) {
                    // The only message ever sent: the channel has room; without a receiver nobody asks.
                    return to.try_send(errno.into()).unwrap_or_default();
                }
            }
        });
        writer.map_err(|error| Failure::new("standard output: starting its writer").because(error.to_string()))?;
        Ok(Self { chunks: Some(chunks), failed })
    }
}

fn write_all(stream: Stream, mut data: &[u8]) -> Result<(), Errno> {
    let fd = match stream {
        Stream::Stdout => rustix::stdio::stdout(),
        Stream::Stderr => rustix::stdio::stderr(),
    };
    while !data.is_empty() {
        match rustix::io::write(fd, data) {
            Ok(n) => data = &data[n..],
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => await_ready(fd, PollFlags::OUT),
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

/// Sleeps until `fd` is ready or broken; a failure shows at the next read or write.
pub fn await_ready(fd: BorrowedFd<'_>, events: PollFlags) {
    if rustix::event::poll(&mut [PollFd::from_borrowed_fd(fd, events)], None).is_err() {
        std::thread::yield_now();
    }
}
