//! What a guest left, looked at with suspicion, and then an image under a name.

use std::fs::File;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use clawpot_core::VmmKind;
use clawpot_core::ports::{BuildName, ImageDetail, Revision};
use clawpot_types::ext4::{self, Superblock};
use clawpot_types::{Digest, Error, Kind, MiB, Result, Vcpus, VmId};
use rustix::fs::{FallocateFlags, OFlags};
use serde::Deserialize;

use super::{Bench, OUTPUT};
use crate::build::{Work, format_of, take_over};
use crate::kernel::{self, Looked};
use crate::library::LEAST;
use crate::manifest::{Blob, Config, Format, Machine, Manifest, Rootfs, VERSION};
use crate::oci;

/// What the builder's agent leaves on the disk of results.
const KERNEL: &str = "vmlinux";
const ROOTFS: &str = "rootfs.ext4";
const BASE: &str = "fc-base.json";
/// Of [`BASE`], bytes.
const BASE_LIMIT: u64 = 64 << 10;
/// The least of a file that becomes a hole, bytes: a block.
const HOLE: usize = 4096;

/// [`BASE`]: the machine that the result is made for.
#[derive(Debug, Deserialize)]
struct Base {
    vcpu_count: u32,
    mem_size_mib: u64,
    kernel: BaseFile,
    rootfs: BaseFile,
}

#[derive(Debug, Deserialize)]
struct BaseFile {
    digest: Digest,
    size: u64,
}

pub async fn take(bench: &Bench, build: &VmId, revision: Revision, name: &BuildName) -> Result<ImageDetail> {
    let disk = bench.of(build).join(OUTPUT);
    let builder = &bench.library.builder;
    // One after the other: the limit is of each file, and what is left is for all of them.
    let small = [KERNEL, BASE];
    let most = room(bench, &disk, small.len()).await?;
    let small = super::dump::dump(builder, &disk, &small, most.min(kernel::LARGEST)).await?;
    let large = super::dump::dump(builder, &disk, &[ROOTFS], room(bench, &disk, 1).await?).await?;
    let name = name.clone();
    bench.blocking(move |this| bring_in(this, (&small, &large), revision, &name)).await
}

/// The most that each of so many files of the disk can be, bytes: what is dumped has no holes before it is looked at.
async fn room(bench: &Bench, disk: &Path, files: usize) -> Result<u64> {
    let disk = disk.to_owned();
    bench
        .blocking(move |this| {
            this.library.store.prepare()?;
            let left = this.library.left(LEAST)?;
            let size = std::fs::symlink_metadata(&disk)
                .map_err(|error| Error::io(format!("looking at {}", disk.display()), error))?
                .len();
            Ok(size.min(left / files as u64))
        })
        .await
}

