//! Which control groups there are: every VM has one of its own, by which it is found again after a crash and limited.

use super::check::Check;

const NAME: &str = "cgroup";
/// What VMs are limited by.
const CONTROLLERS: [&str; 3] = ["memory", "pids", "cpu"];

pub fn examine() -> Check {
    match std::fs::read_to_string("/proc/self/mountinfo") {
        Ok(mounts) => {
            judge(&mounts, |v2| std::fs::read_to_string(format!("{v2}/cgroup.controllers")).unwrap_or_default())
        }
        Err(error) => Check::unknown(NAME, format!("/proc/self/mountinfo: {error}"), "mount /proc"),
    }
}

/// Judges `/proc/self/mountinfo` and what `controllers` says of the version-2 hierarchy that is found there.
fn judge(mounts: &str, controllers: impl Fn(&str) -> String) -> Check {
    let mut unified = None;
    let mut legacy: Vec<&str> = Vec::new();
    for line in mounts.lines() {
        // "36 35 98:0 /root /mountpoint options … - type source options"
        let mut halves = line.splitn(2, " - ");
        let (place, kind) = (halves.next().unwrap_or_default(), halves.next().unwrap_or_default());
        match kind.split(' ').next() {
            Some("cgroup2") => unified = unified.or(place.split(' ').nth(4)),
            Some("cgroup") => legacy.extend(kind.split(' ').nth(2).unwrap_or_default().split(',')),
            _ => {}
        }
    }
    let fix = "boot with `systemd.unified_cgroup_hierarchy=1` on the kernel's command line";
    let Some(place) = unified else {
        return match legacy.iter().any(|option| CONTROLLERS.contains(option)) {
            true => Check::fail(NAME, "only version 1: VMs could not be found again after a crash", fix),
            false => Check::fail(NAME, "no control groups are mounted", "mount -t cgroup2 none /sys/fs/cgroup"),
        };
    };
    let ours = controllers(place);
    let in_v2 = |name: &&&str| ours.split_whitespace().any(|there| there == **name);
    let in_v1 = |name: &&&str| legacy.contains(*name);
    let old: Vec<&str> = CONTROLLERS.iter().filter(in_v1).copied().collect();
    let missing: Vec<&str> = CONTROLLERS.iter().filter(|name| !in_v1(name) && !in_v2(name)).copied().collect();
    match (missing.as_slice(), old.as_slice()) {
        ([], []) => Check::ok(NAME, format!("version 2 at {place}, with {}", CONTROLLERS.join(", "))),
        ([], old) => {
            let found =
                format!("version 2 at {place}; {} in version 1, where limits hold from 60 ms on", old.join(", "));
            Check::ok(NAME, found)
        }
        (missing, _) => Check::warn(
            NAME,
            format!("version 2 at {place}, without {}: VMs lack these limits", missing.join(", ")),
            fix,
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::check::Level;

    #[test]
    fn layouts_are_told_apart() {
        let v2 = "31 24 0:27 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate";
        let unified = "43 32 0:39 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw";
        let memory = "35 32 0:30 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory";
        let rest = "36 32 0:31 / /sys/fs/cgroup/cpu,pids rw,relatime - cgroup cgroup rw,cpu,pids";
        let named = "41 32 0:38 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,name=systemd";
        let with = |lines: &[&str], controllers: &str| judge(&lines.join("\n"), |_| controllers.to_owned());
        let all = "cpuset cpu io memory pids\n";
        assert_eq!(with(&[v2], all), Check::ok(NAME, "version 2 at /sys/fs/cgroup, with memory, pids, cpu"));
        assert_eq!(with(&[named, unified], all).level, Level::Ok);
        assert_eq!(with(&[memory, unified, rest], "").level, Level::Ok);
        assert_eq!(with(&[memory, unified], "cpu pids").level, Level::Ok);
        let lacking = with(&[memory, unified], "cpu");
        assert_eq!((lacking.level, lacking.found.contains("without pids:")), (Level::Warn, true));
        assert_eq!(with(&[memory], "").level, Level::Fail);
        assert_eq!(with(&[], "").level, Level::Fail);
    }
}
