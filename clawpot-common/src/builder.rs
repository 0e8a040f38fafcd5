//! The builder's protocol, host ↔ a guest made from the builder image: one JSON value a line, many requests per connection.
//!
//! Wire-compatible with `mvm-guest` 0.3: `"Ping"`, `{"Build":{"flake_ref":…,"attr":…,"timeout_secs":…}}` one way, `"Pong"`,
//! `{"Log":{"line":…}}`, `{"Ok":{"out_path":…}}`, `{"Err":{"message":…}}` the other. A line that is none of these is
//! answered with `Err`. While a build runs, other requests are answered between its logs; `Ok` or the last `Err` ends it.

use std::fmt::{self, Display};

use serde::{Deserialize, Serialize};

/// Port of the builder: vsock, or TCP on the management NIC under QEMU.
pub const PORT: u32 = 21_470;

/// Longest line either way without its newline, bytes. A longer one is answered with `Err` and skipped.
pub const MAX_LINE: usize = 64 << 10;
/// Longest line of a build's output in one [`Response::Log`], bytes before JSON; a longer one comes in pieces.
pub const MAX_LOG_LINE: usize = 4 << 10;

/// Longest `flake_ref` and `attr`, bytes.
pub const MAX_FLAKE_REF: usize = 4096;
pub const MAX_ATTR: usize = 1024;

/// Seconds that a build may take when the request does not say, and the most that it can say.
pub const DEFAULT_TIMEOUT_SECS: u64 = 1800;
pub const MAX_TIMEOUT_SECS: u64 = 86_400;

/// Where the host's two disks are in the guest. The second is mounted when [`INPUT`] is the `flake_ref`.
pub const OUTPUT: &str = "/build-out";
pub const INPUT: &str = "/build-in";

/// What is built of nixpkgs, signed by a key that nix knows from its own build.
pub const CACHE: &str = "https://cache.nixos.org";

/// Names of what a build leaves on the output disk.
pub const KERNEL_FILE: &str = "vmlinux";
pub const ROOTFS_FILE: &str = "rootfs.ext4";
pub const BASE_FILE: &str = "fc-base.json";
pub const LOG_FILE: &str = "build.log";

/// Host to guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    Build {
        /// [`INPUT`], or whatever nix takes before the `#`.
        flake_ref: String,
        /// What it takes behind the `#`; empty: its default.
        attr: String,
        timeout_secs: Option<u64>,
        /// The builder reaches the world: nix asks [`CACHE`] too, before it builds what nobody has built here. Ours alone; left out
        /// where it is not so, which is what `mvm-guest` always says.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        substitute: bool,
    },
    Ping,
}

/// Guest to host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Response {
    Ok {
        /// `/nix/store/…`
        out_path: String,
    },
    Err {
        message: String,
    },
    /// A line of the build's output.
    Log {
        line: String,
    },
    Pong,
}

/// [`BASE_FILE`]: the machine that the result is made for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Base {
    pub vcpu_count: u32,
    pub mem_size_mib: u32,
    /// The kernel's command line; what the host needs comes beside it.
    pub boot_args: String,
    pub kernel: BaseFile,
    pub rootfs: BaseFile,
}

/// A file beside [`BASE_FILE`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BaseFile {
    pub file: String,
    /// `sha256:` and 64 hexadecimal digits.
    pub digest: String,
    /// Bytes.
    pub size: u64,
}

impl Request {
    /// Checks what can be checked without nix: lengths, and that nothing in it could be taken for something else.
    pub fn check(&self) -> Result<(), Refused> {
        let Self::Build { flake_ref, attr, timeout_secs, .. } = self else { return Ok(()) };
        check_text("flake_ref", flake_ref, MAX_FLAKE_REF)?;
        check_text("attr", attr, MAX_ATTR)?;
        if flake_ref.is_empty() {
            return Err(Refused("flake_ref: is empty".to_owned()));
        }
        if flake_ref.contains('#') {
            return Err(Refused("flake_ref: contains #; what follows it belongs in attr".to_owned()));
        }
        if !(1..=MAX_TIMEOUT_SECS).contains(&timeout_secs.unwrap_or(DEFAULT_TIMEOUT_SECS)) {
            return Err(Refused(format!("timeout_secs: must be 1 to {MAX_TIMEOUT_SECS}, or null")));
        }
        Ok(())
    }
}

