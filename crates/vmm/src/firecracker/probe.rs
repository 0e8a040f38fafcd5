//! Whether this host can run a guest, found out by running one.
//!
//! `/dev/kvm` proves nothing, nor does a virtual machine that Firecracker says is running: there are hosts (`kvm_pvm`) that run a
//! few hand-written instructions but never let an unmodified kernel print a byte. So the very kernel that machines boot
//! is started, without disk or network, and what counts is the first line it prints.

use std::fmt;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clawpot_core::ports::Seat;
use clawpot_host::cgroup::{Cgroup, Cgroups, Limits};
use clawpot_host::fs::{ensure_dir, hard_link, remove_tree_if_exists};
use clawpot_host::process::Output;
use clawpot_types::{Error, InstanceId, Kind, MiB, Result, Slot, Vcpus};
use rustix::io::Errno;
use rustix::pipe::PipeFlags;
use tokio::io::Interest;
use tokio::time::Instant;

use super::api::Boot;
use super::boot::{self, Site};
use super::driver::jailer_with;
use super::jailer::{self, Inmate};
use super::libs::{PROGRAM, Toolbox};
use crate::jail::{INITRAMFS, KERNEL};

/// From the start to the kernel's first line: 0.9–1.6 s were measured on an emulated AMD CPU, the slowest host there is, and
/// 3.5 s on it under load. Too short a time would keep a good host from Firecracker until it boots anew; where no guest runs,
/// the first start after a boot waits for all of it.
pub const LIMIT: Duration = Duration::from_secs(8);
/// What the kernel says first.
const FIRST_WORDS: &[u8] = b"Linux version";
/// As much as is kept of what was said, bytes.
const KEPT: usize = 64 << 10;
const MEMORY: MiB = MiB(256);
/// One below the first slot's: nobody's.
const UID: u32 = 1_899_999_999;
/// Name of the probe's directory and cgroup; no machine's.
const NAME: &str = "probe";
/// Speaks from its first moments on.
const BOOT_ARGS: &str = "console=ttyS0 earlyprintk=ttyS0,115200 reboot=k panic=-1 pci=off";

/// What became of the probe VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Probed {
    /// Its kernel spoke after so long.
    GuestRan(Duration),
    /// Firecracker runs it, but no guest code ran: this host cannot do it until it boots anew.
    Silent(String),
    /// It did not come to running it, in Firecracker's words. What is wrong may be mended: not to be remembered.
    Refused(String),
}

impl fmt::Display for Probed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::GuestRan(after) => write!(f, "a probe VM's kernel ran after {} ms", after.as_millis()),
            Self::Silent(why) => write!(f, "a probe VM ran no guest code: {why}"),
            Self::Refused(why) => write!(f, "a probe VM could not be started: {why}"),
        }
    }
}

/// What is booted, and how long it may take until it speaks.
#[derive(Clone, Copy, Debug)]
pub struct Subject<'a> {
    pub kernel: &'a Path,
    pub initramfs: &'a Path,
    pub limit: Duration,
}

/// Leaves nothing behind. An error is a probe that could not be made.
pub async fn run(toolbox: &Toolbox, state: &Path, instance: &InstanceId, subject: &Subject<'_>) -> Result<Probed> {
    let place = Place {
        dir: state.join("jail").join(PROGRAM).join(NAME),
        base: state.join("jail"),
        cgroup: Cgroups::find()?.group(&format!("clawpot/{instance}/{NAME}"))?,
    };
    // An earlier one may have been interrupted.
    place.clear().await?;
    let probed = place.probe(toolbox, subject).await;
    let cleared = place.clear().await;
    match (probed, cleared) {
        (Ok(probed), Ok(())) => Ok(probed),
        (Ok(_), Err(cleanup)) => Err(cleanup),
        (Err(error), Ok(())) => Err(error),
        (Err(error), Err(cleanup)) => Err(error.and_cleanup(cleanup)),
    }
    .map_err(|error| error.context("probing whether Firecracker runs guests here"))
}

struct Place {
    dir: PathBuf,
    base: PathBuf,
    cgroup: Cgroup,
}

