//! The `CONNECT <port>\n` handshake with which a host process reaches a port of a guest through the VM's Unix socket.
//!
//! Firecracker's form (docs/vsock.md of its source): the host writes `CONNECT <port>\n`, the other side answers
//! `OK <host port>\n` and then carries the stream, or closes.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Longest answer we accept, bytes: `OK ` + ten digits + newline, with room to spare.
const MAX_LINE: usize = 32;

/// Asks the other side of `stream` for `port`. On success the stream's next byte is the guest's first.
///
/// The answer is read byte by byte: what follows it belongs to the guest's protocol.
pub async fn connect<S: AsyncRead + AsyncWrite + Unpin>(stream: &mut S, port: u32) -> io::Result<()> {
    stream.write_all(format!("CONNECT {port}\n").as_bytes()).await?;
    let line = read_line(stream).await?;
    if number_behind(b"OK ", &line).is_some() { Ok(()) } else { Err(refused(port, &line)) }
}

/// Reads the request of a caller: the port it wants. Used where we serve the socket ourselves.
pub async fn accept<S: AsyncRead + Unpin>(stream: &mut S) -> io::Result<u32> {
    let line = read_line(stream).await?;
    number_behind(b"CONNECT ", &line)
        .ok_or_else(|| invalid(format!("expected \"CONNECT <port>\", got {:?}", String::from_utf8_lossy(&line))))
}

/// Tells the caller that it is connected; `host_port`: the number that its end of the connection has on the host's side.
pub async fn confirm<S: AsyncWrite + Unpin>(stream: &mut S, host_port: u32) -> io::Result<()> {
    stream.write_all(format!("OK {host_port}\n").as_bytes()).await
}

/// Digits and nothing else; Rust's own `parse` takes a sign too.
fn number_behind(word: &[u8], line: &[u8]) -> Option<u32> {
    let digits = line.strip_prefix(word).filter(|digits| digits.iter().all(u8::is_ascii_digit))?;
    std::str::from_utf8(digits).ok()?.parse().ok()
}

/// One line without its newline.
async fn read_line<S: AsyncRead + Unpin>(stream: &mut S) -> io::Result<Vec<u8>> {
    let mut line = Vec::with_capacity(MAX_LINE);
    loop {
        match stream.read_u8().await? {
            b'\n' => return Ok(line),
            _ if line.len() == MAX_LINE => return Err(invalid(format!("handshake line longer than {MAX_LINE} bytes"))),
            byte => line.push(byte),
        }
    }
}

fn refused(port: u32, line: &[u8]) -> io::Error {
    invalid(format!("port {port}: expected \"OK <port>\", got {:?}", String::from_utf8_lossy(line)))
}

fn invalid(message: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn answer(line: &[u8]) -> io::Result<()> {
        let (mut ours, mut theirs) = tokio::io::duplex(64);
        theirs.write_all(line).await.unwrap();
        drop(theirs);
        // A closed peer makes the write fail; only the answer is of interest here.
        let mut stream = tokio::io::join(&mut ours, tokio::io::sink());
        connect(&mut stream, 10051).await
    }

    #[tokio::test]
    async fn only_ok_is_ok() {
        assert!(answer(b"OK 1073741824\n").await.is_ok());
        for bad in
            [&b"NO 1\n"[..], b"OK", b"", b"\n", b"OK \n", b"OK 1x\n", b"OK 111111111111111111111111111111111111\n"]
        {
            assert!(answer(bad).await.is_err(), "{bad:?}");
        }
    }

    #[tokio::test]
    async fn the_byte_after_the_newline_is_the_guests() {
        let (mut ours, mut theirs) = tokio::io::duplex(64);
        theirs.write_all(b"OK 1\nX").await.unwrap();
        connect(&mut ours, 5).await.unwrap();
        assert_eq!(ours.read_u8().await.unwrap(), b'X');
    }

    #[tokio::test]
    async fn both_sides_understand_each_other() {
        let (mut ours, mut theirs) = tokio::io::duplex(64);
        let asked = tokio::spawn(async move { connect(&mut ours, 10051).await });
        assert_eq!(accept(&mut theirs).await.unwrap(), 10051);
        confirm(&mut theirs, 49152).await.unwrap();
        asked.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn requests_are_parsed_strictly() {
        for (line, want) in [
            (&b"CONNECT 52\n"[..], Some(52)),
            (b"CONNECT x\n", None),
            (b"CONNECT 4294967296\n", None),
            (b"CONNECT +52\n", None),
            (b"GET /\n", None),
        ] {
            assert_eq!(accept(&mut &line[..]).await.ok(), want, "{line:?}");
        }
    }
}
