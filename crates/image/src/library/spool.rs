//! An archive that comes as a stream, entry by entry onto disk: nothing of it is held in memory.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::PathBuf;

use bytes::Bytes;
use clawpot_types::{Digest, Error, Kind, Result};
use sha2::{Digest as _, Sha256};
use tokio::sync::mpsc;

use crate::build::Work;
use crate::manifest::Blob;
use crate::oci::DOCUMENT_LIMIT;
use crate::unpack::tar::{Archive, What, shown};
use crate::unpack::tree::clean;

/// Files in an archive: 512 layers of a dozen images.
const ENTRIES: usize = 16_384;
/// What the kernel takes for a path (PATH_MAX), bytes: links are kept in memory.
const LONGEST_LINK: usize = 4096;
/// Bytes of all names and of what links point to, which are kept in memory: 512 of each entry, where a layout's names have 77.
const NAMES: usize = 8 << 20;
/// A layout is two directories deep, what `docker save` writes is one.
const DEPTH: usize = 16;

/// One file of the archive.
#[derive(Clone, Debug)]
pub struct Spooled {
    pub path: PathBuf,
    pub blob: Blob,
}

/// The archive's files, below a directory that goes when this is dropped.
#[derive(Debug)]
pub struct Spool {
    files: BTreeMap<String, Spooled>,
    links: BTreeMap<String, String>,
    /// Read so far; the number of the last names its file.
    entries: usize,
    /// Not by way of its name: of two entries of one name the later is the name's, and both are their digest's.
    by_digest: BTreeMap<Digest, Spooled>,
    _work: Work,
}

/// The stream, where it may be read blockingly.
pub struct Chunks {
    receiver: mpsc::Receiver<Result<Bytes>>,
    current: Bytes,
    read: u64,
    told: Box<dyn Fn(u64) + Send>,
}

impl std::fmt::Debug for Chunks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Chunks").field("read", &self.read).finish_non_exhaustive()
    }
}

impl Chunks {
    pub fn new(receiver: mpsc::Receiver<Result<Bytes>>, told: impl Fn(u64) + Send + 'static) -> Self {
        Self { receiver, current: Bytes::new(), read: 0, told: Box::new(told) }
    }
}

impl Read for Chunks {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.current.is_empty() {
            match self.receiver.blocking_recv() {
                None => return Ok(0),
                Some(Ok(bytes)) => self.current = bytes,
                // What is over a limit is said as such.
                Some(Err(error)) if error.kind() == Kind::Exhausted => {
                    return Err(io::Error::new(io::ErrorKind::QuotaExceeded, error.chain()));
                }
                Some(Err(error)) => return Err(io::Error::other(error.chain())),
            }
        }
        let length = buffer.len().min(self.current.len());
        buffer[..length].copy_from_slice(&self.current.split_to(length));
        self.read += length as u64;
        (self.told)(self.read);
        Ok(length)
    }
}

impl Spool {
    /// Reads all of `archive`, at most `limit` bytes of files. Blocks.
    pub fn read(archive: impl Read, work: Work, limit: u64) -> Result<Self> {
        let mut spool = Self {
            files: BTreeMap::new(),
            links: BTreeMap::new(),
            entries: 0,
            by_digest: BTreeMap::new(),
            _work: work,
        };
        let mut archive = Archive::new(archive);
        let (mut bytes, mut names) = (0_u64, 0_usize);
        let what = |error: Error| error.context("reading the archive");
        while let Some(entry) = archive.next_entry().map_err(what)? {
            // Each counts, also one whose name was there before.
            spool.entries += 1;
            if spool.entries > ENTRIES {
                return Err(bad(format!("the archive has over {ENTRIES} entries")));
            }
            let name = text(&clean(&entry.path, DEPTH)?)?;
            names = names.saturating_add(name.len()).saturating_add(entry.link.len());
            if names > NAMES {
                return Err(bad(format!("the names in the archive have over {} MiB", NAMES >> 20)));
            }
            bytes = bytes.saturating_add(entry.size);
            match entry.what {
                What::File if bytes > limit => {
                    return Err(Error::new(Kind::Exhausted, format!("the archive is larger than {} MiB", limit >> 20))
                        .hint("that is what the disk or the store's quota leaves; `clawpot image gc` may help"));
                }
                What::File if entry.sparse.is_some() => {
                    return Err(bad(format!("{name}: sparse files are not of a layout")));
                }
                What::File => spool.file(name, &mut archive, entry.size)?,
                What::Symlink | What::HardLink if entry.link.len() > LONGEST_LINK => {
                    return Err(bad(format!("{name}: a link of over {LONGEST_LINK} bytes")));
                }
                // `docker save` links layers that several images share.
                What::Symlink | What::HardLink => {
                    drop(spool.links.insert(name, String::from_utf8_lossy(&entry.link).into_owned()))
                }
                What::Directory => {}
                What::Fifo | What::Device => return Err(bad(format!("{name}: neither a file nor a directory"))),
            }
        }
        Ok(spool)
    }

