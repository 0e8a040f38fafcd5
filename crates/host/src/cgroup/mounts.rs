//! Where this host keeps its hierarchies.

use std::io;
use std::path::{Path, PathBuf};

use clawpot_types::{Error, Kind, Result};

use super::{Cgroup, is_gone};

/// The hierarchies of this host, as `/proc/self/mountinfo` tells them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cgroups {
    v2: PathBuf,
    /// What `/proc/PID/cgroup` puts before the names below `v2`; empty where the mount shows the whole hierarchy.
    prefix: String,
    /// Version-1 hierarchies of the controllers that we limit by.
    v1: Vec<(String, PathBuf)>,
}

/// Controllers that a machine can be limited by.
pub(super) const CONTROLLERS: [&str; 3] = ["memory", "pids", "cpu"];

impl Cgroups {
    /// `FailedPrecondition`: no version-2 hierarchy is mounted.
    pub fn find() -> Result<Self> {
        let path = "/proc/self/mountinfo";
        let text = std::fs::read_to_string(path).map_err(|error| Error::io(format!("reading {path}"), error))?;
        Self::parse(&text)
    }

    fn parse(mountinfo: &str) -> Result<Self> {
        let mut v2 = None;
        let mut v1 = Vec::new();
        for line in mountinfo.lines() {
            // "36 35 0:30 /root /mount/point rw,… shared:1 - cgroup2 source super,options"
            let Some((left, right)) = line.split_once(" - ") else { continue };
            let left: Vec<_> = left.split(' ').collect();
            let right: Vec<_> = right.split(' ').collect();
            let (Some(root), Some(point), Some(kind)) = (left.get(3), left.get(4), right.first()) else { continue };
            match *kind {
                "cgroup2" if v2.is_none() => {
                    v2 = Some((PathBuf::from(point), root.trim_end_matches('/').to_owned()));
                }
                "cgroup" => {
                    let options = right.get(2).copied().unwrap_or_default();
                    for name in options.split(',').filter(|name| CONTROLLERS.contains(name)) {
                        v1.push((name.to_owned(), PathBuf::from(point)));
                    }
                }
                _ => {}
            }
        }
        let (v2, prefix) = v2.ok_or_else(|| {
            Error::new(Kind::FailedPrecondition, "looking for the cgroup version 2 hierarchy: none is mounted")
                .hint("mount it: mount -t cgroup2 cgroup2 /sys/fs/cgroup/unified")
        })?;
        Ok(Self { v2, prefix, v1 })
    }

    /// Mount point of the version-2 hierarchy.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.v2
    }

    /// Whether some controllers are in version-1 hierarchies.
    #[must_use]
    pub fn is_hybrid(&self) -> bool {
        !self.v1.is_empty()
    }

    /// The group `name`, such as `clawpot/k3p9/abcdefghijklmnop-1`; makes nothing.
    /// `InvalidArgument`: a name that would lead elsewhere.
    pub fn group(&self, name: &str) -> Result<Cgroup> {
        let fine = |part: &str| {
            !part.is_empty()
                && !part.starts_with('.')
                && part.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
        };
        if !name.split('/').all(fine) {
            return Err(Error::new(Kind::InvalidArgument, format!("{name:?} is not a cgroup's name")));
        }
        Ok(Cgroup {
            name: name.to_owned(),
            path: self.v2.join(name),
            seen_as: format!("{}/{name}", self.prefix),
            hosts: self.clone(),
        })
    }

    /// Names of the groups right below `parent`, sorted; none when there is no `parent`.
    pub fn list(&self, parent: &str) -> Result<Vec<String>> {
        let what = || format!("listing the cgroups in {parent}");
        let entries = match std::fs::read_dir(self.v2.join(parent)) {
            Ok(entries) => entries,
            Err(error) if is_gone(&error) => return Ok(Vec::new()),
            Err(error) => return Err(Error::io(what(), error)),
        };
        let mut names = Vec::new();
        for entry in entries {
            let entry = entry.map_err(|error| Error::io(what(), error))?;
            if entry.file_type().map_err(|error| Error::io(what(), error))?.is_dir() {
                names.push(entry.file_name().into_string().map_err(|name| {
                    Error::io(format!("{}: {name:?}", what()), io::Error::from(io::ErrorKind::InvalidData))
                })?);
            }
        }
        names.sort();
        Ok(names)
    }

    pub(super) fn v1(&self) -> &[(String, PathBuf)] {
        &self.v1
    }

    pub(super) fn v1_paths<'a>(&'a self, name: &'a str) -> impl Iterator<Item = PathBuf> + 'a {
        self.v1.iter().map(move |(_, mount)| mount.join(name))
    }

    pub(super) fn roots(&self) -> impl Iterator<Item = &Path> {
        self.v1.iter().map(|(_, mount)| mount.as_path()).chain([self.v2.as_path()])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PURE: &str = "29 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n";
    const HYBRID: &str = "\
        30 23 0:27 / /sys/fs/cgroup rw - tmpfs cgroup rw,mode=755\n\
        31 30 0:28 / /sys/fs/cgroup/cpu,cpuacct rw shared:5 - cgroup cgroup rw,cpu,cpuacct\n\
        32 30 0:29 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
        33 30 0:30 / /sys/fs/cgroup/devices rw - cgroup cgroup rw,devices\n\
        34 30 0:31 /pod /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";

    #[test]
    fn pure_and_hybrid_hosts_are_told_apart() {
        let pure = Cgroups::parse(PURE).unwrap();
        assert_eq!(pure.root(), Path::new("/sys/fs/cgroup"));
        assert!(!pure.is_hybrid());
        assert_eq!(pure.group("a/b").unwrap().seen_as, "/a/b");

        let hybrid = Cgroups::parse(HYBRID).unwrap();
        assert_eq!(hybrid.root(), Path::new("/sys/fs/cgroup/unified"));
        assert_eq!(
            hybrid.v1(),
            [
                ("cpu".to_owned(), PathBuf::from("/sys/fs/cgroup/cpu,cpuacct")),
                ("memory".to_owned(), PathBuf::from("/sys/fs/cgroup/memory")),
            ]
        );
        assert_eq!(hybrid.group("a").unwrap().seen_as, "/pod/a");

        let none = Cgroups::parse("30 23 0:27 / /tmp rw - tmpfs tmpfs rw\n").unwrap_err();
        assert!(none.next_step().unwrap().contains("mount -t cgroup2"));
    }

    #[test]
    fn names_stay_below_the_root() {
        let hosts = Cgroups::parse(PURE).unwrap();
        for bad in ["", "/", "/a", "a/", "a//b", "..", "a/../b", ".a", "a b", "a\n"] {
            assert!(hosts.group(bad).is_err(), "{bad:?}");
        }
    }
}
