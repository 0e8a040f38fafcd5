//! Is it a kernel that both VMMs can start? Just enough of ELF to say no in words (System V gABI, "ELF Header").

use std::fs::File;
use std::os::unix::fs::FileExt as _;

use clawpot_types::{Error, Kind, Result};

/// Debian's uncompressed kernel has 55 MB, one with all its debugging data a gigabyte.
pub const LARGEST: u64 = 1 << 30;
/// `EM_X86_64`, `PT_LOAD`.
const X86_64: u16 = 62;
const LOAD: u32 = 1;
/// How much of it is searched for its version, bytes at a time: they overlap by [`VERSION`].
const PIECE: usize = 1 << 20;
/// Longest version, bytes: `UTS_RELEASE` has 64.
const VERSION: usize = 64;
const BANNER: &[u8] = b"Linux version ";

/// The release that the kernel says it is ("6.1.0-41-cloud-amd64"), where it says so.
pub fn check(file: &File, size: u64) -> Result<Option<String>> {
    if size > LARGEST {
        return Err(bad(format!("it has {} MiB, over {}", size >> 20, LARGEST >> 20)));
    }
    let mut head = [0_u8; 64];
    let read = read_up_to(file, &mut head, 0)?;
    let mut boot = [0; 4];
    if read_up_to(file, &mut boot, 0x202)? == 4 && boot == *b"HdrS" {
        return Err(bad("it is a compressed bzImage")
            .hint("the result's kernel must be the uncompressed vmlinux: in nixpkgs that is ${kernel.dev}/vmlinux"));
    }
    if read < head.len() || head[..6] != *b"\x7fELF\x02\x01" {
        return Err(bad("it is no 64-bit ELF file")
            .hint("the result's kernel must be the uncompressed vmlinux: in nixpkgs that is ${kernel.dev}/vmlinux"));
    }
    let u16_at = |at: usize| u16::from_le_bytes([head[at], head[at + 1]]);
    // Executable, or position-independent.
    if !matches!(u16_at(16), 2 | 3) || u16_at(18) != X86_64 {
        return Err(bad("it is an ELF file, but no program for x86-64"));
    }
    let table = u64::from_le_bytes(head[32..40].try_into().unwrap_or_default());
    let (entry, count) = (u16_at(54), u16_at(56));
    let loads = (0..u64::from(count)).any(|index| {
        let mut kind = [0; 4];
        let at = table.saturating_add(index.saturating_mul(entry.into()));
        read_up_to(file, &mut kind, at).is_ok_and(|read| read == 4) && u32::from_le_bytes(kind) == LOAD
    });
    if !loads {
        return Err(bad("it is an ELF file that loads nothing"));
    }
    version(file)
}

fn version(file: &File) -> Result<Option<String>> {
    let mut piece = vec![0; PIECE + BANNER.len() + VERSION];
    let mut at = 0_u64;
    loop {
        let read = read_up_to(file, &mut piece, at)?;
        let bytes = &piece[..read];
        if let Some(found) = bytes.windows(BANNER.len()).position(|window| window == BANNER) {
            let name = &bytes[found + BANNER.len()..];
            let end = name.iter().take(VERSION).position(|byte| !byte.is_ascii_graphic());
            if let Some(end) = end.filter(|end| *end > 0) {
                return Ok(Some(String::from_utf8_lossy(&name[..end]).into_owned()));
            }
        }
        if read < piece.len() {
            return Ok(None);
        }
        at += PIECE as u64;
    }
}

fn read_up_to(file: &File, buffer: &mut [u8], at: u64) -> Result<usize> {
    let mut have = 0;
    while have < buffer.len() {
        match file.read_at(&mut buffer[have..], at.saturating_add(have as u64)) {
            Ok(0) => break,
            Ok(read) => have += read,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            // An offset above the kernel's largest is its `InvalidInput`.
            Err(error) if error.kind() == std::io::ErrorKind::InvalidInput => break,
            Err(error) => return Err(Error::io("reading the result's kernel", error)),
        }
    }
    Ok(have)
}

fn bad(why: impl Into<String>) -> Error {
    Error::new(Kind::FailedPrecondition, format!("the result's kernel cannot be started: {}", why.into()))
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    /// The least that passes.
    pub fn elf() -> Vec<u8> {
        let mut bytes = vec![0; 120];
        bytes[..6].copy_from_slice(b"\x7fELF\x02\x01");
        (bytes[16], bytes[18]) = (2, 62);
        (bytes[32], bytes[54], bytes[56], bytes[64]) = (64, 56, 1, 1);
        bytes
    }

    fn checked(bytes: &[u8]) -> Result<Option<String>> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        check(&file, bytes.len() as u64)
    }

    #[test]
    fn only_programs_for_this_machine_pass() {
        assert_eq!(checked(&elf()).unwrap(), None);
        let with = |at: usize, byte: u8| {
            let mut bytes = elf();
            bytes[at] = byte;
            bytes
        };
        let bad: [(Vec<u8>, &str); 8] = [
            (Vec::new(), "no 64-bit ELF"),
            (b"\x7fELF\x02\x01".to_vec(), "no 64-bit ELF"),
            ([vec![0; 0x202], b"HdrS".to_vec()].concat(), "bzImage"),
            (with(4, 1), "no 64-bit ELF"),
            (with(16, 1), "no program for x86-64"),
            (with(18, 183), "no program for x86-64"),
            (with(56, 0), "loads nothing"),
            (with(39, 0xff), "loads nothing"),
        ];
        for (bytes, why) in bad {
            let error = checked(&bytes).unwrap_err();
            assert!(error.what().contains(why), "{why}: {}", error.what());
            assert_eq!(error.kind(), Kind::FailedPrecondition);
        }
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&elf()).unwrap();
        assert!(check(&file, LARGEST + 1).is_err());
    }

    #[test]
    fn its_release_is_found_wherever_it_stands() {
        for before in [0, 1000, PIECE - 5, PIECE + 3, 2 * PIECE - 70] {
            let mut bytes = elf();
            bytes.extend(vec![0; before]);
            bytes.extend(b"Linux version 6.1.0-41-cloud-amd64 (debian-kernel@lists.debian.org)\0");
            assert_eq!(checked(&bytes).unwrap().as_deref(), Some("6.1.0-41-cloud-amd64"), "{before}");
        }
        let mut bytes = elf();
        bytes.extend(b"Linux version ");
        assert_eq!(checked(&bytes).unwrap(), None, "cut off");
    }
}
