//! Our ends of the pipes and the terminal, without blocking.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::{Errno, retry_on_intr};
use rustix::pipe::PipeFlags;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// A descriptor that the runtime watches.
#[derive(Debug)]
pub struct Io(AsyncFd<OwnedFd>);

impl Io {
    /// `fd` must not block.
    pub fn new(fd: OwnedFd, interest: Interest) -> io::Result<Self> {
        // SAFETY: an OwnedFd is open and the same until it is dropped, and the AsyncFd drops it.
        let watched = unsafe { AsyncFd::register_with_interest(fd, interest) };
        watched.map(Self).map_err(|error| error.into_parts().1)
    }

    /// Waits until there is something, then reads. 0: the end; for a terminal, too, whose last user has closed it.
    ///
    /// `buffer` is called with the descriptor ready: nothing is held while waiting.
    pub async fn read_with(
        &self,
        mut read: impl FnMut(BorrowedFd<'_>) -> rustix::io::Result<usize>,
    ) -> io::Result<usize> {
        loop {
            let mut ready = self.0.readable().await?;
            match ready.try_io(|fd| end_of_terminal(retry_on_intr(|| read(fd.as_fd()))).map_err(io::Error::from)) {
                Ok(result) => return result,
                Err(_not_ready) => {}
            }
        }
    }

    /// Writes what fits now, once something does.
    pub async fn write_with(
        &self,
        mut write: impl FnMut(BorrowedFd<'_>) -> rustix::io::Result<usize>,
    ) -> io::Result<usize> {
        loop {
            let mut ready = self.0.writable().await?;
            match ready.try_io(|fd| retry_on_intr(|| write(fd.as_fd())).map_err(io::Error::from)) {
                Ok(result) => return result,
                Err(_not_ready) => {}
            }
        }
    }
}

impl AsFd for Io {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.get_ref().as_fd()
    }
}

/// Linux says EIO at the end of a terminal's output.
pub fn end_of_terminal(result: rustix::io::Result<usize>) -> rustix::io::Result<usize> {
    match result {
        Err(Errno::IO) => Ok(0),
        other => other,
    }
}

/// A pipe to read from; the other end blocks, as programs expect.
pub fn output_pipe() -> io::Result<(Io, OwnedFd)> {
    let (ours, theirs) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
    rustix::io::ioctl_fionbio(&ours, true)?;
    Ok((Io::new(ours, Interest::READABLE)?, theirs))
}

/// A pipe to write to; the other end blocks.
pub fn input_pipe() -> io::Result<(Io, OwnedFd)> {
    let (theirs, ours) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
    rustix::io::ioctl_fionbio(&ours, true)?;
    Ok((Io::new(ours, Interest::WRITABLE)?, theirs))
}