/// Why a request is not one that a builder takes; begins with the field.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused(String);

impl Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Refused {}

fn check_text(field: &str, text: &str, most: usize) -> Result<(), Refused> {
    if text.len() > most {
        return Err(Refused(format!("{field}: is {} bytes long, more than {most}", text.len())));
    }
    if text.starts_with('-') {
        return Err(Refused(format!("{field}: begins with -, as an option does")));
    }
    if text.chars().any(char::is_control) {
        return Err(Refused(format!("{field}: contains a control character")));
    }
    Ok(())
}

/// One value as a line. What is in these types always can be written.
pub fn encode(value: &impl Serialize) -> serde_json::Result<Vec<u8>> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    Ok(line)
}

/// A line as a value; the error says where it is not one.
pub fn decode<T: serde::de::DeserializeOwned>(line: &[u8]) -> serde_json::Result<T> {
    serde_json::from_slice(line)
}

/// What [`Lines`] gives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Line {
    /// Without newline, and never empty: blank lines are skipped.
    Whole(Vec<u8>),
    /// It was longer than [`MAX_LINE`]; nothing of it was kept.
    TooLong,
}

/// Cuts bytes, which come in pieces of any size, into lines. Holds at most [`MAX_LINE`] bytes of a line that is not whole.
#[derive(Debug, Default)]
pub struct Lines {
    part: Vec<u8>,
    /// The rest of a line that is too long.
    skipping: bool,
}

