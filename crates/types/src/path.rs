//! Places inside a guest.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::{Error, Kind, Result};

/// Where a guest mounts a disk: an absolute path, not `/`, without `.` and `..`, of characters that need no quoting on a
/// kernel's command line. Written in one way: no double and no last slash.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct GuestPath(String);

impl GuestPath {
    /// Longest, bytes: [`crate::guest::MAX_EXTRA_DISKS`] of them fit a kernel's command line of 2 KiB.
    pub const MAX: usize = 100;
    /// The kernel's own file systems, over which a disk would make the machine useless.
    const KERNELS: [&str; 3] = ["/proc", "/sys", "/dev"];

    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Its names, top first.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.split('/').skip(1)
    }
}

impl FromStr for GuestPath {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let bad = |why: &str| {
            let shown: String = text.chars().take(GuestPath::MAX).collect();
            Err(Error::new(Kind::InvalidArgument, format!("path {shown:?} in the guest: {why}")))
        };
        let Some(below) = text.strip_prefix('/') else { return bad("must be absolute") };
        if text.len() > Self::MAX {
            return bad(&format!("must be at most {} bytes", Self::MAX));
        }
        if !text.bytes().all(|b| b.is_ascii_alphanumeric() || b"/._-+@".contains(&b)) {
            return bad("must be of [A-Za-z0-9._+@/-]");
        }
        let names: Vec<&str> = below.split('/').filter(|name| !name.is_empty()).collect();
        if names.iter().any(|name| matches!(*name, "." | "..")) {
            return bad("must not have '.' or '..' in it");
        }
        if names.is_empty() {
            return bad("must not be the root, which is the image's");
        }
        let path = format!("/{}", names.join("/"));
        let within = |top: &str| path.strip_prefix(top).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
        if Self::KERNELS.into_iter().any(within) {
            return bad("must not be in /proc, /sys or /dev, which are the guest kernel's");
        }
        Ok(Self(path))
    }
}

impl TryFrom<String> for GuestPath {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl From<GuestPath> for String {
    fn from(path: GuestPath) -> Self {
        path.0
    }
}

impl fmt::Display for GuestPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_written_in_one_way() {
        for (text, want) in
            [("/data", "/data"), ("/data/", "/data"), ("//srv//db-1/", "/srv/db-1"), ("/devel", "/devel")]
        {
            assert_eq!(text.parse::<GuestPath>().unwrap().as_str(), want);
        }
        assert_eq!("/a/b".parse::<GuestPath>().unwrap().names().collect::<Vec<_>>(), ["a", "b"]);
    }

    #[test]
    fn what_is_no_place_for_a_disk_is_told() {
        let long = format!("/{}", "a".repeat(GuestPath::MAX));
        for (text, why) in [
            ("", "absolute"),
            ("data", "absolute"),
            ("/", "root"),
            ("//", "root"),
            ("/a/../b", "'..'"),
            ("/a/.", "'..'"),
            ("/a b", "must be of"),
            ("/a\"b", "must be of"),
            ("/a,b", "must be of"),
            ("/ä", "must be of"),
            ("/proc", "kernel's"),
            ("/sys/fs", "kernel's"),
            ("//dev/", "kernel's"),
            (&long, "100 bytes"),
        ] {
            let error = text.parse::<GuestPath>().unwrap_err();
            assert!(error.to_string().contains(why), "{error}");
        }
    }
}
