//! Tar archives as layers have them: ustar, GNU and PAX names, extended attributes, sparse files. The fields of a header are
//! read by the crate `tar`; the walk from header to header is ours, as there every length that an archive claims is bounded.

use std::collections::BTreeMap;
use std::io::{self, Read};

use clawpot_types::{Error, Kind, Result};
use tar::{EntryType, Header, PaxExtensions};

/// Bytes of one header that extends the next one (long names, PAX records): PATH_MAX is 4,096, attributes are at most 64 KiB each.
const EXTENSION_LIMIT: u64 = 1 << 20;
/// Such headers in front of one entry. An honest one has four at most: of the whole archive, of the entry, and two long names. Nothing
/// else counts them, as none of them is an entry.
const EXTENSIONS: usize = 64;
/// Bytes of all headers that speak of every entry to come, as each entry gets a copy. `git archive` writes 52, the commit.
const GLOBAL_LIMIT: u64 = 64 << 10;
/// Bytes of one entry's extended attributes with their names, however many headers they come in. ext4 takes a block or two.
const XATTRS_LIMIT: usize = 1 << 20;
/// Stretches of data of one sparse file. GNU tar writes one per hole; 65,536 of them are a file that is no longer sparse.
const SPARSE_LIMIT: usize = 65_536;
const BLOCK: usize = 512;

/// What one entry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    File,
    HardLink,
    Symlink,
    Directory,
    Fifo,
    Device,
}

#[derive(Debug)]
pub struct Entry {
    pub what: What,
    pub path: Vec<u8>,
    pub link: Vec<u8>,
    pub mode: u32,
    pub uid: u64,
    pub gid: u64,
    /// Seconds since the epoch.
    pub mtime: i64,
    /// Length of the file once it is unpacked, bytes.
    pub size: u64,
    /// Where its data goes: offset and length of each stretch, ascending. `None`: all of it, in one piece.
    pub sparse: Option<Vec<(u64, u64)>>,
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// Entry after entry of an archive; what was not read of one's data is skipped.
#[derive(Debug)]
pub struct Archive<R> {
    inner: R,
    /// Of the current entry's data, and of the padding behind it.
    left: u64,
    padding: u64,
    global: Pax,
    /// Of the headers that made `global`.
    global_bytes: u64,
}

/// What extended headers say, the last one of each key.
#[derive(Clone, Debug, Default)]
struct Pax {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
    uid: Option<u64>,
    gid: Option<u64>,
    mtime: Option<i64>,
    xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// Their bytes, names and values.
    xattr_bytes: usize,
    sparse_name: Option<Vec<u8>>,
    sparse_size: Option<u64>,
    /// 0.0 and 0.1 have it in the header, 1.0 in front of the data.
    sparse_map: Vec<u64>,
    sparse_in_data: bool,
}

fn bad(what: impl Into<String>) -> Error {
    Error::new(Kind::InvalidArgument, what)
}

/// A failed read, or the limit that the reader below met.
fn read_failed(error: io::Error) -> Error {
    super::limits::hit(error, "reading the archive")
}

impl<R: Read> Archive<R> {
    pub fn new(inner: R) -> Self {
        Self { inner, left: 0, padding: 0, global: Pax::default(), global_bytes: 0 }
    }

    pub fn inner(&mut self) -> &mut R {
        &mut self.inner
    }

    pub fn into_inner(self) -> R {
        self.inner
    }

    /// `None` at the end: two blocks of zeros, or nothing more.
    pub fn next_entry(&mut self) -> Result<Option<Entry>> {
        self.skip_rest()?;
        let mut pax = self.global.clone();
        let (mut long_path, mut long_link) = (None, None);
        for _ in 0..=EXTENSIONS {
            let mut block = [0; BLOCK];
            if !self.read_block(&mut block)? || block.iter().all(|byte| *byte == 0) {
                return Ok(None);
            }
            let header = Header::from_byte_slice(&block);
            check(header)?;
            let size = header.entry_size().map_err(|error| bad("a header's size is not a number").because(error))?;
            match header.entry_type() {
                EntryType::GNULongName => long_path = Some(without_nul(self.extension(size)?)),
                EntryType::GNULongLink => long_link = Some(without_nul(self.extension(size)?)),
                EntryType::XHeader => pax.read(&self.extension(size)?)?,
                EntryType::XGlobalHeader => {
                    self.global_bytes = self.global_bytes.saturating_add(size);
                    if self.global_bytes > GLOBAL_LIMIT {
                        return Err(bad(format!("headers for all entries have over {GLOBAL_LIMIT} bytes")));
                    }
                    let bytes = self.extension(size)?;
                    self.global.read(&bytes)?;
                    pax.read(&bytes)?;
                }
                // A volume's label.
                other if other.as_byte() == b'V' => drop(self.extension(size)?),
                _ => {
                    let header = header.clone();
                    return self.entry(&header, pax, long_path, long_link, size).map(Some);
                }
            }
        }
        Err(bad(format!("over {EXTENSIONS} headers in a row that extend the next one")))
    }

