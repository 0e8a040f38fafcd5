//! Which control groups there are: every VM has one of its own, by which it is found again after a crash.

use super::check::Check;

const NAME: &str = "cgroup";

pub fn examine() -> Check {
    match std::fs::read_to_string("/proc/self/mountinfo") {
        Ok(mounts) => judge(&mounts),
        Err(error) => Check::unknown(NAME, format!("/proc/self/mountinfo: {error}"), "mount /proc"),
    }
}

/// Judges `/proc/self/mountinfo`.
fn judge(mounts: &str) -> Check {
    let mut unified = None;
    let mut legacy = false;
    for line in mounts.lines() {
        // "36 35 98:0 /root /mountpoint options … - type source options"
        let mut halves = line.splitn(2, " - ");
        let (place, kind) = (halves.next().unwrap_or_default(), halves.next().unwrap_or_default());
        match kind.split(' ').next() {
            Some("cgroup2") => unified = unified.or(place.split(' ').nth(4)),
            Some("cgroup") => legacy |= !kind.contains("name="),
            _ => {}
        }
    }
    let fix = "boot with `systemd.unified_cgroup_hierarchy=1` on the kernel's command line";
    match (unified, legacy) {
        (Some(place), false) => Check::ok(NAME, format!("version 2 at {place}")),
        (Some(place), true) => Check::warn(
            NAME,
            format!(
                "version 2 at {place} beside version 1 (hybrid): VMs are told apart, but their limits may not hold"
            ),
            fix,
        ),
        (None, true) => Check::fail(NAME, "only version 1: VMs could not be found again after a crash", fix),
        (None, false) => Check::fail(NAME, "no control groups are mounted", "mount -t cgroup2 none /sys/fs/cgroup"),
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
        let named = "41 32 0:38 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,name=systemd";
        assert_eq!(judge(v2), Check::ok(NAME, "version 2 at /sys/fs/cgroup"));
        assert_eq!(judge(&format!("{named}\n{unified}")).level, Level::Ok);
        assert_eq!(judge(&format!("{memory}\n{unified}")).level, Level::Warn);
        assert_eq!(judge(memory).level, Level::Fail);
        assert_eq!(judge("").level, Level::Fail);
    }
}
