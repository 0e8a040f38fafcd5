//! Where this host keeps its hierarchies.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};

use clawpot_types::{Error, Kind, Result};

use super::limits::{Missing, names};
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
const CONTROLLERS: [&str; 3] = ["memory", "pids", "cpu"];

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

    /// Names of the groups right below `parent` in any hierarchy, sorted; none when there is no `parent`.
    pub fn list(&self, parent: &str) -> Result<Vec<String>> {
        let what = || format!("listing the cgroups in {parent}");
        let mut found = BTreeSet::new();
        for root in self.roots() {
            let entries = match std::fs::read_dir(root.join(parent)) {
                Ok(entries) => entries,
                Err(error) if is_gone(&error) => continue,
                Err(error) => return Err(Error::io(what(), error)),
            };
            for entry in entries {
                let entry = entry.map_err(|error| Error::io(what(), error))?;
                if entry.file_type().map_err(|error| Error::io(what(), error))?.is_dir() {
                    found.insert(entry.file_name().into_string().map_err(|name| {
                        Error::io(format!("{}: {name:?}", what()), io::Error::from(io::ErrorKind::InvalidData))
                    })?);
                }
            }
        }
        Ok(found.into_iter().collect())
    }

    /// The controllers of [`super::Limits`] that this host cannot limit by. Changes nothing.
    pub fn missing(&self) -> Result<Vec<Missing>> {
        let mut missing = Vec::new();
        for controller in CONTROLLERS {
            let lacks = self.lacks(controller);
            missing.extend(lacks.map_err(|error| Error::io("looking for the cgroup controllers", error))?);
        }
        Ok(missing)
    }

    pub(super) fn lacks(&self, controller: &'static str) -> io::Result<Option<Missing>> {
        if self.v1.iter().any(|(name, _)| name == controller) {
            return Ok(None);
        }
        let because = |why| Ok(Some(Missing { controller, why }));
        if !names(&self.v2.join("cgroup.controllers"), controller)? {
            return because("this host has no such cgroup controller");
        }
        // Only the hierarchy's own root, which has no type, may have processes and hand controllers down.
        let handed_down = names(&self.v2.join("cgroup.subtree_control"), controller)?;
        if handed_down || !self.v2.join("cgroup.type").try_exists()? {
            return Ok(None);
        }
        match std::fs::read_to_string(self.v2.join("cgroup.procs"))?.is_empty() {
            true => Ok(None),
            false => because("processes live in the root of this container's cgroups, so none below has controllers"),
        }
    }

    pub(super) fn v1(&self) -> &[(String, PathBuf)] {
        &self.v1
    }

    /// One hierarchy may hold several controllers.
    fn v1_roots(&self) -> BTreeSet<&Path> {
        self.v1.iter().map(|(_, mount)| mount.as_path()).collect()
    }

    pub(super) fn v1_paths(&self, name: &str) -> Vec<PathBuf> {
        self.v1_roots().into_iter().map(|mount| mount.join(name)).collect()
    }

    pub(super) fn roots(&self) -> impl Iterator<Item = &Path> {
        self.v1_roots().into_iter().chain([self.v2.as_path()])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PURE: &str = "29 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n";
    const HYBRID: &str = "\
        30 23 0:27 / /sys/fs/cgroup rw - tmpfs cgroup rw,mode=755\n\
        31 30 0:28 / /sys/fs/cgroup/cpu,pids rw shared:5 - cgroup cgroup rw,cpu,cpuacct,pids\n\
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
                ("cpu".to_owned(), PathBuf::from("/sys/fs/cgroup/cpu,pids")),
                ("pids".to_owned(), PathBuf::from("/sys/fs/cgroup/cpu,pids")),
                ("memory".to_owned(), PathBuf::from("/sys/fs/cgroup/memory")),
            ]
        );
        assert_eq!(hybrid.group("a").unwrap().seen_as, "/pod/a");
        let twice = ["/sys/fs/cgroup/cpu,pids/a", "/sys/fs/cgroup/memory/a"].map(PathBuf::from);
        assert_eq!(hybrid.v1_paths("a"), twice, "each hierarchy once");

        let none = Cgroups::parse("30 23 0:27 / /tmp rw - tmpfs tmpfs rw\n").unwrap_err();
        assert!(none.next_step().unwrap().contains("mount -t cgroup2"));
    }

    #[test]
    fn what_a_host_cannot_limit_by_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            crate::fs::replace_unsynced(&dir.path().join(name), text.as_bytes(), 0o600).unwrap()
        };
        write("cgroup.controllers", "cpuset cpu memory\n");
        write("cgroup.subtree_control", "\n");
        let line = format!("29 23 0:26 / {} rw - cgroup2 cgroup2 rw\n", dir.path().display());
        let hosts = Cgroups::parse(&line).unwrap();
        let missing = || hosts.missing().unwrap().iter().map(|missing| missing.controller).collect::<Vec<_>>();
        assert_eq!(missing(), ["pids"]);
        // A container: its root is a group like any other.
        write("cgroup.type", "domain\n");
        write("cgroup.procs", "1\n17\n");
        assert_eq!(missing(), ["memory", "pids", "cpu"]);
        write("cgroup.subtree_control", "cpu\n");
        assert_eq!(missing(), ["memory", "pids"]);
        let limits = super::super::Limits { memory: Some(1), pids: Some(2), cpu: Some(3) };
        let left = super::super::Limits { cpu: Some(3), ..super::super::Limits::default() };
        assert_eq!(limits.without(&hosts.missing().unwrap()), left);
    }

    #[test]
    fn names_stay_below_the_root() {
        let hosts = Cgroups::parse(PURE).unwrap();
        for bad in ["", "/", "/a", "a/", "a//b", "..", "a/../b", ".a", "a b", "a\n"] {
            assert!(hosts.group(bad).is_err(), "{bad:?}");
        }
    }
}
