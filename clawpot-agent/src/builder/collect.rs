//! A build's result, from the store onto the output disk: whole under its name, or not there.

use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use clawpot_common::builder::{BASE_FILE, Base, BaseFile, KERNEL_FILE, LOG_FILE, ROOTFS_FILE};
use serde::Deserialize;
use sha2::{Digest, Sha256};

use super::{Context, Failure};

/// Copied at once, bytes; between two of these the build can be stopped.
const CHUNK: usize = 1 << 20;
/// Zeros of this length and alignment become holes, bytes: a block of the file system.
const BLOCK: usize = 4096;

/// What the result may call its files, in the order in which they are looked for.
const KERNELS: [&str; 2] = ["kernel", KERNEL_FILE];
const ROOTFSES: [&str; 2] = ["rootfs", ROOTFS_FILE];

/// Longest [`BASE_FILE`] of a result, bytes.
const MAX_BASE: u64 = 64 << 10;
/// Longest command line that the result may ask for, bytes; the kernel takes 2048 with what the host adds.
const MAX_BOOT_ARGS: usize = 1024;
/// Of a result that lacks something, this many names are told.
const NAMES: usize = 20;

/// From and to where, and until when.
#[derive(Debug)]
pub struct Collect<'a> {
    /// As nix said it.
    pub result: &'a Path,
    /// The store that everything has to be in.
    pub store: &'a Path,
    pub output: &'a Path,
    pub deadline: Instant,
    /// Set: nobody wants it any more.
    pub cancelled: &'a AtomicBool,
}

/// What a result may say of the machine that it is made for.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Wish {
    vcpu_count: Option<u32>,
    mem_size_mib: Option<u32>,
    boot_args: Option<String>,
}

/// Removes what an earlier build left: a failed one leaves its log and nothing else.
pub fn clear(output: &Path) -> Result<(), Failure> {
    for name in [BASE_FILE, KERNEL_FILE, ROOTFS_FILE, LOG_FILE] {
        for path in [output.join(name), half(output, name)] {
            match fs::remove_file(&path) {
                Err(error) if error.kind() != ErrorKind::NotFound => {
                    return Err(error).context(format_args!("removing {}", path.display()));
                }
                _ => {}
            }
        }
    }
    Ok(())
}

