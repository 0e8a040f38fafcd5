//! QEMU, Firecracker and its jailer: are they there, and which of their versions have known holes.

use std::path::{Path, PathBuf};

use clawpot_types::release;

use super::check::Check;
use super::tool::{self, Version};

/// Holes of Firecracker and its jailer: first and last version affected, and what it is.
const HOLES: [(Version, Version, &str); 4] = [
    (Version(1, 13, 0), Version(1, 14, 3), "CVE-2026-5747: a guest can write outside a virtio-pci queue"),
    (Version(1, 15, 0), Version(1, 15, 0), "CVE-2026-5747: a guest can write outside a virtio-pci queue"),
    (Version(0, 0, 0), Version(1, 13, 1), "CVE-2026-1386: the jailer follows symbolic links"),
    (Version(1, 14, 0), Version(1, 14, 0), "CVE-2026-1386: the jailer follows symbolic links"),
];
/// The oldest Firecracker that the server uses.
const OLDEST: Version = Version(1, 15, 1);
const GET_FIRECRACKER: &str = "install Firecracker 1.15.1 or later with its jailer from its releases, in the PATH or at \
                               FIRECRACKER_BIN";

/// A program: where it is and its version, or why that is not known. `None` when there is none.
type Program = Option<(PathBuf, Result<Version, String>)>;

pub fn examine(kvm: bool, images: &Path) -> Vec<Check> {
    let [firecracker, jailer, qemu] = places(images).map(asked);
    let needed = !(kvm && usable(&firecracker) && usable(&jailer));
    vec![judge_qemu(&qemu, needed), judge("firecracker", &firecracker, kvm), judge("jailer", &jailer, kvm)]
}

/// Where those of them are that are there.
pub fn programs(images: &Path) -> Vec<PathBuf> {
    places(images).into_iter().flatten().collect()
}

/// Firecracker, its jailer, QEMU; where the server looks.
fn places(images: &Path) -> [Option<PathBuf>; 3] {
    let place =
        |given: Option<PathBuf>, name: &str| given.filter(|path| tool::is_program(path)).or_else(|| tool::find(name));
    let given = std::env::var_os("FIRECRACKER_BIN").map(PathBuf::from);
    let firecracker = place(given.or_else(|| fetched(images)), "firecracker");
    // Releases carry both side by side.
    let jailer = place(firecracker.as_ref().map(|path| path.with_file_name("jailer")), "jailer");
    let qemu = place(None, &format!("qemu-system-{}", std::env::consts::ARCH));
    [firecracker, jailer, qemu]
}

/// The newest release beside the images of which there is a program.
fn fetched(images: &Path) -> Option<PathBuf> {
    let dir = images.join(release::FETCHED);
    let names = std::fs::read_dir(&dir).ok()?.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let program = |name: &String| dir.join(name).join("firecracker");
    release::newest(names.filter(|name| tool::is_program(&program(name)))).as_ref().map(program)
}

fn asked(path: Option<PathBuf>) -> Program {
    let path = path?;
    let version = tool::output_of(&path, &["--version"]).and_then(|said| {
        Version::find(&said).ok_or_else(|| format!("--version says {:?}", said.lines().next().unwrap_or_default()))
    });
    Some((path, version))
}

fn usable(program: &Program) -> bool {
    matches!(program, Some((_, Ok(version))) if *version >= OLDEST)
}

fn judge_qemu(qemu: &Program, needed: bool) -> Check {
    let get = "apt-get install --no-install-recommends qemu-system-x86";
    match qemu {
        None if needed => Check::fail("qemu", "not in the PATH, and nothing else can run VMs here", get),
        None => Check::ok("qemu", "not in the PATH; Firecracker runs the VMs"),
        Some((path, Ok(version))) if version.0 < 7 => {
            Check::warn("qemu", format!("{version} at {}: older than 7.2, untested", path.display()), get)
        }
        Some((path, Ok(version))) => Check::ok("qemu", format!("{version} at {}", path.display())),
        Some((path, Err(why))) => Check::fail("qemu", format!("{}: {why}", path.display()), get),
    }
}

/// Without KVM it is not used, so that nothing about it fails.
fn judge(name: &'static str, program: &Program, kvm: bool) -> Check {
    let Some((path, version)) = program else {
        return match kvm {
            true => Check::warn(name, "not found: QEMU runs the VMs", GET_FIRECRACKER),
            false => Check::ok(name, "not found; without KVM it could not be used"),
        };
    };
    let version = match version {
        Ok(version) => version,
        Err(why) => return Check::warn(name, format!("{}: {why}", path.display()), GET_FIRECRACKER),
    };
    let mut holes: Vec<&str> =
        HOLES.iter().filter(|(from, to, _)| (from..=to).contains(&version)).map(|(_, _, hole)| *hole).collect();
    holes.dedup();
    let found = format!("{version} at {}", path.display());
    match holes.as_slice() {
        [] if *version < OLDEST => {
            Check::warn(name, format!("{found}: older than {OLDEST}, not used"), GET_FIRECRACKER)
        }
        [] => Check::ok(name, found),
        holes if kvm => Check::fail(name, format!("{found} has known holes: {}", holes.join("; ")), GET_FIRECRACKER),
        holes => Check::warn(name, format!("{found} has known holes: {}", holes.join("; ")), GET_FIRECRACKER),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::doctor::check::Level;

    fn firecracker(version: Version) -> Check {
        judge("firecracker", &Some(("/usr/bin/firecracker".into(), Ok(version))), true)
    }

    #[test]
    fn versions_with_known_holes_are_named() {
        let holes = |version| firecracker(version).found.matches("CVE-").count();
        let counts = [(1, 12, 0), (1, 13, 1), (1, 13, 2), (1, 14, 0), (1, 14, 3), (1, 14, 4), (1, 15, 0), (1, 15, 1)];
        assert_eq!(counts.map(|(a, b, c)| holes(Version(a, b, c))), [1, 2, 1, 2, 1, 0, 1, 0]);
        assert_eq!(firecracker(Version(1, 14, 4)).level, Level::Warn);
        assert_eq!(firecracker(Version(1, 15, 0)).level, Level::Fail);
        assert_eq!(firecracker(Version(1, 16, 1)).level, Level::Ok);
    }

    #[test]
    fn the_newest_fetched_release_is_the_one() {
        let images = tempfile::tempdir().unwrap();
        assert_eq!(fetched(images.path()), None);
        for (release, mode) in [("v1.9.1", 0o755), ("v1.15.1", 0o755), ("v1.16.0", 0o644)] {
            let dir = images.path().join("firecracker").join(release);
            std::fs::create_dir_all(&dir).unwrap();
            std::fs::File::create(dir.join("firecracker")).unwrap();
            std::fs::set_permissions(dir.join("firecracker"), PermissionsExt::from_mode(mode)).unwrap();
        }
        assert!(fetched(images.path()).unwrap().ends_with("firecracker/v1.15.1/firecracker"));
    }

    #[test]
    fn something_must_run_the_vms() {
        assert_eq!(judge_qemu(&None, true).level, Level::Fail);
        assert_eq!(judge_qemu(&None, false).level, Level::Ok);
        assert_eq!(judge_qemu(&Some(("/q".into(), Ok(Version(7, 2, 22)))), true).level, Level::Ok);
        assert_eq!(judge("jailer", &None, false).level, Level::Ok);
        assert_eq!(judge("jailer", &None, true).level, Level::Warn);
    }
}
