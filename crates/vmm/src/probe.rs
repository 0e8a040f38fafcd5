//! `--vmm auto`: which VMM this host can run, and why. The existence of `/dev/kvm` proves nothing: Firecracker is taken when
//! a probe VM has run guest code under it on this host. Booting one takes seconds where it fails, so the verdict is kept
//! until host boot, Firecracker or kernel is another.
//!
//! - [`decide`] the pure part · [`choose`] with the probe and the file that keeps its verdict

use std::path::Path;

use clawpot_core::VmmKind;
use clawpot_types::{Digest, Error, Kind, Result};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::firecracker::Probed;

/// What the operator wants.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Wanted {
    #[default]
    Auto,
    Only(VmmKind),
}

impl std::str::FromStr for Wanted {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "auto" => Ok(Self::Auto),
            "firecracker" => Ok(Self::Only(VmmKind::Firecracker)),
            "qemu" => Ok(Self::Only(VmmKind::Qemu)),
            _ => Err(Error::new(Kind::InvalidArgument, format!("VMM {text:?}: must be auto, firecracker or qemu"))),
        }
    }
}

/// The VMM that new VMs get, and the reason, as a sentence for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chosen {
    pub kind: VmmKind,
    pub why: String,
}

/// What was found on the host. An error is why the thing cannot be used, as one line.
#[derive(Clone, Debug)]
pub struct Host {
    /// Whether `/dev/kvm` opens.
    pub kvm: Result<(), String>,
    /// Version and the program's digest.
    pub firecracker: Result<(String, Digest), String>,
    /// Version.
    pub qemu: Result<String, String>,
    /// The kernel that VMs boot.
    pub kernel: Result<Digest, String>,
    pub boot_id: String,
}

impl Host {
    /// Opens `/dev/kvm`, as the VMM will.
    pub fn kvm() -> Result<(), String> {
        match std::fs::File::options().read(true).write(true).open("/dev/kvm") {
            Ok(_) => Ok(()),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Err("this host has no /dev/kvm".to_owned()),
            Err(error) => Err(format!("/dev/kvm does not open: {error}")),
        }
    }

    /// What a verdict holds for; `None`: there is nothing to probe.
    fn subject(&self) -> Option<Subject> {
        let (Ok((_, vmm)), Ok(kernel)) = (&self.firecracker, &self.kernel) else { return None };
        Some(Subject { boot_id: self.boot_id.clone(), vmm: vmm.clone(), kernel: kernel.clone() })
    }
}

/// SHA-256 of a program, for [`Host::firecracker`]. Blocks: it reads the file.
pub fn digest_of(program: &Path) -> Result<Digest> {
    use std::io::Read;
    let failed = |error| Error::io(format!("reading {}", program.display()), error);
    let mut file = std::fs::File::open(program).map_err(failed)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 64 << 10];
    loop {
        match file.read(&mut buffer).map_err(failed)? {
            0 => return Ok(Digest::from_sha256(&hash.finalize().into())),
            read => hash.update(&buffer[..read]),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Subject {
    boot_id: String,
    vmm: Digest,
    kernel: Digest,
}

/// What a probe VM showed, `STATE/vmm-probe.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    version: u32,
    #[serde(flatten)]
    subject: Subject,
    pub ran: bool,
    /// As a sentence.
    pub told: String,
}

const VERDICT_VERSION: u32 = 1;
const VERDICT_FILE: &str = "vmm-probe.json";

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    Chosen(Chosen),
    /// A probe VM has to tell.
    Probe,
}

/// From what was found, and an earlier verdict, to the VMM. An operator who names one is obeyed without a probe.
/// `FailedPrecondition`: there is none; the error says why not either.
pub fn decide(wanted: Wanted, host: &Host, verdict: Option<&Verdict>) -> Result<Decision> {
    let firecracker = match (&host.kvm, &host.firecracker) {
        (Err(why), _) => Err(why.clone()),
        (_, Err(why)) => Err(format!("no usable Firecracker: {why}")),
        (Ok(()), Ok((version, _))) => Ok(version),
    };
    match (wanted, firecracker, &host.qemu) {
        (Wanted::Auto, Ok(version), _) => automatic(version, host, verdict),
        (Wanted::Auto, Err(against), _) => instead(&against, host),
        (Wanted::Only(VmmKind::Firecracker), Ok(version), _) => {
            chosen(VmmKind::Firecracker, format!("Firecracker {version}: as configured"))
        }
        (Wanted::Only(VmmKind::Qemu), _, Ok(version)) => {
            chosen(VmmKind::Qemu, format!("QEMU {version}: as configured"))
        }
        (Wanted::Only(VmmKind::Firecracker), Err(why), _) => {
            Err(unusable(format!("starting VMs in Firecracker: {why}"))
                .hint("run VMs in QEMU: --vmm auto or --vmm qemu"))
        }
        (Wanted::Only(VmmKind::Qemu), _, Err(why)) => Err(unusable(format!("starting VMs in QEMU: {why}"))),
    }
}