/// `small` has the kernel and what is said of the machine, `large` the root file system.
fn bring_in(
    bench: &Bench,
    (small, large): (&Work, &Work),
    revision: Revision,
    name: &BuildName,
) -> Result<ImageDetail> {
    let (kernel_path, kernel_file) = open(small, KERNEL)?;
    let (rootfs_path, rootfs_file) = open(large, ROOTFS)?;
    let size =
        |file: &File| file.metadata().map(|meta| meta.len()).map_err(|error| Error::io("looking at the result", error));
    let looked = kernel::check(&kernel_file, size(&kernel_file)?)?;
    check_rootfs(&rootfs_file, size(&rootfs_file)?)?;
    dig_holes(&rootfs_file).map_err(|error| Error::io("making holes in the result's file system", error))?;
    let kernel = blob(take_over(&kernel_path)?);
    let rootfs = blob(take_over(&rootfs_path)?);
    let base = base(small)?;
    if let Some(base) = &base {
        for (file, said, found) in [(KERNEL, &base.kernel, &kernel), (ROOTFS, &base.rootfs, &rootfs)] {
            if said.digest != found.digest || said.size != found.size {
                let what = format!(
                    "the result is torn: {file} has the digest {}, its maker says {}",
                    found.digest, said.digest
                );
                return Err(
                    Error::new(Kind::Corrupt, what).hint("build it again; with a larger --disk if it was nearly full")
                );
            }
        }
    }
    may_boot(bench, &looked, &kernel)?;
    let key = revision.key.clone();
    let manifest = Manifest {
        version: VERSION,
        rootfs: Rootfs { blob: rootfs.clone(), format: Format::Ext4 },
        config: Config::default(),
        created_at: oci::now(),
        kernel: Some(kernel.clone()),
        machine: base.and_then(|base| machine(&base)),
        source: None,
        revision: Some(Revision { kernel_release: looked.release, ..revision }),
    };
    let store = &bench.library.store;
    let held = store.lock()?;
    // Again, now that it counts: the name may have come to mean something meanwhile. Before anything is moved.
    bench.may_name(name, true).or_else(|error| same_image(bench, name, &manifest, error))?;
    for (path, blob) in [(&kernel_path, &kernel), (&rootfs_path, &rootfs)] {
        store.adopt(path, &blob.digest, &held)?;
        bench.library.verifier.vouch(&store.blob_path(&blob.digest), &blob.digest);
    }
    let digest = store.put_manifest(&manifest, &held)?;
    if let Some(key) = key {
        clawpot_host::fs::replace(&store.made_of_path(&key), format!("{digest}\n").as_bytes(), 0o444)?;
    }
    store.set_name(&name.name, &digest, true, &held)?;
    drop(held);
    store.describe(&name.name)
}

/// That the VMs of some host can: of this one, or else of one with the other VMM, to which the image can be taken.
fn may_boot(bench: &Bench, looked: &Looked, own: &Blob) -> Result<()> {
    let host = match bench.library.store.boot() {
        Ok(boot) if boot.kernel == *own => return Ok(()),
        Ok(boot) => {
            let path = bench.library.store.blob_path(&boot.kernel.digest);
            let open = File::open(&path);
            kernel::look(&open.map_err(|error| Error::io(format!("opening the kernel {}", path.display()), error))?)?
        }
        // There is no other kernel, hence no modules.
        Err(error) if error.kind() == Kind::FailedPrecondition => Looked::default(),
        Err(error) => return Err(error),
    };
    let other = match bench.vmm {
        VmmKind::Firecracker => VmmKind::Qemu,
        VmmKind::Qemu => VmmKind::Firecracker,
    };
    looked.fits(&host, bench.vmm, Format::Ext4).or_else(|error| match looked.lacks(other, Format::Ext4).is_empty() {
        true => Ok(()),
        false => Err(error.context("the result cannot be booted")),
    })
}

/// The name means an image of the very same files: then it may mean this one, which only knows a later revision.
fn same_image(bench: &Bench, name: &BuildName, new: &Manifest, error: Error) -> Result<()> {
    match bench.library.store.resolve(&name.name) {
        Ok((_, old)) if old.revision.is_some() && (&old.rootfs, &old.kernel) == (&new.rootfs, &new.kernel) => Ok(()),
        _ => Err(error),
    }
}

fn blob((digest, size): (Digest, u64)) -> Blob {
    Blob { digest, size }
}

/// A plain file that the helper dumped. Nobody else writes into its directory any more.
fn open(work: &Work, name: &str) -> Result<(PathBuf, File)> {
    let path = work.dir.join(name);
    match open_plain(&path) {
        Ok(Some(file)) => Ok((path, file)),
        Ok(None) => Err(Error::new(Kind::FailedPrecondition, format!("the build left no {name}")).hint(
            "the attribute must be a directory with `kernel` (or `vmlinux`) and `rootfs` (or `rootfs.ext4`): see docs/build.md",
        )),
        Err(error) => Err(error),
    }
}

