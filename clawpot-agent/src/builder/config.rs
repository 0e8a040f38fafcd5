//! The file that makes an image a builder's.

use std::io::{self, Read};
use std::path::{Path, PathBuf};

use clawpot_common::builder::{INPUT, OUTPUT};
use serde::Deserialize;

/// There in the builder image, and in no other: `{}`.
pub const FILE: &str = "/etc/clawpot/builder.json";

/// Far more than it ever says, bytes.
const MAX_SIZE: u64 = 64 << 10;

/// The host's disks, as the first two behind the image's.
const OUTPUT_DEVICE: &str = "/dev/vdb";
const INPUT_DEVICE: &str = "/dev/vdc";

/// Where a build finds everything.
#[derive(Clone, Debug)]
pub struct Config {
    pub output: Place,
    pub input: Place,
    /// The program, looked for in PATH unless it has a slash.
    pub nix: String,
    /// Directory that results are in.
    pub store: PathBuf,
}

/// A directory, and the disk that the host attaches for it.
#[derive(Clone, Debug)]
pub struct Place {
    pub path: PathBuf,
    /// `None`: the directory is there and stays, as in a test.
    pub device: Option<Device>,
}

#[derive(Clone, Debug)]
pub struct Device {
    pub path: PathBuf,
    /// The machine's own, which this must not be: its device number.
    pub not: u64,
}

/// What may be said: so far nothing but what there is.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Said {
    #[serde(default = "nix")]
    nix: String,
}

fn nix() -> String {
    "nix".to_owned()
}

impl Config {
    /// Of this machine; `None`: it is no builder. `own_disk`: device number of the machine's disk.
    pub fn read(own_disk: u64) -> io::Result<Option<Self>> {
        Ok(read(FILE.as_ref())?.map(|said| {
            let place = |path: &str, device: &str| Place {
                path: path.into(),
                device: Some(Device { path: device.into(), not: own_disk }),
            };
            Self {
                output: place(OUTPUT, OUTPUT_DEVICE),
                input: place(INPUT, INPUT_DEVICE),
                nix: said.nix,
                store: "/nix/store".into(),
            }
        }))
    }
}

fn read(path: &Path) -> io::Result<Option<Said>> {
    let file = match std::fs::File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut text = Vec::new();
    file.take(MAX_SIZE).read_to_end(&mut text)?;
    serde_json::from_slice(&text).map(Some).map_err(io::Error::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[allow(clippy::disallowed_methods, reason = "a test's file")]
    fn a_builder_is_one_by_its_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("builder.json");
        assert!(read(&path).unwrap().is_none());
        std::fs::write(&path, "{}").unwrap();
        assert_eq!(read(&path).unwrap().unwrap().nix, "nix");
        std::fs::write(&path, r#"{"nix": "/opt/nix"}"#).unwrap();
        assert_eq!(read(&path).unwrap().unwrap().nix, "/opt/nix");
        for bad in ["", "[]x", r#"{"nxi": "/opt/nix"}"#] {
            std::fs::write(&path, bad).unwrap();
            assert!(read(&path).is_err(), "{bad:?}");
        }
    }
}
