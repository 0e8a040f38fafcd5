//! How much an image may be, and who counts.

use std::cell::Cell;
use std::io::{self, Read};
use std::rc::Rc;

use clawpot_types::{Digest, Error, Kind, Result};
use serde::{Deserialize, Serialize};

use super::inflate::{Inflate, Piece};
use super::tar::{Entry, What, shown};

/// What one image may make of a host, all its layers together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Bytes of the unpacked archives.
    pub bytes: u64,
    pub entries: u64,
    /// Directories above one another.
    pub depth: usize,
    /// Unpacked bytes per packed one, of one layer, once it has [`RATIO_FROM`] bytes.
    pub ratio: u64,
}

/// A small layer may be all zeros; a bomb is not small. Bytes.
pub const RATIO_FROM: u64 = 256 << 20;

impl Default for Limits {
    /// The largest images in common use (CUDA with PyTorch) have some 20 GiB in 300,000 entries, 30 directories deep, packed
    /// 2 to 4 times; executables full of zeros reach 20.
    fn default() -> Self {
        Self { bytes: 64 << 30, entries: 800_000, depth: 128, ratio: 200 }
    }
}

/// An [`Error`] on its way through `std::io`, which wants it shareable between threads.
type Carried = std::sync::Mutex<Option<Error>>;

#[derive(Debug)]
struct Carrier(Carried);

impl std::fmt::Display for Carrier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a limit was met")
    }
}

impl std::error::Error for Carrier {}

fn carried(error: Error) -> io::Error {
    io::Error::other(Carrier(Carried::new(Some(error))))
}

/// The limit that a reader met, or a failed read while `what`.
pub fn hit(error: io::Error, what: &str) -> Error {
    let limit = error.get_ref().and_then(|inner| inner.downcast_ref::<Carrier>());
    let limit = limit.and_then(|carrier| carrier.0.lock().ok()?.take());
    limit.unwrap_or_else(|| match error.kind() {
        // What decoders say of bytes that they cannot decode.
        io::ErrorKind::InvalidInput | io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof => {
            Error::new(Kind::InvalidArgument, format!("{what}: it is damaged")).because(error)
        }
        _ => Error::io(what, error),
    })
}

/// Of a file in the tree and in the image, bytes.
const BLOCK: u64 = 4096;

/// Bytes and entries of the image so far.
#[derive(Debug)]
pub struct Budget {
    limits: Limits,
    bytes: u64,
    entries: u64,
}

impl Budget {
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        Self { limits, bytes: 0, entries: 0 }
    }

    #[must_use]
    pub const fn depth(&self) -> usize {
        self.limits.depth
    }

    pub fn entry(&mut self) -> Result<()> {
        self.entries += 1;
        if self.entries <= self.limits.entries {
            return Ok(());
        }
        Err(too_much(format!("the image has more than {} entries", self.limits.entries))
            .hint("that is the limit of files, directories and links; see --image-max-entries"))
    }

    /// Before an entry is made. A sparse file is as large as its archive says, in which there is next to nothing of it. And where the
    /// archive has blocks of 512 bytes the tree has pages: eight times as much of many small files.
    pub fn place(&mut self, entry: &Entry) -> Result<()> {
        let in_tree = match entry.what {
            What::File if entry.size > self.limits.bytes => {
                let (mib, most) = (entry.size >> 20, self.limits.bytes >> 20);
                let what = format!("entry {}: a file of {mib} MiB, where {most} are the most", shown(&entry.path));
                return Err(too_much(what).hint(LARGER));
            }
            What::File => {
                let whole = [(0, entry.size)];
                let stretches = entry.sparse.as_deref().unwrap_or(&whole).iter();
                // Ends and lengths were found to be within the file's size.
                stretches
                    .map(|(_, length)| (length.next_multiple_of(BLOCK), length.next_multiple_of(512)))
                    .fold(0, |more: u64, (blocks, packed)| more.saturating_add(blocks - packed))
            }
            What::Directory => BLOCK,
            What::HardLink | What::Symlink | What::Fifo | What::Device => 0,
        };
        // The header was counted as it came.
        self.unpacked(in_tree.saturating_sub(512))
    }

    /// The file system that is to be made of the tree, bytes: as much again as the tree may have, and the tree.
    pub fn file_system(&self, bytes: u64) -> Result<()> {
        let most = self.most_of_a_file();
        if bytes <= most {
            return Ok(());
        }
        let (mib, most) = (bytes >> 20, most >> 20);
        Err(too_much(format!("the image's file system would have {mib} MiB, where {most} are the most")).hint(LARGER))
    }

    /// Of any file that the helper makes, bytes: of the file system, which is a little larger than the tree.
    #[must_use]
    pub const fn most_of_a_file(&self) -> u64 {
        self.limits.bytes.saturating_mul(2)
    }

    fn unpacked(&mut self, bytes: u64) -> Result<()> {
        self.bytes = self.bytes.saturating_add(bytes);
        if self.bytes <= self.limits.bytes {
            return Ok(());
        }
        Err(too_much(format!("the image is larger than {} MiB unpacked", self.limits.bytes >> 20)).hint(LARGER))
    }
}

