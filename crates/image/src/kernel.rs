//! Is it a kernel that both VMMs can start, and can it do there what a guest needs? Just enough of ELF to say no in words (System
//! V gABI, "ELF Header"), and the names by which drivers call themselves.
//!
//! An image may bring a kernel, never modules: the initramfs is the host's, with modules for the host's own kernel. So a kernel of
//! another release must have every driver of [`DRIVERS`] built in.

use std::fs::File;
use std::os::unix::fs::FileExt as _;

use clawpot_core::VmmKind;
use clawpot_types::{Error, Kind, Result};

use crate::manifest::Format;

/// Debian's uncompressed kernel has 55 MB, one with all its debugging data a gigabyte.
pub const LARGEST: u64 = 1 << 30;
/// `EM_X86_64`, `PT_LOAD`.
const X86_64: u16 = 62;
const LOAD: u32 = 1;
/// How much of it is searched at a time, bytes: they overlap by the longest thing that is looked for.
const PIECE: usize = 1 << 20;
/// Longest version, bytes: `UTS_RELEASE` has 64.
const VERSION: usize = 64;
const BANNER: &[u8] = b"Linux version ";

/// What a guest cannot do without, or one of a certain kind.
struct Driver {
    option: &'static str,
    /// Bytes that a kernel has where this is built in, and lacks where it is a module: names that the driver gives itself, and
    /// what its messages begin with. A test finds each in the module and not in the kernel beside it.
    sign: &'static [u8],
    /// `None`: in every VM.
    only: Option<Only>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Only {
    Vmm(VmmKind),
    Rootfs(Format),
}

/// Firecracker's devices are on MMIO and its way to the agent is vsock; QEMU's are on PCI, and the way is a NIC.
const DRIVERS: [Driver; 9] = [
    Driver { option: "DEVTMPFS", sign: b"devtmpfs\0", only: None },
    Driver { option: "VIRTIO_PCI", sign: b"virtio-pci\0", only: Some(Only::Vmm(VmmKind::Qemu)) },
    Driver { option: "VIRTIO_MMIO", sign: b"virtio-mmio\0", only: Some(Only::Vmm(VmmKind::Firecracker)) },
    Driver { option: "VIRTIO_BLK", sign: b"virtio_blk\0", only: None },
    Driver { option: "VIRTIO_NET", sign: b"virtio_net\0", only: None },
    Driver {
        option: "VIRTIO_VSOCKETS",
        sign: b"vmw_vsock_virtio_transport\0",
        only: Some(Only::Vmm(VmmKind::Firecracker)),
    },
    Driver { option: "EXT4_FS", sign: b"EXT4-fs", only: None },
    Driver { option: "OVERLAY_FS", sign: b"overlayfs: ", only: None },
    Driver { option: "EROFS_FS", sign: b"erofs: ", only: Some(Only::Rootfs(Format::Erofs)) },
];

/// What a kernel says of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Looked {
    /// "6.1.0-41-cloud-amd64", where it says so.
    pub release: Option<String>,
    /// Which of [`DRIVERS`] it has.
    built_in: [bool; DRIVERS.len()],
}

impl Looked {
    /// What these bytes begin with.
    fn note(&mut self, bytes: &[u8]) {
        for (driver, built_in) in DRIVERS.iter().zip(&mut self.built_in) {
            *built_in |= bytes.starts_with(driver.sign);
        }
        if self.release.is_none() {
            self.release = bytes.strip_prefix(BANNER).and_then(version);
        }
    }

    /// What a VM of this kind needs and the kernel has not built in, as `CONFIG_…` calls it.
    pub fn lacks(&self, vmm: VmmKind, rootfs: Format) -> Vec<&'static str> {
        let needed = |driver: &Driver| match driver.only {
            None => true,
            Some(Only::Vmm(only)) => only == vmm,
            Some(Only::Rootfs(only)) => only == rootfs,
        };
        let lacking = DRIVERS.iter().zip(self.built_in).filter(|(driver, built_in)| !built_in && needed(driver));
        lacking.map(|(driver, _)| driver.option).collect()
    }

    /// Whether a VM of this kind boots with it beside modules for the kernel `modules`, as far as can be told.
    /// `FailedPrecondition` says what it lacks.
    pub fn fits(&self, modules: &Self, vmm: VmmKind, rootfs: Format) -> Result<()> {
        let lacks = self.lacks(vmm, rootfs);
        if lacks.is_empty() || (self.release.is_some() && self.release == modules.release) {
            return Ok(());
        }
        let release = |of: &Self| of.release.clone().unwrap_or_else(|| "of no known release".to_owned());
        let options = lacks.iter().map(|option| format!("CONFIG_{option}=y")).collect::<Vec<_>>().join(" ");
        let what = format!(
            "its kernel ({}) has not built in {}, and the modules of this host are for its own kernel ({}): a VM ({vmm}) would not boot",
            release(self),
            lacks.join(", "),
            release(modules)
        );
        Err(Error::new(Kind::FailedPrecondition, what)
            .hint(format!("build its kernel with {options}, or give it this host's own kernel: docs/build.md")))
    }
}

/// Whether it is a kernel at all, and what it says of itself. Reads all of it.
pub fn check(file: &File, size: u64) -> Result<Looked> {
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
    look(file)
}