/// There is a Firecracker: what a probe VM showed decides.
fn automatic(version: &str, host: &Host, verdict: Option<&Verdict>) -> Result<Decision> {
    let Some(subject) = host.subject() else {
        let why = host.kernel.as_ref().err().map_or("", String::as_str);
        return instead(&format!("Firecracker {version}: no kernel to probe it with: {why}"), host);
    };
    match verdict.filter(|verdict| verdict.subject == subject) {
        None => Ok(Decision::Probe),
        Some(Verdict { ran: true, told, .. }) => chosen(VmmKind::Firecracker, format!("Firecracker {version}: {told}")),
        Some(Verdict { told, .. }) => instead(&format!("Firecracker {version}: {told}"), host),
    }
}

fn instead(against: &str, host: &Host) -> Result<Decision> {
    match &host.qemu {
        Ok(version) => chosen(VmmKind::Qemu, format!("QEMU {version}: {against}")),
        Err(why) => Err(unusable(format!("looking for a VMM: {against}; no usable QEMU: {why}"))),
    }
}

fn chosen(kind: VmmKind, why: String) -> Result<Decision> {
    Ok(Decision::Chosen(Chosen { kind, why }))
}

fn unusable(what: String) -> Error {
    Error::new(Kind::FailedPrecondition, what)
        .hint("install QEMU: apt-get install --no-install-recommends qemu-system-x86; `clawpot doctor` tells the rest")
}

/// [`decide`], booting a probe VM (`boot`, polled only then) where only that can tell. A verdict is kept in `state`. A probe that
/// Firecracker refused is none, nor is an error of `boot`: it counts this time, and is tried again at the next start.
pub async fn choose(
    wanted: Wanted,
    host: &Host,
    state: &Path,
    boot: impl Future<Output = Result<Probed>>,
) -> Result<Chosen> {
    let kept = read_verdict(state);
    if let Decision::Chosen(chosen) = decide(wanted, host, kept.as_ref())? {
        return Ok(chosen);
    }
    let no_subject = || Error::new(Kind::Internal, "probing Firecracker: there is nothing to probe");
    let subject = host.subject().ok_or_else(no_subject)?;
    tracing::info!("booting a probe VM under Firecracker");
    let (ran, told, keep) = match boot.await {
        Ok(probed) => {
            let keep = !matches!(probed, Probed::Refused(_));
            (matches!(probed, Probed::GuestRan(_)), probed.to_string(), keep)
        }
        Err(error) => (false, format!("the probe failed: {}", error.chain()), false),
    };
    let verdict = Verdict { version: VERDICT_VERSION, subject, ran, told };
    if keep {
        write_verdict(state, &verdict)?;
    }
    match decide(wanted, host, Some(&verdict))? {
        Decision::Chosen(chosen) => Ok(chosen),
        Decision::Probe => Err(no_subject()),
    }
}

/// What cannot be read is asked again.
fn read_verdict(state: &Path) -> Option<Verdict> {
    let text = std::fs::read(state.join(VERDICT_FILE)).ok()?;
    serde_json::from_slice::<Verdict>(&text).ok().filter(|verdict| verdict.version == VERDICT_VERSION)
}