impl Lines {
    /// Takes bytes from `input`, up to the end of the next line; the rest of `input` is for the next call.
    /// `None`: `input` is used up.
    pub fn next(&mut self, input: &mut &[u8]) -> Option<Line> {
        loop {
            let end = input.iter().position(|byte| *byte == b'\n');
            let (piece, rest) = match end {
                Some(end) => (input.get(..end)?, input.get(end + 1..)?),
                None => (*input, &[][..]),
            };
            *input = rest;
            if self.part.len() + piece.len() > MAX_LINE {
                self.part = Vec::new();
                self.skipping = true;
            } else if !self.skipping {
                self.part.extend_from_slice(piece);
            }
            end?;
            if std::mem::take(&mut self.skipping) {
                return Some(Line::TooLong);
            }
            let line = std::mem::take(&mut self.part);
            if !line.iter().all(u8::is_ascii_whitespace) {
                return Some(Line::Whole(line));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn build(flake_ref: &str, attr: &str, timeout_secs: Option<u64>) -> Request {
        Request::Build { flake_ref: flake_ref.into(), attr: attr.into(), timeout_secs, substitute: false }
    }

    #[test]
    fn the_lines_are_those_of_mvm_guest() {
        for (request, line) in [
            (Request::Ping, r#""Ping""#),
            (
                build("/build-in", "packages.x86_64-linux.worker", Some(9)),
                r#"{"Build":{"flake_ref":"/build-in","attr":"packages.x86_64-linux.worker","timeout_secs":9}}"#,
            ),
            (build(".", "", None), r#"{"Build":{"flake_ref":".","attr":"","timeout_secs":null}}"#),
        ] {
            assert_eq!(encode(&request).unwrap(), format!("{line}\n").into_bytes());
            assert_eq!(decode::<Request>(line.as_bytes()).unwrap(), request);
        }
        // Left out is null.
        let short = br#"{"Build":{"flake_ref":".","attr":""}}"#;
        assert_eq!(decode::<Request>(short).unwrap(), build(".", "", None));
        for (response, line) in [
            (Response::Pong, r#""Pong""#),
            (Response::Ok { out_path: "/nix/store/x".into() }, r#"{"Ok":{"out_path":"/nix/store/x"}}"#),
            (Response::Err { message: "a\nb".into() }, r#"{"Err":{"message":"a\nb"}}"#),
            (Response::Log { line: "l".into() }, r#"{"Log":{"line":"l"}}"#),
        ] {
            assert_eq!(encode(&response).unwrap(), format!("{line}\n").into_bytes());
        }
    }

    #[test]
    fn what_could_mean_something_else_is_refused() {
        for (request, field) in [
            (build("", "a", None), "flake_ref: is empty"),
            (build("--option", "a", None), "flake_ref: begins with -"),
            (build("a", "-x", None), "attr: begins with -"),
            (build("a#b", "c", None), "flake_ref: contains #"),
            (build("a\0b", "c", None), "flake_ref: contains a control"),
            (build("a", "c\n", None), "attr: contains a control"),
            (build(&"x".repeat(MAX_FLAKE_REF + 1), "c", None), "flake_ref: is 4097 bytes"),
            (build("a", &"x".repeat(MAX_ATTR + 1), None), "attr: is 1025 bytes"),
            (build("a", "c", Some(0)), "timeout_secs: "),
            (build("a", "c", Some(MAX_TIMEOUT_SECS + 1)), "timeout_secs: "),
        ] {
            let refused = request.check().unwrap_err().to_string();
            assert!(refused.starts_with(field), "{refused}");
        }
        // That this is no flake is nix's to say.
        for request in [build("; rm -rf /", "$(reboot)", Some(1)), build("/build-in", "", None), Request::Ping] {
            request.check().unwrap();
        }
    }

    /// The same by splitting the whole at once.
    fn expected(input: &[u8]) -> Vec<Line> {
        let mut lines: Vec<&[u8]> = input.split(|byte| *byte == b'\n').collect();
        // Not ended.
        lines.pop();
        lines
            .into_iter()
            .filter(|line| line.len() > MAX_LINE || !line.iter().all(u8::is_ascii_whitespace))
            .map(|line| if line.len() > MAX_LINE { Line::TooLong } else { Line::Whole(line.to_vec()) })
            .collect()
    }

    fn cut(input: &[u8], pieces: &[usize]) -> Vec<Line> {
        let (mut lines, mut found, mut rest) = (Lines::default(), Vec::new(), input);
        let mut sizes = pieces.iter().copied().cycle();
        while !rest.is_empty() {
            let size = sizes.next().unwrap_or(1).clamp(1, rest.len());
            let (mut piece, behind) = rest.split_at(size);
            rest = behind;
            while let Some(line) = lines.next(&mut piece) {
                found.push(line);
            }
            assert!(piece.is_empty() && lines.part.len() <= MAX_LINE);
        }
        found
    }

    fn some_lines() -> impl Strategy<Value = Vec<u8>> {
        let line = prop_oneof![
            4 => proptest::collection::vec(any::<u8>(), 0..40),
            1 => Just(br#""Ping""#.to_vec()),
            1 => (MAX_LINE - 2..MAX_LINE + 3).prop_map(|size| vec![b'x'; size]),
        ];
        proptest::collection::vec(line, 0..6).prop_map(|lines| lines.join(&b'\n'))
    }

    proptest! {
        #[test]
        fn lines_are_the_same_however_they_come(
            input in some_lines(), pieces in proptest::collection::vec(1_usize..70_000, 1..6)
        ) {
            prop_assert_eq!(cut(&input, &pieces), expected(&input));
        }

        #[test]
        fn no_line_of_bytes_makes_the_decoder_panic(line in proptest::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(request) = decode::<Request>(&line) {
                prop_assert_eq!(decode::<Request>(&encode(&request).unwrap()).unwrap(), request);
            }
        }

        #[test]
        fn every_response_fits_a_line_and_comes_back(line in ".{0,400}") {
            let response = Response::Log { line };
            let encoded = encode(&response).unwrap();
            prop_assert_eq!(encoded.iter().filter(|byte| **byte == b'\n').count(), 1);
            prop_assert_eq!(decode::<Response>(&encoded).unwrap(), response);
        }
    }

    #[test]
    fn the_worst_log_line_fits() {
        // A control character takes six bytes in JSON.
        let line = "\u{1}".repeat(MAX_LOG_LINE);
        assert!(encode(&Response::Log { line }).unwrap().len() <= MAX_LINE);
    }
}
