//! Reads this program's standard input in a thread of its own: a read cannot be abandoned.

use std::os::fd::BorrowedFd;

use bytes::Bytes;
use clawpot_common::EXEC_CHUNK;
use rustix::io::Errno;
use tokio::sync::mpsc;

use crate::failure::Failure;

/// Chunks as they are read; closed at the end of input. Reads one chunk ahead, no more.
pub fn read() -> Result<mpsc::Receiver<Bytes>, Failure> {
    let (tx, rx) = mpsc::channel(1);
    let reader = std::thread::Builder::new().name("stdin".to_owned()).spawn(move || {
        while let Some(chunk) = next(rustix::stdio::stdin()) {
            if tx.blocking_send(chunk).is_err() {
                return;
            }
        }
    });
    reader.map_err(|error| Failure::new("standard input: starting its reader").because(error.to_string()))?;
    Ok(rx)
}

/// `None` at the end, which a terminal that went away is too.
fn next(fd: BorrowedFd<'_>) -> Option<Bytes> {
    let mut chunk = vec![0; EXEC_CHUNK];
    loop {
        match rustix::io::read(fd, &mut chunk) {
            Ok(0) => return None,
            Ok(n) => {
                chunk.truncate(n);
                return Some(Bytes::copy_from_slice(&chunk));
            }
            Err(Errno::INTR) => {}
            // Some parents hand their children non-blocking pipes.
            Err(Errno::AGAIN) => super::writer::await_ready(fd, rustix::event::PollFlags::IN),
            Err(_) => return None,
        }
    }
}
