//! What the transport itself costs: a TCP connection to the guest's agent and one HTTP/2 ping over it. It is the agent's own
//! port, since nothing else of the management NIC may be reached; a ping is answered without any of our code.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, SocketAddrV4, TcpStream};
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::{Outcome, micros};

/// RFC 9113: the preface, an empty SETTINGS frame, and a PING with eight bytes of our own.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
const PING: &[u8] = b"\0\0\x08\x06\0\0\0\0\0clawpot!";
const PING_TYPE: u8 = 6;
const ACK: u8 = 1;

/// A SYN that a booting guest did not hear is not worth waiting for: the kernel repeats it only after a second.
const ATTEMPT: Duration = Duration::from_millis(50);

/// Both in µs.
#[derive(Debug, Serialize)]
pub struct RoundTrip {
    /// The connection alone.
    connect: u64,
    /// Connection, preface and ping, until the ping's answer.
    total: u64,
}

/// Rounds that are not counted.
const WARM_UP: u32 = 20;

pub fn round_trips(address: SocketAddrV4, rounds: u32) -> Outcome<Vec<RoundTrip>> {
    let mut trips = Vec::new();
    for round in 0..rounds + WARM_UP {
        let trip = round_trip(address, Duration::from_secs(5))?;
        if round >= WARM_UP {
            trips.push(trip);
        }
    }
    Ok(trips)
}

/// Microseconds until something answered; for as long as a boot may take.
pub fn until_answer(address: SocketAddrV4, within: Duration) -> Outcome<u64> {
    let begun = Instant::now();
    loop {
        match round_trip(address, ATTEMPT) {
            Ok(_) => return Ok(micros(begun)),
            Err(error) if begun.elapsed() > within => return Err(error),
            Err(_) => std::thread::sleep(Duration::from_millis(5)),
        }
    }
}

fn round_trip(address: SocketAddrV4, patience: Duration) -> Outcome<RoundTrip> {
    let begun = Instant::now();
    let mut stream = TcpStream::connect_timeout(&SocketAddr::V4(address), patience)?;
    let connect = micros(begun);
    stream.set_nodelay(true)?;
    // Once connected, the guest is up and only slow.
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    stream.write_all(&[PREFACE, PING].concat())?;
    loop {
        let mut head = [0; 9];
        stream.read_exact(&mut head)?;
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
        let mut body = vec![0; usize::try_from(length)?];
        stream.read_exact(&mut body)?;
        if head[3] == PING_TYPE && head[4] & ACK != 0 {
            return Ok(RoundTrip { connect, total: micros(begun) });
        }
    }
}