/// What a kernel says of itself, in one pass over the file; a file that is none says nothing.
pub fn look(file: &File) -> Result<Looked> {
    let mut looked = Looked::default();
    let mut begins = [false; 256];
    for first in DRIVERS.iter().map(|driver| driver.sign[0]).chain([BANNER[0]]) {
        begins[usize::from(first)] = true;
    }
    let mut piece = vec![0; PIECE + BANNER.len() + VERSION];
    let mut at = 0_u64;
    loop {
        let read = read_up_to(file, &mut piece, at)?;
        let bytes = &piece[..read];
        let last = read < piece.len();
        // A loop without closures: some fifty million times, and tests' builds inline nothing.
        let (mut from, end) = (0, if last { read } else { PIECE });
        while from < end {
            if begins[usize::from(bytes[from])] {
                looked.note(&bytes[from..]);
            }
            from += 1;
        }
        if last {
            return Ok(looked);
        }
        at += PIECE as u64;
    }
}

fn version(name: &[u8]) -> Option<String> {
    let end = name.iter().take(VERSION).position(|byte| !byte.is_ascii_graphic())?;
    (end > 0).then(|| String::from_utf8_lossy(&name[..end]).into_owned())
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

    fn checked(bytes: &[u8]) -> Result<Looked> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        check(&file, bytes.len() as u64)
    }

    #[test]
    fn only_programs_for_this_machine_pass() {
        assert_eq!(checked(&elf()).unwrap().release, None);
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
            assert_eq!(checked(&bytes).unwrap().release.as_deref(), Some("6.1.0-41-cloud-amd64"), "{before}");
        }
        let mut bytes = elf();
        bytes.extend(b"Linux version ");
        assert_eq!(checked(&bytes).unwrap().release, None, "cut off");
    }

    fn with_drivers(release: &str, has: impl Fn(&str) -> bool) -> Looked {
        let mut bytes = elf();
        bytes.extend(format!("Linux version {release} (x)\0").bytes());
        for (index, driver) in DRIVERS.iter().enumerate().filter(|(_, driver)| has(driver.option)) {
            // Also where it lies across two pieces.
            bytes.resize((index + 1) * PIECE - driver.sign.len() / 2, 0);
            bytes.extend(driver.sign);
        }
        checked(&bytes).unwrap()
    }

    #[test]
    fn what_is_not_built_in_must_be_a_module_of_ours() {
        let host = with_drivers("6.1.0-41", |_| false);
        let bare = with_drivers("6.12.1", |_| false);
        let error = bare.fits(&host, VmmKind::Firecracker, Format::Ext4).unwrap_err();
        assert_eq!(error.kind(), Kind::FailedPrecondition);
        for word in ["6.12.1", "6.1.0-41", "VIRTIO_BLK", "VIRTIO_MMIO", "VIRTIO_VSOCKETS", "EXT4_FS", "OVERLAY_FS"] {
            assert!(error.what().contains(word), "{word}: {}", error.what());
        }
        assert!(!error.what().contains("PCI") && !error.what().contains("EROFS"), "{}", error.what());
        assert!(error.next_step().unwrap().contains("CONFIG_VIRTIO_NET=y"), "{error:?}");
        // As the host's is: it has the host's modules.
        bare.fits(&bare, VmmKind::Qemu, Format::Erofs).unwrap();
        // All that one VMM's machines need, and not what the other's do.
        let mmio = with_drivers("6.12.1", |option| option != "VIRTIO_PCI" && option != "EROFS_FS");
        mmio.fits(&host, VmmKind::Firecracker, Format::Ext4).unwrap();
        assert_eq!(mmio.lacks(VmmKind::Qemu, Format::Ext4), ["VIRTIO_PCI"]);
        assert_eq!(mmio.lacks(VmmKind::Firecracker, Format::Erofs), ["EROFS_FS"]);
        with_drivers("6.12.1", |_| true).fits(&host, VmmKind::Qemu, Format::Erofs).unwrap();
        // Two that say nothing are not the same.
        let silent = checked(&elf()).unwrap();
        silent.fits(&silent, VmmKind::Qemu, Format::Ext4).unwrap_err();
    }

    /// The real kernel and its real modules, where they are prepared: a sign is in the module, and in the kernel only where the
    /// driver is built in.
    #[test]
    fn signs_are_what_drivers_have_and_kernels_without_them_lack() {
        let assets = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets");
        let modules = std::fs::read_dir(assets.join("cache")).into_iter().flatten().flatten();
        let Some(modules) = modules.map(|entry| entry.path()).find(|path| path.join("virtio_blk.ko").exists()) else {
            return eprintln!("SKIPPED: no modules in assets/cache: scripts/install-vm-assets.sh");
        };
        let store = crate::store::Store::new(&assets).unwrap();
        let kernel = File::open(store.blob_path(&store.boot().unwrap().kernel.digest)).unwrap();
        let size = kernel.metadata().unwrap().len();
        let looked = check(&kernel, size).unwrap();
        assert!(looked.release.is_some());
        let builtin = std::fs::read_to_string(modules.join("modules.builtin")).unwrap();
        for (driver, found) in DRIVERS.iter().zip(looked.built_in) {
            let name = match driver.option {
                "VIRTIO_VSOCKETS" => "vmw_vsock_virtio_transport".to_owned(),
                option => option.trim_end_matches("_FS").to_lowercase(),
            };
            let module = modules.join(format!("{name}.ko"));
            let expected = driver.option == "DEVTMPFS" || builtin.contains(&format!("/{name}.ko"));
            assert_eq!(found, expected, "{}", driver.option);
            assert!(expected || module.exists(), "{}: neither built in nor a module", driver.option);
            if let Ok(bytes) = std::fs::read(&module) {
                assert!(bytes.windows(driver.sign.len()).any(|window| window == driver.sign), "{}", driver.option);
            }
        }
    }
}
