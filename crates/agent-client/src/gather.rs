//! Small writes that follow each other closely leave as one packet.
//!
//! HTTP/2 hands over the headers of a call and its first message one after the other, each with a flush. As two packets
//! they cost the guest two interrupts, two acknowledgements and two wake-ups, before it knows what is wanted.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf as _, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Bytes that are gathered; whatever does not fit is written through at once. A packet's worth.
const MOST: usize = 1400;

/// Holds a flush back until every other task that can run has had its turn: nobody waits for a timer, and what those tasks
/// write goes along.
#[derive(Debug)]
pub struct Gather<S> {
    stream: S,
    gathered: BytesMut,
    /// A flush was asked for and put off once.
    put_off: bool,
}

impl<S: AsyncWrite + Unpin> Gather<S> {
    pub fn new(stream: S) -> Self {
        Self { stream, gathered: BytesMut::with_capacity(MOST), put_off: false }
    }

    fn poll_empty(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.gathered.is_empty() {
            let written = ready!(Pin::new(&mut self.stream).poll_write(cx, &self.gathered))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.gathered.advance(written);
        }
        self.put_off = false;
        Poll::Ready(Ok(()))
    }

    /// Whether `length` bytes more were small enough to be gathered.
    fn fits(&self, length: usize) -> bool {
        self.gathered.len() + length <= MOST
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Gather<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        if self.fits(buf.len()) {
            self.gathered.extend_from_slice(buf);
            return Poll::Ready(Ok(buf.len()));
        }
        ready!(self.poll_empty(cx))?;
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let length = bufs.iter().map(|buf| buf.len()).sum();
        if self.fits(length) {
            bufs.iter().for_each(|buf| self.gathered.extend_from_slice(buf));
            return Poll::Ready(Ok(length));
        }
        ready!(self.poll_empty(cx))?;
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.gathered.is_empty() && !self.put_off {
            self.put_off = true;
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        ready!(self.poll_empty(cx))?;
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_empty(cx))?;
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Gather<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    /// A pipe of `size` bytes, and what has come out of it so far.
    async fn there(reader: &mut tokio::io::DuplexStream) -> Vec<u8> {
        let mut buf = vec![0; 1 << 20];
        let read = tokio::time::timeout(std::time::Duration::from_millis(20), reader.read(&mut buf)).await;
        read.map_or(Vec::new(), |count| buf[..count.unwrap()].to_vec())
    }

    #[tokio::test]
    async fn what_is_written_in_the_same_turn_leaves_together() {
        let (near, mut far) = tokio::io::duplex(1 << 20);
        let mut gather = Gather::new(near);
        gather.write_all(b"headers").await.unwrap();
        let first = futures_util::poll!(std::pin::pin!(gather.flush()));
        assert!(first.is_pending());
        gather.write_all(b" and data").await.unwrap();
        assert_eq!(there(&mut far).await, b"");
        gather.flush().await.unwrap();
        assert_eq!(there(&mut far).await, b"headers and data");
    }

    #[tokio::test]
    async fn a_flush_alone_is_put_off_once_and_no_more() {
        let (near, mut far) = tokio::io::duplex(64);
        let mut gather = Gather::new(near);
        for word in [&b"one"[..], b"two", b"three"] {
            gather.write_all(word).await.unwrap();
            gather.flush().await.unwrap();
            assert_eq!(there(&mut far).await, word);
        }
    }

    #[tokio::test]
    async fn order_is_kept_when_large_follows_small_through_a_narrow_pipe() {
        let (near, mut far) = tokio::io::duplex(100);
        let sent: Vec<u8> = (0..50_000_u32).map(|n| u8::try_from(n % 251).unwrap()).collect();
        let expected = sent.clone();
        let writer = tokio::spawn(async move {
            let mut gather = Gather::new(near);
            let mut at = 0;
            for size in [1, 5_000, 3, 1400, 1401, 7, 20_000].into_iter().cycle() {
                let end = sent.len().min(at + size);
                gather.write_all(&sent[at..end]).await.unwrap();
                at = end;
                if at == sent.len() {
                    break;
                }
            }
            gather.shutdown().await.unwrap();
        });
        let mut got = Vec::new();
        far.read_to_end(&mut got).await.unwrap();
        writer.await.unwrap();
        assert!(got == expected);
    }
}