const LARGER: &str = "that is the limit, or what the disk and the store's quota leave; see --image-quota-mib";

fn too_much(what: String) -> Error {
    Error::new(Kind::Exhausted, what)
}

/// Packed bytes, counted as they are read.
#[derive(Debug)]
pub struct Counted<R> {
    inner: R,
    read: Rc<Cell<u64>>,
}

impl<R> Counted<R> {
    pub fn new(inner: R) -> (Self, Rc<Cell<u64>>) {
        let read = Rc::new(Cell::new(0));
        (Self { inner, read: Rc::clone(&read) }, read)
    }
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.read.set(self.read.get() + read as u64);
        Ok(read)
    }
}

/// Unpacked bytes of one layer, counted against every limit.
#[derive(Debug)]
pub struct Metered<'a> {
    inflate: &'a Inflate,
    budget: &'a mut Budget,
    packed: u64,
    unpacked: u64,
    current: io::Cursor<Vec<u8>>,
    /// Of everything, once that has been read.
    digest: Option<Digest>,
}

impl<'a> Metered<'a> {
    pub fn new(inflate: &'a Inflate, budget: &'a mut Budget) -> Self {
        Self { inflate, budget, packed: 0, unpacked: 0, current: io::Cursor::default(), digest: None }
    }

    pub fn budget(&mut self) -> &mut Budget {
        self.budget
    }

    /// Packed bytes behind what has come so far.
    #[must_use]
    pub const fn packed(&self) -> u64 {
        self.packed
    }

    /// `Internal`: not all of it was read.
    pub fn digest(self) -> Result<Digest> {
        self.digest.ok_or_else(|| Error::new(Kind::Internal, "a layer that was not read to its end"))
    }

    fn ratio(&self) -> Result<()> {
        let (most, packed) = (self.budget.limits.ratio, self.packed.max(1));
        if self.unpacked < RATIO_FROM || self.unpacked / packed <= most {
            return Ok(());
        }
        Err(too_much(format!("a bomb: {} MiB from {packed} bytes, over {most} times as much", self.unpacked >> 20)))
    }

    /// False at the end.
    fn next(&mut self) -> io::Result<bool> {
        if self.digest.is_some() {
            return Ok(false);
        }
        match self.inflate.piece().map_err(carried)? {
            Piece::Data { bytes, packed } => {
                self.packed = packed;
                self.unpacked += bytes.len() as u64;
                self.budget.unpacked(bytes.len() as u64).and_then(|()| self.ratio()).map_err(carried)?;
                let used = std::mem::replace(&mut self.current, io::Cursor::new(bytes)).into_inner();
                if used.capacity() > 0 {
                    self.inflate.give_back(used);
                }
                Ok(true)
            }
            Piece::End { digest } => {
                self.inflate.give_back(std::mem::take(&mut self.current).into_inner());
                self.digest = Some(digest);
                Ok(false)
            }
            Piece::Failed(error) => Err(error),
        }
    }
}

impl Read for Metered<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.current.read(buffer)? {
                0 if !buffer.is_empty() && self.next()? => {}
                read => return Ok(read),
            }
        }
    }
}