    fn entry(
        &mut self,
        header: &Header,
        mut pax: Pax,
        long_path: Option<Vec<u8>>,
        long_link: Option<Vec<u8>>,
        size: u64,
    ) -> Result<Entry> {
        let path = pax.sparse_name.clone().or(pax.path.clone()).or(long_path);
        let path = path.unwrap_or_else(|| header.path_bytes().into_owned());
        let link = pax.link.clone().or(long_link);
        let link = link.or_else(|| header.link_name_bytes().map(|link| link.into_owned())).unwrap_or_default();
        let old = header.as_old();
        let number = |raw: &[u8], value: io::Result<u64>, field: &str| match value {
            // Left empty by some who write archives.
            Err(_) if raw.iter().all(|byte| matches!(byte, 0 | b' ')) => Ok(0),
            value => value
                .map_err(|error| bad(format!("entry {}: its {field} is not a number", shown(&path))).because(error)),
        };
        let what = what(header, &path)?;
        self.left = pax.size.unwrap_or(size);
        self.padding = padding(self.left);
        // Links and directories have no data, whatever their size field says; tar writes a hard link's there.
        if !matches!(what, What::File) {
            self.left = if header.entry_type() == EntryType::Directory { self.left } else { 0 };
            self.padding = padding(self.left);
        }
        let mtime = number(&old.mtime, header.mtime(), "time").map(|time| i64::try_from(time).unwrap_or_default());
        let mut entry = Entry {
            what,
            mode: u32::try_from(number(&old.mode, header.mode().map(u64::from), "mode")? & 0o7777).unwrap_or_default(),
            uid: pax.uid.map_or_else(|| number(&old.uid, header.uid(), "owner"), Ok)?,
            gid: pax.gid.map_or_else(|| number(&old.gid, header.gid(), "group"), Ok)?,
            mtime: pax.mtime.map_or(mtime, Ok)?,
            size: self.left,
            sparse: None,
            xattrs: std::mem::take(&mut pax.xattrs).into_iter().collect(),
            path,
            link,
        };
        self.sparse(header, &pax, &mut entry)?;
        Ok(entry)
    }

    /// Fills in `entry.sparse`, whichever of the four ways of saying it the archive uses.
    fn sparse(&mut self, header: &Header, pax: &Pax, entry: &mut Entry) -> Result<()> {
        let map = if header.entry_type() == EntryType::GNUSparse {
            let (map, size) = self.gnu_map(header)?;
            entry.size = size;
            map
        } else if pax.sparse_in_data {
            entry.size = pax.sparse_size.unwrap_or_default();
            self.map_in_data()?
        } else if !pax.sparse_map.is_empty() {
            entry.size = pax.sparse_size.unwrap_or_default();
            pairs(&pax.sparse_map)
        } else {
            return Ok(());
        };
        let wrong = || bad(format!("entry {}: its map of data and holes makes no sense", shown(&entry.path)));
        let (mut end, mut data) = (0_u64, 0_u64);
        for (at, length) in &map {
            if *at < end {
                return Err(wrong());
            }
            end = at.checked_add(*length).ok_or_else(wrong)?;
            data += length;
        }
        if end > entry.size || data != self.left {
            return Err(wrong());
        }
        entry.sparse = Some(map);
        Ok(())
    }

