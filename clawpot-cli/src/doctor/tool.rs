//! The only place of this program that runs another: to read its version or its report, never to change anything.

use std::ffi::OsStr;
use std::io::Read as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::mpsc;
use std::time::Duration;

/// Longer than any of these programs takes on a loaded host.
const PATIENCE: Duration = Duration::from_secs(10);
/// More than any of them says; ten thousand firewall rules are 3 MiB.
const MOST: u64 = 32 << 20;

/// Where `name` is: in the PATH, or where system tools are that a user's PATH lacks.
pub fn find(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let system = ["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from);
    std::env::split_paths(&path).chain(system).map(|dir| dir.join(name)).find(|file| is_program(file))
}

pub fn is_program(file: &Path) -> bool {
    std::fs::metadata(file).is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

/// What `program args…` writes to stdout. `Err` with its complaint.
pub fn output_of<S: AsRef<OsStr>>(program: &Path, args: &[S]) -> Result<String, String> {
    #[expect(
        clippy::disallowed_methods,
        reason = "crates/host is the server's; this reads reports and changes nothing"
    )]
    let mut command = std::process::Command::new(program);
    command.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(|error| format!("{}: {error}", program.display()))?;
    let said = read_in_time(&mut child);
    if said.is_none() && child.kill().is_err() {
        // It has just ended by itself.
    }
    let status = child.wait().map_err(|error| format!("{}: {error}", program.display()))?;
    match said {
        None => Err(format!("{}: no answer within {} s", program.display(), PATIENCE.as_secs())),
        Some((out, _)) if status.success() => Ok(out),
        Some((_, complaint)) => Err(complaint.lines().next().unwrap_or("it failed without a word").to_owned()),
    }
}

/// Both of its streams, read side by side so that neither fills up.
fn read_in_time(child: &mut Child) -> Option<(String, String)> {
    let (tx, rx) = mpsc::sync_channel(2);
    let start = |index: usize, from: Option<Box<dyn std::io::Read + Send>>| {
        let tx = tx.clone();
        std::thread::spawn(move || {
            let mut bytes = Vec::new();
            // What could be read before an error is what there is to judge by.
            from.map(|from| from.take(MOST).read_to_end(&mut bytes).unwrap_or_default());
            // Nobody waits for it any more after the time is over.
            tx.send((index, String::from_utf8_lossy(&bytes).into_owned())).unwrap_or_default();
        });
    };
    start(0, child.stdout.take().map(|stream| Box::new(stream) as _));
    start(1, child.stderr.take().map(|stream| Box::new(stream) as _));
    let mut both = [String::new(), String::new()];
    for _ in 0..2 {
        let (index, text) = rx.recv_timeout(PATIENCE).ok()?;
        both[index] = text;
    }
    let [out, err] = both;
    Some((out, err))
}

/// `1.15.1` somewhere in a program's own words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(pub u32, pub u32, pub u32);

impl Version {
    /// The first word that is a version: `QEMU emulator version 7.2.22 (Debian …)`, `Firecracker v1.15.1`.
    pub fn find(text: &str) -> Option<Self> {
        text.split(|c: char| c.is_whitespace() || c == '(').find_map(|word| {
            let mut parts =
                word.trim_start_matches('v').split(|c: char| !c.is_ascii_digit() && c != '.').next()?.split('.');
            let major = parts.next()?.parse().ok()?;
            let minor = parts.next()?.parse().ok()?;
            Some(Self(major, minor, parts.next().and_then(|patch| patch.parse().ok()).unwrap_or(0)))
        })
    }
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}.{}", self.0, self.1, self.2)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_found_in_what_programs_say() {
        for (text, want) in [
            ("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)\nCopyright", Version(7, 2, 22)),
            ("Firecracker v1.15.1\n\nSupported snapshot data format versions: v8.0.0", Version(1, 15, 1)),
            ("Jailer v1.16.0-dev", Version(1, 16, 0)),
            ("nftables v1.0.6 (Lester Gooch #5)", Version(1, 0, 6)),
            ("nftables v1.1 (x)", Version(1, 1, 0)),
        ] {
            assert_eq!(Version::find(text), Some(want), "{text}");
        }
        assert_eq!(Version::find("no version here: 7"), None);
    }

    #[test]
    fn a_program_is_run_and_its_complaint_kept() {
        let shell = find("sh").unwrap();
        assert_eq!(output_of(&shell, &["-c", "echo out"]), Ok("out\n".to_owned()));
        assert_eq!(output_of(&shell, &["-c", "echo no >&2; exit 3"]), Err("no".to_owned()));
        assert!(output_of(Path::new("/nonexistent"), &["x"]).is_err());
        assert_eq!(find("no-such-program-anywhere"), None);
    }
}
