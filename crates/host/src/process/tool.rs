//! Short-lived helper programs: `nft`, `mke2fs` and their like.

use std::collections::VecDeque;
use std::ffi::OsStr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::time::Duration;

use clawpot_types::{Error, Kind, Result};
use rustix::io::Errno;
use rustix::pipe::PipeFlags;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::{Child, Exit, Output, Spawn};

/// A program to run to its end. Its environment is a fixed `PATH` and `LC_ALL=C`.
#[derive(Debug)]
pub struct Tool {
    spawn: Spawn,
    name: String,
    input: Vec<u8>,
    timeout: Duration,
    output: Keep,
}

/// How much is kept of what it writes to each stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Keep {
    /// So many bytes; more is an error.
    All(usize),
    /// So many of its beginning, and as many of its end.
    Ends(usize),
}

/// What a tool said, and how it ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finished {
    pub exit: Exit,
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
}

impl Tool {
    /// `program`: absolute, see [`super::find_program`]. 30 s and 4 MiB of output on each stream unless told otherwise.
    pub fn new(program: impl Into<PathBuf>) -> Self {
        let program = program.into();
        let name = program.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let spawn = Spawn::new(program).env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
        Self {
            spawn: spawn.env("LC_ALL", "C"),
            name,
            input: Vec::new(),
            timeout: Duration::from_secs(30),
            output: Keep::All(4 << 20),
        }
    }

    #[must_use]
    pub fn args<I: IntoIterator<Item = S>, S: AsRef<OsStr>>(mut self, args: I) -> Self {
        self.spawn = self.spawn.args(args);
        self
    }

    /// Changes what is not the tool's own business: user, directory, namespace, variables.
    #[must_use]
    pub fn with(mut self, change: impl FnOnce(Spawn) -> Spawn) -> Self {
        self.spawn = change(self.spawn);
        self
    }

    #[must_use]
    pub fn input(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.input = bytes.into();
        self
    }

    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Bytes kept of each stream; more is an error.
    #[must_use]
    pub fn output_limit(mut self, bytes: usize) -> Self {
        self.output = Keep::All(bytes);
        self
    }

    /// It may write as much as it likes. Kept of each stream are so many bytes of its beginning and as many of its end; where some are
    /// missing between the two, a line `[…]` stands for them.
    #[must_use]
    pub fn keep_ends(mut self, bytes: usize) -> Self {
        self.output = Keep::Ends(bytes);
        self
    }

    /// Runs it to its end, whatever that is. Dropping the future, a timeout and too much output kill the tool.
    pub async fn finish(self) -> Result<Finished> {
        let what = format!("running {}", self.name);
        let pipe = || rustix::pipe::pipe_with(PipeFlags::CLOEXEC).map_err(|errno| crate::failed(what.clone(), errno));
        let ((stdin_read, stdin_write), (stdout_read, stdout_write), (stderr_read, stderr_write)) =
            (pipe()?, pipe()?, pipe()?);
        let spawn = self.spawn.stdin(stdin_read).stdout(Output::To(stdout_write)).stderr(Output::To(stderr_write));
        let spawned = tokio::task::spawn_blocking(move || spawn.spawn()).await;
        let child = KilledOnDrop(spawned.map_err(|error| Error::new(Kind::Internal, what.clone()).because(error))??);
        let work = async {
            let (written, stdout, stderr) = tokio::join!(
                feed(stdin_write, &self.input),
                collect(stdout_read, self.output),
                collect(stderr_read, self.output),
            );
            let (stdout, stderr) = (stdout?, stderr?);
            written?;
            let exit = child.0.wait().await?;
            Ok(Finished { exit, stdout, stderr })
        };
        match tokio::time::timeout(self.timeout, work).await {
            Ok(result) => result.map_err(|error: Error| error.context(what)),
            Err(_) => {
                Err(Error::new(Kind::Timeout, format!("{what}: not done after {} s", self.timeout.as_secs_f32())))
            }
        }
    }

    /// Its output, when it ended with status 0; else an error with the first lines of what it wrote to stderr.
    pub async fn run(self) -> Result<Vec<u8>> {
        let name = self.name.clone();
        let finished = self.finish().await?;
        if finished.exit.is_success() {
            return Ok(finished.stdout);
        }
        let said = String::from_utf8_lossy(&finished.stderr);
        let said: Vec<_> = said.lines().filter(|line| !line.trim().is_empty()).take(5).collect();
        let said: String = said.join("; ").chars().take(1000).collect();
        Err(Error::new(Kind::Internal, format!("running {name}: {}: {said}", finished.exit)))
    }
}

struct KilledOnDrop(Child);

impl Drop for KilledOnDrop {
    fn drop(&mut self) {
        if let Err(error) = self.0.kill_session() {
            tracing::warn!(pid = self.0.pid(), error = error.chain(), "a tool could not be killed");
        }
    }
}

fn watch(fd: OwnedFd, interest: Interest) -> Result<AsyncFd<OwnedFd>> {
    let failed = |error| Error::io("reading a tool's output", error);
    rustix::io::ioctl_fionbio(&fd, true).map_err(|errno| failed(errno.into()))?;
    crate::watch(fd, interest).map_err(failed)
}

/// Writes all, unless the tool closes its input first: that is its right.
async fn feed(fd: OwnedFd, mut input: &[u8]) -> Result<()> {
    let failed = |error| Error::io("writing its input", error);
    let pipe = watch(fd, Interest::WRITABLE)?;
    while !input.is_empty() {
        let mut guard = pipe.writable().await.map_err(failed)?;
        match guard.try_io(|pipe| Ok(rustix::io::write(pipe.as_fd(), input)?)) {
            Ok(Ok(written)) => input = &input[written..],
            Ok(Err(error)) if error.kind() == std::io::ErrorKind::BrokenPipe => return Ok(()),
            Ok(Err(error)) => return Err(failed(error)),
            Err(_would_block) => {}
        }
    }
    Ok(())
}

async fn collect(fd: OwnedFd, keep: Keep) -> Result<Vec<u8>> {
    let failed = |error| Error::io("reading its output", error);
    let pipe = watch(fd, Interest::READABLE)?;
    let (mut bytes, mut end, mut cut) = (Vec::new(), VecDeque::<u8>::new(), false);
    let mut chunk = vec![0; 16 << 10];
    loop {
        let mut guard = pipe.readable().await.map_err(failed)?;
        let read = match guard.try_io(|pipe| rustix::io::read(pipe.as_fd(), &mut chunk[..]).map_err(Errno::into)) {
            Ok(Ok(0)) => break,
            Ok(Ok(read)) => &chunk[..read],
            Ok(Err(error)) => return Err(failed(error)),
            Err(_would_block) => continue,
        };
        let (Keep::All(limit) | Keep::Ends(limit)) = keep;
        let (fits, more) = read.split_at(read.len().min(limit - bytes.len()));
        bytes.extend_from_slice(fits);
        if keep == Keep::All(limit) && !more.is_empty() {
            return Err(Error::new(Kind::Exhausted, format!("its output is over {limit} bytes")));
        }
        end.extend(more);
        cut |= end.len() > limit;
        end.drain(..end.len().saturating_sub(limit));
    }
    if cut {
        bytes.extend_from_slice("\n[…]\n".as_bytes());
    }
    bytes.extend(end);
    Ok(bytes)
}
