//! One server per state directory.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clawpot_types::{Error, Kind, Result};
use rustix::fs::FlockOperation;
use rustix::io::Errno;
use rustix::process::Pid;

/// How long a lock is waited for whose holder is dead.
const LETTING_GO: Duration = Duration::from_secs(5);

/// Held for as long as a server uses the directory. The kernel gives it up with the process, however that ends.
#[derive(Debug)]
pub struct StateLock {
    dir: PathBuf,
    /// Open with `O_CLOEXEC` (std's default), so that a VMM that outlives the server does not hold the lock on.
    _file: File,
}

impl StateLock {
    /// Makes the directory where it is missing (0700, parents too) and locks `STATE/lock`, a file that says the holder's pid.
    ///
    /// # Errors
    /// `FailedPrecondition`: another server holds it (its pid is named); `PermissionDenied`, `Exhausted`: not writable, full.
    pub fn acquire(dir: &Path) -> Result<Self> {
        DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(|error| not_writable(dir, error))?;
        let path = dir.join("lock");
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(|error| not_writable(dir, error))?;
        lock(dir, &path, &mut file)?;
        say_pid(&mut file).map_err(|error| not_writable(dir, error))?;
        Ok(Self { dir: dir.to_owned(), _file: file })
    }

    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }
}

/// Where the holder is dead and the lock still held, it is waited for: a child that the dead server had just forked holds its
/// descriptors until it executes a program.
fn lock(dir: &Path, path: &Path, file: &mut File) -> Result<()> {
    let begun = Instant::now();
    loop {
        match rustix::fs::flock(&*file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(()),
            Err(Errno::WOULDBLOCK) => {}
            Err(errno) => return Err(Error::io(format!("locking {}", path.display()), errno.into())),
        }
        let holder = holder(file);
        if holder.is_none_or(lives) || begun.elapsed() > LETTING_GO {
            return Err(in_use(dir, holder));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn lives(pid: Pid) -> bool {
    rustix::process::test_kill_process(pid) != Err(Errno::SRCH)
}

/// The pid that the file says.
fn holder(file: &mut File) -> Option<Pid> {
    let mut text = String::new();
    file.seek(SeekFrom::Start(0)).ok()?;
    file.take(32).read_to_string(&mut text).ok()?;
    Pid::from_raw(text.trim().parse().ok()?)
}

fn say_pid(file: &mut File) -> std::io::Result<()> {
    // Written over the old text and then cut, so that a full disk cannot fail it where a pid was before.
    let text = format!("{:<10}\n", std::process::id());
    file.seek(SeekFrom::Start(0))?;
    file.write_all(text.as_bytes())?;
    file.set_len(u64::try_from(text.len()).unwrap_or(0))
}

fn in_use(dir: &Path, holder: Option<Pid>) -> Error {
    let holder = holder.map_or_else(|| "pid unknown".to_owned(), |pid| format!("pid {pid}"));
    Error::new(
        Kind::FailedPrecondition,
        format!("state directory {}: in use by another server ({holder})", dir.display()),
    )
    .hint("stop that server, or give this one a state directory of its own")
}

fn not_writable(dir: &Path, error: std::io::Error) -> Error {
    let hint = match error.kind() {
        std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => "free some space on its filesystem",
        _ => "the server's user must be able to write it; check its owner, mode and mount options",
    };
    Error::io(format!("state directory {}: not writable", dir.display()), error).hint(hint)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_server_is_told_who_holds_it() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("deep/state");
        let held = StateLock::acquire(&state).unwrap();
        let error = StateLock::acquire(&state).unwrap_err();
        assert_eq!(error.kind(), Kind::FailedPrecondition);
        let text = error.to_string();
        assert!(text.contains(&format!("pid {}", std::process::id())) && text.contains("deep/state"), "{text}");
        drop(held);
        StateLock::acquire(&state).unwrap();
    }

    /// As a child does that was forked, and has not yet executed its program, when its server died.
    #[test]
    fn what_a_dead_server_left_behind_lets_go_soon() {
        let dir = tempfile::tempdir().unwrap();
        let held = StateLock::acquire(dir.path()).unwrap();
        // Above the most that Linux gives out, 4194304 (proc_sys_kernel(5), pid_max).
        let mut said = OpenOptions::new().write(true).truncate(true).open(dir.path().join("lock")).unwrap();
        said.write_all(b"4194305\n").unwrap();
        let child = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(200));
            drop(held);
        });
        StateLock::acquire(dir.path()).unwrap();
        child.join().unwrap();
    }

    #[test]
    fn only_the_owner_may_look_in() {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("state");
        let _held = StateLock::acquire(&state).unwrap();
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&state), 0o700);
        assert_eq!(mode(&state.join("lock")), 0o600);
    }

    #[test]
    fn a_file_in_its_place_is_said() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        File::create(&path).unwrap();
        let error = StateLock::acquire(&path.join("state")).unwrap_err();
        assert!(error.to_string().contains("not writable") && error.next_step().is_some(), "{}", error.chain());
    }
}