    /// Of GNU's own format: four in the header, 21 in each block that follows.
    fn gnu_map(&mut self, header: &Header) -> Result<(Vec<(u64, u64)>, u64)> {
        let unreadable = |error| bad("a sparse file's header").because(error);
        let gnu = header.as_gnu().ok_or_else(|| bad("a sparse file in an archive that is not GNU's"))?;
        let size = gnu.real_size().map_err(unreadable)?;
        let mut map = Vec::new();
        let mut take = |chunks: &[tar::GnuSparseHeader]| -> Result<()> {
            for chunk in chunks.iter().filter(|chunk| !chunk.is_empty()) {
                map.push((chunk.offset().map_err(unreadable)?, chunk.length().map_err(unreadable)?));
            }
            if map.len() > SPARSE_LIMIT { Err(too_sparse()) } else { Ok(()) }
        };
        take(&gnu.sparse)?;
        let mut more = gnu.is_extended();
        while more {
            let mut extended = tar::GnuExtSparseHeader::new();
            if !self.read_block_into(extended.as_mut_bytes())? {
                return Err(bad("the archive ends in a sparse file's header"));
            }
            take(&extended.sparse)?;
            more = extended.is_extended();
        }
        Ok((map, size))
    }

    /// PAX 1.0: decimal numbers, one a line, in whole blocks in front of the data.
    fn map_in_data(&mut self) -> Result<Vec<(u64, u64)>> {
        let mut numbers = Vec::new();
        let mut number = None;
        let mut wanted = 1;
        while numbers.len() < wanted {
            let mut block = [0; BLOCK];
            if self.left < BLOCK as u64 || !self.read_block(&mut block)? {
                return Err(bad("the archive ends in a sparse file's map"));
            }
            self.left -= BLOCK as u64;
            for byte in block {
                match byte {
                    b'0'..=b'9' => {
                        let so_far = number.unwrap_or(0_u64);
                        number = so_far.checked_mul(10).and_then(|ten| ten.checked_add(u64::from(byte - b'0')));
                    }
                    b'\n' if numbers.len() < wanted => numbers.push(number.take().ok_or_else(too_sparse)?),
                    // Filled up with zeros behind the last number.
                    _ if numbers.len() >= wanted => break,
                    _ => return Err(bad("a sparse file's map is not of numbers")),
                }
                if numbers.len() == 1 && wanted == 1 {
                    let count = usize::try_from(numbers[0]).unwrap_or(usize::MAX);
                    if count > SPARSE_LIMIT {
                        return Err(too_sparse());
                    }
                    wanted = 1 + 2 * count;
                }
            }
        }
        Ok(pairs(&numbers[1..]))
    }

    /// The content of a header that extends the next one.
    fn extension(&mut self, size: u64) -> Result<Vec<u8>> {
        if size > EXTENSION_LIMIT {
            return Err(bad(format!("a header that extends another has {size} bytes, over {EXTENSION_LIMIT}")));
        }
        let mut bytes = Vec::new();
        (&mut self.inner).take(size).read_to_end(&mut bytes).map_err(read_failed)?;
        if bytes.len() as u64 != size {
            return Err(cut());
        }
        self.padding = padding(size);
        self.skip_rest()?;
        Ok(bytes)
    }

    fn skip_rest(&mut self) -> Result<()> {
        let length = self.left + self.padding;
        let skipped = io::copy(&mut (&mut self.inner).take(length), &mut io::sink()).map_err(read_failed)?;
        if skipped < self.left {
            return Err(cut());
        }
        (self.left, self.padding) = (0, 0);
        Ok(())
    }

    /// False at the end of the archive.
    fn read_block(&mut self, block: &mut [u8; BLOCK]) -> Result<bool> {
        self.read_block_into(block)
    }

    fn read_block_into(&mut self, block: &mut [u8]) -> Result<bool> {
        let mut have = 0;
        while have < block.len() {
            match self.inner.read(&mut block[have..]) {
                Ok(0) if have == 0 => return Ok(false),
                Ok(0) => return Err(cut()),
                Ok(read) => have += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(read_failed(error)),
            }
        }
        Ok(true)
    }
}

/// The current entry's data.
impl<R: Read> Read for Archive<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = usize::try_from(self.left).unwrap_or(usize::MAX).min(buffer.len());
        let read = self.inner.read(&mut buffer[..most])?;
        if read == 0 && most > 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the archive ends in the middle of a file"));
        }
        self.left -= read as u64;
        Ok(read)
    }
}

fn cut() -> Error {
    bad("the archive ends in the middle of an entry")
}

fn too_sparse() -> Error {
    bad(format!("a sparse file of over {SPARSE_LIMIT} stretches"))
}

fn padding(size: u64) -> u64 {
    size.wrapping_neg() % BLOCK as u64
}