fn open_plain(path: &Path) -> Result<Option<File>> {
    let flags = i32::try_from(OFlags::NOFOLLOW.bits()).unwrap_or_default();
    let failed = |error| Error::io(format!("opening {}", path.display()), error);
    match std::fs::OpenOptions::new().read(true).write(true).custom_flags(flags).open(path) {
        Ok(file) if file.metadata().map_err(failed)?.is_file() => Ok(Some(file)),
        Ok(_) => Err(Error::new(Kind::Corrupt, format!("{}: no plain file", path.display()))),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(failed(error)),
    }
}

/// By its superblock: ext4, and no larger than its file, as a guest's kernel would find out only when it reads there.
fn check_rootfs(mut file: &File, size: u64) -> Result<()> {
    let bad =
        |why: String| Error::new(Kind::FailedPrecondition, format!("the result's rootfs cannot be mounted: {why}"));
    match format_of(&mut file) {
        Ok(Format::Ext4) => {}
        Ok(Format::Erofs) => return Err(bad("it is erofs, where ext4 is expected".to_owned())),
        Err(_) => return Err(bad("it is no ext4".to_owned())),
    }
    let mut superblock = [0; ext4::LEN];
    file.read_exact_at(&mut superblock, ext4::AT).map_err(|error| bad("it is cut off".to_owned()).because(error))?;
    let superblock = Superblock::of(&superblock).ok_or_else(|| bad("it is no ext4".to_owned()))?;
    let bytes = superblock.block().and_then(|block| block.checked_mul(superblock.blocks()));
    if bytes.is_none_or(|bytes| bytes > size) {
        let blocks = superblock.blocks();
        return Err(bad(format!("it says that it has {blocks} blocks, and its file has {size} bytes")));
    }
    Ok(())
}

/// `debugfs` writes zeros where there was a hole, and where a builder wrote zeros there is no need for any either.
fn dig_holes(file: &File) -> std::io::Result<()> {
    let mut buffer = vec![0_u8; 1 << 20];
    let mut at = 0_u64;
    loop {
        let read = match file.read_at(&mut buffer, at)? {
            0 => return Ok(()),
            read => read,
        };
        let mut zeros = 0_u64;
        let mut from = at;
        for block in buffer[..read].chunks(HOLE) {
            if block.len() == HOLE && block.iter().all(|byte| *byte == 0) {
                zeros += HOLE as u64;
                continue;
            }
            punch(file, from, zeros)?;
            from += zeros + block.len() as u64;
            zeros = 0;
        }
        punch(file, from, zeros)?;
        at += read as u64;
    }
}

fn punch(file: &File, from: u64, length: u64) -> std::io::Result<()> {
    if length == 0 {
        return Ok(());
    }
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    match rustix::fs::fallocate(file, flags, from, length) {
        // A file system without holes: it costs room, no more.
        Err(rustix::io::Errno::OPNOTSUPP) => Ok(()),
        done => done.map_err(Into::into),
    }
}

/// `None`: the builder left none.
fn base(work: &Work) -> Result<Option<Base>> {
    let Some(file) = open_plain(&work.dir.join(BASE))? else { return Ok(None) };
    let corrupt = || Error::new(Kind::FailedPrecondition, format!("the result's {BASE} makes no sense"));
    let mut text = String::new();
    let read = std::io::Read::read_to_string(&mut std::io::Read::take(&file, BASE_LIMIT + 1), &mut text);
    read.map_err(|error| corrupt().because(error))?;
    if text.len() as u64 > BASE_LIMIT {
        return Err(corrupt());
    }
    serde_json::from_str(&text).map(Some).map_err(|error| corrupt().because(error))
}

/// What is out of our range says nothing.
fn machine(base: &Base) -> Option<Machine> {
    let vcpus = Vcpus::try_from(base.vcpu_count).ok();
    let memory_mib = MiB::memory(base.mem_size_mib).ok();
    (vcpus.is_some() || memory_mib.is_some()).then_some(Machine { vcpus, memory_mib, disk_mib: None })
}