impl Collect<'_> {
    /// Kernel, root file system and the description of their machine, which comes last.
    pub fn run(&self) -> Result<(), Failure> {
        let store = self.store.canonicalize().context(format_args!("looking for {}", self.store.display()))?;
        let kernel = self.find(&store, &KERNELS, "kernel")?;
        let rootfs = self.find(&store, &ROOTFSES, "rootfs")?;
        let wish = self.wish(&store)?;
        let base = Base {
            vcpu_count: wish.vcpu_count.unwrap_or(1),
            mem_size_mib: wish.mem_size_mib.unwrap_or(256),
            boot_args: wish.boot_args.unwrap_or_else(|| "console=ttyS0 reboot=k panic=1".to_owned()),
            kernel: self.copy(&kernel, KERNEL_FILE)?,
            rootfs: self.copy(&rootfs, ROOTFS_FILE)?,
        };
        let mut text = serde_json::to_vec_pretty(&base).context("describing the machine")?;
        text.push(b'\n');
        self.put(BASE_FILE, |file| file.write_all(&text)).map_err(|error| self.failure(BASE_FILE, &error))
    }

    /// The first of `names` that is a file of the store.
    fn find(&self, store: &Path, names: &[&str], what: &str) -> Result<PathBuf, Failure> {
        for name in names {
            let path = self.result.join(name);
            let Ok(real) = path.canonicalize() else { continue };
            if !real.starts_with(store) {
                return Err(Failure(format!("{} leads out of the store, to {}", path.display(), real.display())));
            }
            return Ok(real);
        }
        let names = names.join(" nor ");
        Err(Failure(format!(
            "no {what} in the result: {} has neither {names}, but {}",
            self.result.display(),
            listed(self.result)
        )))
    }

    fn wish(&self, store: &Path) -> Result<Wish, Failure> {
        let path = self.result.join(BASE_FILE);
        let Ok(real) = path.canonicalize() else { return Ok(Wish::default()) };
        let doing = format!("reading {}", path.display());
        if !real.starts_with(store) {
            return Err(Failure(format!("{doing}: it leads out of the store")));
        }
        let (file, _) = open(&real).context(&doing)?;
        let mut text = Vec::new();
        file.take(MAX_BASE).read_to_end(&mut text).context(&doing)?;
        let wish: Wish = serde_json::from_slice(&text).context(&doing)?;
        wish.check().map_err(|why| Failure(format!("{doing}: {why}")))?;
        Ok(wish)
    }

    fn copy(&self, from: &Path, name: &str) -> Result<BaseFile, Failure> {
        let doing = format!("copying {} to {name} on the output disk", from.display());
        let (mut source, metadata) = open(from).context(&doing)?;
        if metadata.len() == 0 {
            return Err(Failure(format!("{doing}: it is empty")));
        }
        let mut copied = None;
        let put = self.put(name, |file| {
            copied = Some(self.copy_bytes(&mut source, file)?);
            Ok(())
        });
        put.map_err(|error| self.failure(name, &error))?;
        let (digest, size) = copied.unwrap_or_default();
        Ok(BaseFile { file: name.to_owned(), digest, size })
    }

    /// Blocks of zeros stay holes. Returns digest and size.
    fn copy_bytes(&self, source: &mut File, target: &mut File) -> io::Result<(String, u64)> {
        let mut buffer = vec![0; CHUNK];
        let (mut hash, mut size) = (Sha256::new(), 0_u64);
        loop {
            self.go_on()?;
            let count = read_full(source, &mut buffer)?;
            let chunk = buffer.get(..count).unwrap_or_default();
            if chunk.is_empty() {
                break;
            }
            hash.update(chunk);
            for block in chunk.chunks(BLOCK) {
                if block.iter().any(|byte| *byte != 0) {
                    target.seek(SeekFrom::Start(size))?;
                    target.write_all(block)?;
                }
                size += u64::try_from(block.len()).map_err(io::Error::other)?;
            }
        }
        target.set_len(size)?;
        let digest = hash.finalize().iter().fold("sha256:".to_owned(), |text, byte| format!("{text}{byte:02x}"));
        Ok((digest, size))
    }

    fn go_on(&self) -> io::Result<()> {
        if self.cancelled.load(Ordering::Relaxed) {
            return Err(io::Error::new(ErrorKind::Interrupted, "the host has hung up"));
        }
        if Instant::now() >= self.deadline {
            return Err(io::Error::new(ErrorKind::TimedOut, "the build's time is over"));
        }
        Ok(())
    }

    /// A file on the output disk that bears its name only when it is whole and on the disk.
    fn put(&self, name: &str, write: impl FnOnce(&mut File) -> io::Result<()>) -> io::Result<()> {
        let half = half(self.output, name);
        let whole = File::create(&half).and_then(|mut file| {
            write(&mut file)?;
            file.sync_all()
        });
        if let Err(error) = whole {
            // Room for the log's end. What remains is not named as anything that is looked for.
            fs::remove_file(&half).unwrap_or_default();
            return Err(error);
        }
        fs::rename(&half, self.output.join(name))?;
        File::open(self.output)?.sync_all()
    }

    fn failure(&self, name: &str, error: &io::Error) -> Failure {
        if error.kind() != ErrorKind::StorageFull {
            return Failure(format!("writing {name} onto the output disk: {error}"));
        }
        let room = rustix::fs::statvfs(self.output).map_or(0, |disk| disk.f_blocks.saturating_mul(disk.f_frsize) >> 20);
        Failure(format!(
            "the output disk is full: it has {room} MiB in all, too little for {name}; give the build a larger one"
        ))
    }
}