fn without_nul(mut name: Vec<u8>) -> Vec<u8> {
    let end = name.iter().position(|byte| *byte == 0).unwrap_or(name.len());
    name.truncate(end);
    name
}

fn pairs(numbers: &[u64]) -> Vec<(u64, u64)> {
    // A file that ends in a hole has a last stretch of no length.
    numbers.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect()
}

/// The header's own sum.
fn check(header: &Header) -> Result<()> {
    let sum: u32 = header
        .as_bytes()
        .iter()
        .enumerate()
        .map(|(at, byte)| match at {
            148..156 => u32::from(b' '),
            _ => u32::from(*byte),
        })
        .sum();
    match header.cksum() {
        Ok(said) if said == sum => Ok(()),
        _ => {
            Err(bad("not a tar archive: a header's checksum is wrong").hint("layers are tar, plain or in gzip or zstd"))
        }
    }
}

fn what(header: &Header, path: &[u8]) -> Result<What> {
    match header.entry_type() {
        // In the oldest archives a directory is a file whose name ends in a slash.
        EntryType::Regular if path.ends_with(b"/") => Ok(What::Directory),
        EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => Ok(What::File),
        EntryType::Link => Ok(What::HardLink),
        EntryType::Symlink => Ok(What::Symlink),
        EntryType::Directory => Ok(What::Directory),
        EntryType::Fifo => Ok(What::Fifo),
        EntryType::Char | EntryType::Block => Ok(What::Device),
        other => Err(bad(format!("entry {}: of unknown type {:?}", shown(path), char::from(other.as_byte())))),
    }
}

/// A name as it may stand in an error: escaped, and not longer than a line.
#[must_use]
pub fn shown(name: &[u8]) -> String {
    let text = name.escape_ascii().to_string();
    match text.char_indices().nth(120) {
        Some((end, _)) => format!("\"{}…\"", &text[..end]),
        None => format!("\"{text}\""),
    }
}

impl Pax {
    fn read(&mut self, bytes: &[u8]) -> Result<()> {
        for record in PaxExtensions::new(bytes) {
            let record = record.map_err(|error| bad("a PAX header cannot be read").because(error))?;
            let (key, value) = (record.key_bytes(), record.value_bytes());
            self.take(key, value)
                .ok_or_else(|| bad(format!("PAX header {}: {} makes no sense", shown(key), shown(value))))?;
        }
        if self.xattr_bytes > XATTRS_LIMIT {
            return Err(bad(format!("an entry's extended attributes have over {XATTRS_LIMIT} bytes")));
        }
        Ok(())
    }

    fn take(&mut self, key: &[u8], value: &[u8]) -> Option<()> {
        let number = || std::str::from_utf8(value).ok()?.parse::<u64>().ok();
        match key {
            b"path" => self.path = Some(value.to_owned()),
            b"linkpath" => self.link = Some(value.to_owned()),
            b"size" => self.size = Some(number()?),
            b"uid" => self.uid = Some(number()?),
            b"gid" => self.gid = Some(number()?),
            b"mtime" => self.mtime = Some(seconds(value)?),
            b"GNU.sparse.name" => self.sparse_name = Some(value.to_owned()),
            b"GNU.sparse.size" | b"GNU.sparse.realsize" => self.sparse_size = Some(number()?),
            b"GNU.sparse.major" => self.sparse_in_data = number()? == 1,
            b"GNU.sparse.offset" | b"GNU.sparse.numbytes" => self.sparse_map.push(number()?),
            b"GNU.sparse.map" => {
                let text = std::str::from_utf8(value).ok()?;
                self.sparse_map = text.split(',').map(|number| number.parse().ok()).collect::<Option<_>>()?;
            }
            _ => {
                if let Some(name) = key.strip_prefix(b"SCHILY.xattr.".as_slice()) {
                    let before = self.xattrs.insert(name.to_owned(), value.to_owned());
                    self.xattr_bytes -= before.map_or(0, |value| name.len() + value.len());
                    self.xattr_bytes += name.len() + value.len();
                }
            }
        }
        (self.sparse_map.len() <= 2 * SPARSE_LIMIT).then_some(())
    }
}

/// `1700000000.123`, perhaps negative; the fraction is dropped.
fn seconds(value: &[u8]) -> Option<i64> {
    let text = std::str::from_utf8(value).ok()?;
    text.split('.').next()?.parse().ok()
}