impl Place {
    async fn probe(&self, toolbox: &Toolbox, subject: &Subject<'_>) -> Result<Probed> {
        self.furnish(toolbox, subject)?;
        self.cgroup.create(&Limits::default())?;
        let (console, output) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)
            .map_err(|errno| Error::io("making a pipe", errno.into()))?;
        let errors = output.try_clone().map_err(|error| Error::io("making a pipe", error))?;
        let mut console = Console::new(console)?;
        let start = Instant::now();
        let args =
            jailer::arguments(toolbox, &self.base, NAME, &Inmate { uid: UID, gid: UID, netns: None, fsize: None });
        let spawn = jailer_with(toolbox, args).stdout(Output::To(output)).stderr(Output::To(errors));
        let child = spawn.cgroup(&self.cgroup)?.spawn()?;
        let site = Site { id: NAME, dir: &self.dir, cgroup: &self.cgroup };
        let booted = boot::boot(&site, &seat()).await;
        let heard = match &booted {
            Ok(()) => console.hear(FIRST_WORDS, start + subject.limit).await?,
            // Its last words say why.
            Err(_) => console.hear(FIRST_WORDS, Instant::now() + Duration::from_millis(100)).await?,
        };
        let after = start.elapsed();
        self.cgroup.kill()?;
        child.wait().await?;
        match (heard, booted) {
            (true, _) => Ok(Probed::GuestRan(after)),
            (false, Err(error)) => Ok(Probed::Refused(with_words(error.chain(), &console.last_words()))),
            (false, Ok(())) => {
                let silent = format!(
                    "Firecracker says it runs, but its kernel did not speak within {} s",
                    subject.limit.as_secs()
                );
                Ok(Probed::Silent(with_words(silent, &console.last_words())))
            }
        }
    }

    fn furnish(&self, toolbox: &Toolbox, subject: &Subject<'_>) -> Result<()> {
        for dir in [self.base.as_path(), &self.base.join(PROGRAM), &self.dir, &self.root()] {
            ensure_dir(dir, 0o700)?;
        }
        hard_link(subject.kernel, &self.root().join(KERNEL))?;
        hard_link(subject.initramfs, &self.root().join(INITRAMFS))?;
        toolbox.furnish(&self.root())?;
        let boot = Boot {
            vcpus: Vcpus::try_from(1)?,
            memory: MEMORY,
            boot_args: BOOT_ARGS.to_owned(),
            devices: false,
            read_only: Vec::new(),
        };
        boot::write(&self.dir, &boot)
    }

    fn root(&self) -> PathBuf {
        self.dir.join("root")
    }

    async fn clear(&self) -> Result<()> {
        self.cgroup.kill()?;
        self.cgroup.empty().await?;
        remove_tree_if_exists(&self.dir)?;
        self.cgroup.remove().await
    }
}

/// Only its uid and gid are looked at: there is no network.
fn seat() -> Seat {
    Seat { slot: Slot(0), uid: UID, gid: UID, netns: PathBuf::new(), address: [0, 0, 0, 0].into() }
}

fn with_words(why: String, words: &str) -> String {
    if words.is_empty() { why } else { format!("{why}; its last words: {words}") }
}

/// What the VMM and its guest print.
struct Console {
    pipe: tokio::io::unix::AsyncFd<OwnedFd>,
    said: Vec<u8>,
}

impl Console {
    fn new(pipe: OwnedFd) -> Result<Self> {
        let pipe = clawpot_host::watch(pipe, Interest::READABLE)
            .map_err(|error| Error::io("watching the probe's console", error))?;
        Ok(Self { pipe, said: Vec::new() })
    }

    /// Whether `words` are said until then. `false` at once when nobody is left to say them.
    async fn hear(&mut self, words: &[u8], deadline: Instant) -> Result<bool> {
        let mut chunk = vec![0; 16 << 10];
        loop {
            if self.said.windows(words.len()).any(|window| window == words) {
                return Ok(true);
            }
            let failed = |error| Error::io("reading the probe's console", error);
            let Ok(ready) = tokio::time::timeout_at(deadline, self.pipe.readable()).await else { return Ok(false) };
            let mut ready = ready.map_err(failed)?;
            match ready.try_io(|pipe| rustix::io::read(pipe, &mut chunk[..]).map_err(Errno::into)) {
                Ok(Ok(0)) => return Ok(false),
                Ok(Ok(read)) if self.said.len() + read > KEPT => {
                    return Err(Error::new(
                        Kind::Exhausted,
                        format!("the probe said over {KEPT} bytes, but not who it is"),
                    ));
                }
                Ok(Ok(read)) => self.said.extend_from_slice(&chunk[..read]),
                Ok(Err(error)) => return Err(failed(error)),
                Err(_would_block) => {}
            }
        }
    }

    fn last_words(&self) -> String {
        let text = String::from_utf8_lossy(&self.said);
        let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
        let last = lines[lines.len().saturating_sub(3)..].join("; ");
        last.chars().filter(|c| !c.is_control()).take(500).collect()
    }
}
