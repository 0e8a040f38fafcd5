//! What disks are made with, and what confines the program that unpacks other people's images.

use std::fs;

use super::check::Check;
use super::tool;

/// Of e2fsprogs: VMs' disks and images, volumes, results of builds.
const PROGRAMS: [&str; 3] = ["mke2fs", "e2fsck", "debugfs"];

pub fn e2fsprogs() -> Check {
    let missing: Vec<&str> = PROGRAMS.into_iter().filter(|program| tool::find(program).is_none()).collect();
    judge_e2fsprogs(&missing)
}

fn judge_e2fsprogs(missing: &[&str]) -> Check {
    match missing {
        [] => Check::ok("e2fsprogs", PROGRAMS.join(", ")),
        missing => Check::fail(
            "e2fsprogs",
            format!("{} not in the PATH: no disks can be made", missing.join(", ")),
            "apt-get install e2fsprogs",
        ),
    }
}

pub fn unpacking() -> Check {
    let namespaces = fs::read_to_string("/proc/sys/user/max_user_namespaces").ok();
    // There where securityfs is mounted, as distributions do.
    let modules = fs::read_to_string("/sys/kernel/security/lsm").ok();
    judge_unpacking(namespaces.as_deref(), modules.as_deref())
}

/// `namespaces`: `max_user_namespaces`, absent where the kernel knows none; `modules`: the kernel's security modules.
fn judge_unpacking(namespaces: Option<&str>, modules: Option<&str>) -> Check {
    const NAME: &str = "unpacking";
    match (namespaces.map(str::trim), modules) {
        (None, _) => Check::warn(
            NAME,
            "this kernel has no user namespaces: no image can be pulled, imported or built",
            "use a kernel with CONFIG_USER_NS",
        ),
        (Some("0"), _) => Check::warn(
            NAME,
            "user namespaces are off: no image can be pulled, imported or built",
            "`sudo sysctl -w user.max_user_namespaces=1024`, and find out what in /etc/sysctl.d sets it to 0",
        ),
        (Some(_), Some(modules)) if !modules.trim().split(',').any(|module| module == "landlock") => Check::warn(
            NAME,
            "Landlock is off: what unpacks images is confined by its user alone",
            "add landlock to `lsm=` on the kernel's command line (Linux 5.13 or later)",
        ),
        (Some(_), Some(_)) => Check::ok(NAME, "user namespaces, Landlock"),
        (Some(_), None) => Check::ok(NAME, "user namespaces; whether Landlock is on cannot be seen"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::check::Level;

    #[test]
    fn judged() {
        assert_eq!(judge_e2fsprogs(&[]).level, Level::Ok);
        let check = judge_e2fsprogs(&["debugfs"]);
        assert_eq!((check.level, check.found.contains("debugfs not in")), (Level::Fail, true));
        let debian = "lockdown,capability,landlock,yama,apparmor\n";
        for (namespaces, modules, level, word) in [
            (Some("96365\n"), Some(debian), Level::Ok, "Landlock"),
            (Some("96365\n"), Some("capability,yama\n"), Level::Warn, "Landlock is off"),
            (Some("96365\n"), None, Level::Ok, "cannot be seen"),
            (Some("0\n"), Some(debian), Level::Warn, "are off"),
            (None, Some(debian), Level::Warn, "no user namespaces"),
        ] {
            let check = judge_unpacking(namespaces, modules);
            assert!(check.level == level && check.found.contains(word), "{check:?}");
        }
    }
}