fn write_verdict(state: &Path, verdict: &Verdict) -> Result<()> {
    let text = serde_json::to_vec_pretty(verdict)
        .map_err(|error| Error::new(Kind::Internal, "writing the probe's verdict").because(error))?;
    clawpot_host::fs::replace(&state.join(VERDICT_FILE), &text, 0o600)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn host() -> Host {
        Host {
            kvm: Ok(()),
            firecracker: Ok(("1.15.1".to_owned(), Digest::from_sha256(&[1; 32]))),
            qemu: Ok("7.2.22".to_owned()),
            kernel: Ok(Digest::from_sha256(&[2; 32])),
            boot_id: "boot".to_owned(),
        }
    }

    async fn never() -> Result<Probed> {
        panic!("a probe VM was booted")
    }

    async fn ran() -> Result<Probed> {
        Ok(Probed::GuestRan(Duration::from_millis(80)))
    }

    async fn silent() -> Result<Probed> {
        Ok(Probed::Silent("nothing within 5 s".to_owned()))
    }

    fn said(result: Result<Chosen>) -> String {
        match result {
            Ok(chosen) => format!("{}: {}", chosen.kind, chosen.why),
            Err(error) => format!("error: {}", error.chain()),
        }
    }

    #[tokio::test]
    async fn every_answer_says_why() {
        let only = Wanted::Only;
        let no = |why: &str| why.to_owned();
        let no_kvm = Host { kvm: Err(no("this host has no /dev/kvm")), ..host() };
        let no_fc = Host { firecracker: Err(no("it is not installed")), ..host() };
        let no_kernel = Host { kernel: Err(no("there are no assets")), ..host() };
        let no_qemu = Host { qemu: Err(no("it is not installed")), ..host() };
        let nothing = Host { kvm: no_kvm.kvm.clone(), qemu: no_qemu.qemu.clone(), ..host() };
        let mut lines = Vec::new();
        for (name, host) in [
            ("all", host()),
            ("no kvm", no_kvm),
            ("no firecracker", no_fc),
            ("no kernel", no_kernel),
            ("no qemu", no_qemu),
            ("nothing", nothing),
        ] {
            for wanted in [Wanted::Auto, only(VmmKind::Firecracker), only(VmmKind::Qemu)] {
                for works in [true, false] {
                    let dir = tempfile::tempdir().unwrap();
                    let answer = match works {
                        true => choose(wanted, &host, dir.path(), ran()).await,
                        false => choose(wanted, &host, dir.path(), silent()).await,
                    };
                    lines.push(format!("{name}, {wanted:?}, guest runs {works} → {}", said(answer)));
                }
            }
        }
        insta::assert_snapshot!(lines.join("\n"));
    }

    #[tokio::test]
    async fn a_verdict_holds_until_something_is_another() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path();
        let kind = |chosen: Result<Chosen>| chosen.unwrap().kind;
        assert_eq!(kind(choose(Wanted::Auto, &host(), state, ran()).await), VmmKind::Firecracker);
        assert_eq!(kind(choose(Wanted::Auto, &host(), state, never()).await), VmmKind::Firecracker);

        let other_boot = Host { boot_id: "another".to_owned(), ..host() };
        assert_eq!(kind(choose(Wanted::Auto, &other_boot, state, silent()).await), VmmKind::Qemu);
        assert_eq!(kind(choose(Wanted::Auto, &other_boot, state, never()).await), VmmKind::Qemu);
        let other_vmm = Host { firecracker: Ok(("1.16.1".to_owned(), Digest::from_sha256(&[3; 32]))), ..host() };
        assert_eq!(kind(choose(Wanted::Auto, &other_vmm, state, ran()).await), VmmKind::Firecracker);
        let other_kernel = Host { kernel: Ok(Digest::from_sha256(&[4; 32])), ..host() };
        assert_eq!(kind(choose(Wanted::Auto, &other_kernel, state, ran()).await), VmmKind::Firecracker);

        // A file that was cut off is asked again, and a probe that could not be made or was refused is not a verdict.
        clawpot_host::fs::replace(&state.join(VERDICT_FILE), b"{", 0o600).unwrap();
        let failed = async { Err(Error::new(Kind::Exhausted, "no memory")) };
        let chosen = choose(Wanted::Auto, &host(), state, failed).await.unwrap();
        assert_eq!(chosen.why, "QEMU 7.2.22: Firecracker 1.15.1: the probe failed: no memory");
        let refused = async { Ok(Probed::Refused("no memory".to_owned())) };
        assert_eq!(kind(choose(Wanted::Auto, &host(), state, refused).await), VmmKind::Qemu);
        assert_eq!(kind(choose(Wanted::Auto, &host(), state, ran()).await), VmmKind::Firecracker);
    }

    #[test]
    fn digests_are_of_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("empty");
        std::fs::File::create(&path).unwrap();
        let empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert_eq!(digest_of(&path).unwrap().hex(), empty);
    }
}
