//! Just enough of ELF to know whether a program needs a loader (System V gABI, "Program Header").

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use clawpot_types::{Error, Kind, Result};

const HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;
const PT_INTERP: u32 = 3;
/// `PN_XNUM`; a program with more program headers than that is not one.
const MOST_HEADERS: u16 = 0xffff;
/// `PATH_MAX`.
const LONGEST_PATH: u64 = 4096;

/// The loader that a 64-bit little-endian program asks for; `None`: it is static.
/// `InvalidArgument`: it is no such program.
pub fn interpreter(program: &Path) -> Result<Option<PathBuf>> {
    let what = || format!("reading the program {}", program.display());
    let file = File::open(program).map_err(|error| Error::io(what(), error))?;
    match read_interpreter(&file) {
        Ok(found) => Ok(found),
        // An offset above the kernel's largest is its `InvalidInput`.
        Err(error) => match error.kind() {
            io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof | io::ErrorKind::InvalidInput => {
                Err(Error::new(Kind::InvalidArgument, what()).because(error))
            }
            _ => Err(Error::io(what(), error)),
        },
    }
}

fn read_interpreter(file: &File) -> io::Result<Option<PathBuf>> {
    let header = read::<HEADER>(file, 0)?;
    // Magic, 64-bit, little-endian.
    if header[..6] != *b"\x7fELF\x02\x01" {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "not a 64-bit little-endian ELF file"));
    }
    let (at, size, count) = (u64_at(&header, 32), u16_at(&header, 54), u16_at(&header, 56));
    if usize::from(size) != PROGRAM_HEADER || count == MOST_HEADERS {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "its program headers are malformed"));
    }
    for index in 0..u64::from(count) {
        let entry = read::<PROGRAM_HEADER>(file, at.saturating_add(index * u64::from(size)))?;
        if u32_at(&entry, 0) == PT_INTERP {
            return read_path(file, u64_at(&entry, 8), u64_at(&entry, 32)).map(Some);
        }
    }
    Ok(None)
}

fn read_path(file: &File, at: u64, length: u64) -> io::Result<PathBuf> {
    use std::os::unix::ffi::OsStrExt;
    let bad = || io::Error::new(io::ErrorKind::InvalidData, "its loader's path is malformed");
    let length = usize::try_from(length.min(LONGEST_PATH)).map_err(|_| bad())?;
    let mut bytes = vec![0; length];
    file.read_exact_at(&mut bytes, at)?;
    let path = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
    let path = PathBuf::from(std::ffi::OsStr::from_bytes(path));
    if path.is_absolute() { Ok(path) } else { Err(bad()) }
}

fn read<const N: usize>(file: &File, at: u64) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    file.read_exact_at(&mut bytes, at)?;
    Ok(bytes)
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from(u16_at(bytes, at)) | u32::from(u16_at(bytes, at + 2)) << 16
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dynamic_program_names_its_loader() {
        // Any program of a distribution.
        let loader = interpreter(Path::new("/bin/sh")).unwrap().expect("/bin/sh is dynamic");
        assert!(loader.exists(), "{}", loader.display());
    }

    #[test]
    fn malformed_programs_are_refused() {
        let temp = tempfile::NamedTempFile::new().unwrap();
        let mut header = vec![0; HEADER];
        header[..6].copy_from_slice(b"\x7fELF\x02\x01");
        header[54] = 56;
        let tell = |bytes: &[u8]| {
            temp.as_file().set_len(0).unwrap();
            temp.as_file().write_all_at(bytes, 0).unwrap();
            interpreter(temp.path()).map_err(|error| error.kind())
        };
        assert_eq!(tell(&header), Ok(None), "no program headers: static");
        assert_eq!(tell(b""), Err(Kind::InvalidArgument));
        assert_eq!(
            tell(b"#!/bin/sh\necho not a program, but long enough to be looked at as if it were one\n"),
            Err(Kind::InvalidArgument)
        );
        // Program headers that lie outside the file.
        let mut outside = header.clone();
        outside[32..40].copy_from_slice(&u64::MAX.to_le_bytes());
        outside[56] = 1;
        assert_eq!(tell(&outside), Err(Kind::InvalidArgument));
        // A loader's path that is not one.
        let mut relative = header;
        relative[32] = 64;
        relative[56] = 1;
        relative.extend([0; PROGRAM_HEADER]);
        relative[64] = 3;
        relative[72] = 120;
        relative[96] = 4;
        relative.extend(b"abc\0");
        assert_eq!(tell(&relative), Err(Kind::InvalidArgument));
    }
}