impl Wish {
    fn check(&self) -> Result<(), String> {
        let within = |what: &str, value: Option<u32>, least: u32, most: u32| match value {
            Some(value) if !(least..=most).contains(&value) => Err(format!("{what}: must be {least} to {most}")),
            _ => Ok(()),
        };
        within("vcpu_count", self.vcpu_count, 1, 256)?;
        within("mem_size_mib", self.mem_size_mib, 64, 1 << 20)?;
        match &self.boot_args {
            Some(args) if args.len() > MAX_BOOT_ARGS => Err(format!("boot_args: longer than {MAX_BOOT_ARGS} bytes")),
            Some(args) if !args.chars().all(|char| matches!(char, ' '..='~')) => {
                Err("boot_args: has more than printable ASCII".to_owned())
            }
            _ => Ok(()),
        }
    }
}

/// Only a regular file, and without waiting for the other end of a pipe.
fn open(path: &Path) -> io::Result<(File, Metadata)> {
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(io::Error::new(ErrorKind::InvalidInput, "not a regular file"));
    }
    Ok((file, metadata))
}

fn half(output: &Path, name: &str) -> PathBuf {
    output.join(format!(".{name}.half"))
}

/// Fills the buffer as far as the file goes, so that blocks stay aligned.
fn read_full(file: &mut File, buffer: &mut [u8]) -> io::Result<usize> {
    let mut count = 0;
    while let Some(room) = buffer.get_mut(count..).filter(|room| !room.is_empty()) {
        match file.read(room) {
            Ok(0) => break,
            Ok(more) => count += more,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(count)
}

/// What there is instead, for whoever wrote the flake.
fn listed(result: &Path) -> String {
    let Ok(entries) = fs::read_dir(result) else { return "it is no directory".to_owned() };
    let mut names: Vec<String> =
        entries.flatten().take(NAMES).map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    if names.is_empty() { "nothing".to_owned() } else { names.join(", ") }
}

#[cfg(test)]
#[allow(clippy::disallowed_methods, reason = "a test's files")]
mod tests {
    use std::os::unix::fs::{MetadataExt, symlink};
    use std::time::Duration;

    use super::*;

    struct Room {
        dir: tempfile::TempDir,
        result: PathBuf,
    }

    impl Room {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let result = dir.path().join("store/abc-machine");
            fs::create_dir_all(&result).unwrap();
            fs::create_dir(dir.path().join("out")).unwrap();
            Self { dir, result }
        }

        fn file(&self, name: &str, bytes: &[u8]) {
            fs::write(self.result.join(name), bytes).unwrap();
        }

        fn collect(&self) -> Result<(), String> {
            self.collect_until(Instant::now() + Duration::from_secs(60), &AtomicBool::new(false))
        }

        fn collect_until(&self, deadline: Instant, cancelled: &AtomicBool) -> Result<(), String> {
            let (store, output) = (self.dir.path().join("store"), self.out());
            let collect = Collect { result: &self.result, store: &store, output: &output, deadline, cancelled };
            collect.run().map_err(|failure| failure.to_string())
        }

        fn out(&self) -> PathBuf {
            self.dir.path().join("out")
        }

        fn names(&self) -> Vec<String> {
            let entries = fs::read_dir(self.out()).unwrap();
            let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
            names.sort();
            names
        }
    }

    #[test]
    fn a_result_is_copied_and_described() {
        let room = Room::new();
        let mut rootfs = vec![0; 3 * CHUNK + 5000];
        rootfs[CHUNK + 7] = 1;
        room.file("kernel.real", b"a kernel");
        symlink("kernel.real", room.result.join("kernel")).unwrap();
        room.file("rootfs.ext4", &rootfs);
        room.collect().unwrap();
        assert_eq!(room.names(), [BASE_FILE, ROOTFS_FILE, KERNEL_FILE]);
        assert_eq!(fs::read(room.out().join(KERNEL_FILE)).unwrap(), b"a kernel");
        assert_eq!(fs::read(room.out().join(ROOTFS_FILE)).unwrap(), rootfs);
        assert!(fs::metadata(room.out().join(ROOTFS_FILE)).unwrap().blocks() * 512 < 1 << 20, "holes were filled");
        let base: Base = serde_json::from_slice(&fs::read(room.out().join(BASE_FILE)).unwrap()).unwrap();
        assert_eq!((base.vcpu_count, base.mem_size_mib), (1, 256));
        assert_eq!(base.rootfs.size, u64::try_from(rootfs.len()).unwrap());
        // By sha256sum.
        assert_eq!(base.kernel.digest, "sha256:4fff0d3e643b3894c17a0738fbdc591953aa722c9d42774425090accc4377126");
        clear(&room.out()).unwrap();
        assert!(room.names().is_empty());
    }

    #[test]
    fn the_result_says_what_machine_it_wants() {
        let room = Room::new();
        room.file("vmlinux", b"k");
        room.file("rootfs", b"r");
        room.file(BASE_FILE, br#"{"vcpu_count": 2, "mem_size_mib": 512, "boot_args": "quiet", "note": "more"}"#);
        room.collect().unwrap();
        let base: Base = serde_json::from_slice(&fs::read(room.out().join(BASE_FILE)).unwrap()).unwrap();
        assert_eq!((base.vcpu_count, base.mem_size_mib, base.boot_args.as_str()), (2, 512, "quiet"));
        for (bad, why) in [
            ("{", "EOF"),
            (r#"{"vcpu_count": 0}"#, "vcpu_count: must be"),
            (r#"{"mem_size_mib": 5000000}"#, "mem_size_mib: must be"),
            (r#"{"boot_args": "a\nb"}"#, "boot_args: has more"),
        ] {
            room.file(BASE_FILE, bad.as_bytes());
            let error = room.collect().unwrap_err();
            assert!(error.contains(why), "{error}");
        }
    }

    #[test]
    fn what_is_missing_or_elsewhere_is_named() {
        let room = Room::new();
        assert!(room.collect().unwrap_err().ends_with("has neither kernel nor vmlinux, but nothing"));
        room.file("rootfs.ext4", b"r");
        let error = room.collect().unwrap_err();
        assert!(error.starts_with("no kernel in the result") && error.ends_with("but rootfs.ext4"), "{error}");
        symlink("/etc/passwd", room.result.join("vmlinux")).unwrap();
        assert!(room.collect().unwrap_err().contains("vmlinux leads out of the store, to /etc/passwd"));
        fs::remove_file(room.result.join("vmlinux")).unwrap();
        fs::create_dir(room.result.join("vmlinux")).unwrap();
        assert!(room.collect().unwrap_err().ends_with("not a regular file"));
        fs::remove_dir(room.result.join("vmlinux")).unwrap();
        room.file("vmlinux", b"");
        assert!(room.collect().unwrap_err().ends_with("it is empty"));
        room.file("vmlinux", b"k");
        fs::remove_file(room.result.join("rootfs.ext4")).unwrap();
        assert!(room.collect().unwrap_err().starts_with("no rootfs in the result"));
        assert!(room.names().is_empty(), "{:?}", room.names());
    }

    #[test]
    fn time_and_the_host_end_a_copy() {
        let room = Room::new();
        room.file("vmlinux", b"k");
        room.file("rootfs.ext4", b"r");
        let (yes, no) = (AtomicBool::new(true), AtomicBool::new(false));
        assert!(room.collect_until(Instant::now(), &no).unwrap_err().ends_with("time is over"));
        let later = Instant::now() + Duration::from_secs(60);
        assert!(room.collect_until(later, &yes).unwrap_err().ends_with("hung up"));
        assert!(room.names().is_empty(), "{:?}", room.names());
    }
}