    fn file(&mut self, name: String, data: &mut impl Read, size: u64) -> Result<()> {
        let path = self._work.dir.join(self.entries.to_string());
        let failed = |error| Error::io(format!("writing {}", path.display()), error);
        let mut file = File::create_new(&path).map_err(failed)?;
        let mut hasher = Sha256::new();
        let mut left = size;
        let mut buffer = vec![0; 256 << 10];
        while left > 0 {
            let most = usize::try_from(left).unwrap_or(usize::MAX).min(buffer.len());
            let read = data.read(&mut buffer[..most]).map_err(|error| bad("the archive ends early").because(error))?;
            if read == 0 {
                return Err(bad("the archive ends early"));
            }
            hasher.update(&buffer[..read]);
            file.write_all(&buffer[..read]).map_err(failed)?;
            left -= read as u64;
        }
        let digest = Digest::from_sha256(&hasher.finalize().into());
        if let Some(said) = name.strip_prefix("blobs/sha256/")
            && said != digest.hex()
        {
            return Err(Error::new(Kind::Corrupt, format!("{name}: its content has the digest {digest}"))
                .hint("make the archive again"));
        }
        let spooled = Spooled { path, blob: Blob { digest: digest.clone(), size } };
        self.by_digest.insert(digest, spooled.clone());
        self.files.insert(name, spooled);
        Ok(())
    }

    /// By its name in the archive, also through a link.
    pub fn get(&self, name: &str) -> Option<&Spooled> {
        if let Some(file) = self.files.get(name) {
            return Some(file);
        }
        // Relative to where it stands; one step is all that is ever written.
        let target = self.links.get(name)?;
        let dir = name.rsplit_once('/').map_or("", |(dir, _)| dir);
        let mut parts: Vec<&str> = dir.split('/').filter(|part| !part.is_empty()).collect();
        for part in target.split('/') {
            match part {
                ".." => drop(parts.pop()),
                "" | "." => {}
                part => parts.push(part),
            }
        }
        self.files.get(&parts.join("/"))
    }

    pub fn blob(&self, blob: &Blob) -> Result<&Spooled> {
        match self.by_digest.get(&blob.digest) {
            Some(file) if file.blob.size == blob.size => Ok(file),
            Some(file) => {
                Err(bad(format!("{}: it has {} bytes, where {} are said", blob.digest, file.blob.size, blob.size)))
            }
            None => Err(bad(format!("{}: it is not in the archive", blob.digest))),
        }
    }

    /// A small file's content.
    pub fn document(&self, file: &Spooled) -> Result<Vec<u8>> {
        if file.blob.size > DOCUMENT_LIMIT {
            return Err(bad(format!("a document of {} bytes, over {DOCUMENT_LIMIT}", file.blob.size)));
        }
        std::fs::read(&file.path).map_err(|error| Error::io(format!("reading {}", file.path.display()), error))
    }
}

fn bad(what: impl Into<String>) -> Error {
    Error::new(Kind::InvalidArgument, what)
        .hint("it must be an OCI layout (directory or tar), what `docker save` writes, or an export")
}

fn text(name: &[u8]) -> Result<String> {
    String::from_utf8(name.to_vec()).map_err(|_| bad(format!("entry {}: its name is not UTF-8", shown(name))))
}
