//! The helper's second thread: it reads, decompresses and hashes a layer while the first one writes the files that come of it.
//!
//! It is started before the process gives up starting anything, and lives until the process becomes `mke2fs`.

use std::fs::File;
use std::io::{self, BufReader, Read};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};

use clawpot_types::{Digest, Error, Kind, Result};
use sha2::{Digest as _, Sha256};

use super::limits::Counted;

/// Bytes of one piece, and how many there are: what the two threads may be apart.
const PIECE: usize = 256 << 10;
const PIECES: usize = 8;

/// What comes of a layer, in order.
#[derive(Debug)]
pub enum Piece {
    /// Unpacked bytes, and how many packed ones had been read when they were there.
    Data {
        bytes: Vec<u8>,
        packed: u64,
    },
    /// Of all that was unpacked.
    End {
        digest: Digest,
    },
    Failed(io::Error),
}

#[derive(Debug)]
pub struct Inflate {
    layers: Sender<File>,
    pieces: Receiver<Piece>,
    /// Buffers on their way back.
    used: Sender<Vec<u8>>,
}

impl Inflate {
    pub fn start() -> Result<Self> {
        let (layers, to_do) = channel();
        let (send, pieces) = sync_channel(PIECES);
        let (used, free) = channel();
        std::thread::Builder::new()
            .name("inflate".to_owned())
            .spawn(move || {
                let mut buffers = Buffers { free, made: 0 };
                for layer in to_do {
                    // Nobody takes it any more: the process is about to end.
                    if let Err(error) = unpack(layer, &mut buffers, &send)
                        && send.send(Piece::Failed(error)).is_err()
                    {
                        return;
                    }
                }
            })
            .map_err(|error| Error::io("starting a thread", error))?;
        Ok(Self { layers, pieces, used })
    }

    /// The next layer; all pieces of the one before have been taken.
    pub fn open(&self, layer: File) -> Result<()> {
        self.layers.send(layer).map_err(|_| gone())
    }

    /// Blocks until it is there.
    pub fn piece(&self) -> Result<Piece> {
        self.pieces.recv().map_err(|_| gone())
    }

    pub fn give_back(&self, buffer: Vec<u8>) {
        // A thread that has ended needs none.
        self.used.send(buffer).unwrap_or_default();
    }
}

fn gone() -> Error {
    Error::new(Kind::Internal, "the thread that decompresses has ended")
}

struct Buffers {
    free: Receiver<Vec<u8>>,
    made: usize,
}

impl Buffers {
    /// One that was used before, once there are enough.
    fn take(&mut self) -> Option<Vec<u8>> {
        if self.made == PIECES {
            return self.free.recv().ok();
        }
        self.made += 1;
        Some(vec![0; PIECE])
    }
}

fn unpack(layer: File, buffers: &mut Buffers, to: &SyncSender<Piece>) -> io::Result<()> {
    let (mut reader, packed) = Counted::new(layer);
    let mut magic = [0; 4];
    let have = fill(&mut reader, &mut magic)?;
    let whole = io::Cursor::new(magic[..have].to_vec()).chain(reader);
    let mut unpacked: Box<dyn Read> = match magic {
        [0x1f, 0x8b, ..] => Box::new(flate2::bufread::MultiGzDecoder::new(BufReader::with_capacity(128 << 10, whole))),
        [0x28, 0xb5, 0x2f, 0xfd] => Box::new(zstd(whole)?),
        _ => Box::new(whole),
    };
    let mut hasher = Sha256::new();
    loop {
        let Some(mut bytes) = buffers.take() else { return Ok(()) };
        bytes.resize(PIECE, 0);
        let have = fill(&mut unpacked, &mut bytes)?;
        hasher.update(&bytes[..have]);
        bytes.truncate(have);
        if to.send(Piece::Data { bytes, packed: packed.get() }).is_err() {
            return Ok(());
        }
        if have < PIECE {
            to.send(Piece::End { digest: Digest::from_sha256(&hasher.finalize().into()) }).unwrap_or_default();
            return Ok(());
        }
    }
}

fn zstd(whole: impl Read + 'static) -> io::Result<impl Read> {
    let mut decoder = zstd::stream::read::Decoder::new(whole)?;
    // 128 MiB of memory, what the command-line tool allows too (`--long` needs to be asked for there).
    decoder.window_log_max(27)?;
    Ok(decoder)
}

/// Less than the whole buffer only at the end.
fn fill(reader: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut have = 0;
    while have < buffer.len() {
        match reader.read(&mut buffer[have..]) {
            Ok(0) => break,
            Ok(read) => have += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(have)
}
