//! Where disks and images are kept.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use clawpot_types::MiB;

use super::Places;
use super::check::Check;

/// Less than this and the next VM's disk soon fails to grow.
const LOW: MiB = MiB(5 << 10);
/// Less than this and the server's own records are at risk.
const FULL: MiB = MiB(512);
/// Files below which the next VMs cannot be made: each needs a few dozen.
const FEW_INODES: u64 = 1_000;

pub fn examine(places: &Places) -> Vec<Check> {
    let device =
        |path: &Path| existing(path).and_then(|path| Some((path.clone(), std::fs::metadata(path).ok()?.dev())));
    let state = existing(&places.state);
    vec![judge_place(device(&places.state), device(&places.images)), space(state.as_deref())]
}

/// `path`, or its nearest ancestor that exists: it would be made there.
fn existing(path: &Path) -> Option<PathBuf> {
    path.ancestors().find(|path| path.exists()).map(Path::to_path_buf)
}

fn judge_place(state: Option<(PathBuf, u64)>, images: Option<(PathBuf, u64)>) -> Check {
    const NAME: &str = "one filesystem";
    match (state, images) {
        (Some((state, a)), Some((images, b))) if a == b => {
            Check::ok(NAME, format!("{} and {} share one", state.display(), images.display()))
        }
        (Some((state, _)), Some((images, _))) => Check::fail(
            NAME,
            format!("{} and {} are on two: images cannot be linked into VMs", state.display(), images.display()),
            "keep images within the server's state directory",
        ),
        _ => Check::unknown(NAME, "the directories cannot be seen by this user", "run `sudo clawpot doctor`"),
    }
}

fn space(path: Option<&Path>) -> Check {
    const NAME: &str = "space";
    let Some(path) = path else {
        return Check::unknown(NAME, "the state directory cannot be seen by this user", "run `sudo clawpot doctor`");
    };
    match rustix::fs::statvfs(path) {
        Ok(stat) => judge_space(path, stat.f_bavail.saturating_mul(stat.f_frsize), stat.f_files, stat.f_favail),
        Err(errno) => Check::unknown(NAME, format!("{}: {errno}", path.display()), "run `sudo clawpot doctor`"),
    }
}

/// `inodes` is 0 on filesystems that do not count them.
fn judge_space(path: &Path, free_bytes: u64, inodes: u64, free_inodes: u64) -> Check {
    const NAME: &str = "space";
    let free = MiB::from_bytes(free_bytes);
    let files = if inodes == 0 { "files without limit".to_owned() } else { format!("{free_inodes} files") };
    let found = format!("{}: {free} and {files} free", path.display());
    let fix =
        "delete VMs (`clawpot ls`) and images that are not needed, or move the state directory to a larger filesystem";
    match free {
        _ if inodes > 0 && free_inodes < FEW_INODES => Check::fail(NAME, found, fix),
        free if free < FULL => Check::fail(NAME, found, fix),
        free if free < LOW => Check::warn(NAME, found, fix),
        _ => Check::ok(NAME, found),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::check::Level;

    #[test]
    fn images_are_linked_so_they_must_be_near() {
        let at = |path: &str, device| Some((PathBuf::from(path), device));
        assert_eq!(judge_place(at("/var/lib", 1), at("/var/lib", 1)).level, Level::Ok);
        assert_eq!(judge_place(at("/var/lib", 1), at("/srv", 2)).level, Level::Fail);
        assert_eq!(judge_place(None, at("/srv", 2)).level, Level::Unknown);
        assert_eq!(existing(Path::new("/proc/no/such/dir")), Some(PathBuf::from("/proc")));
    }

    #[test]
    fn space_and_files_both_count() {
        let level = |mib: u64, inodes, free| judge_space(Path::new("/"), mib << 20, inodes, free).level;
        assert_eq!(level(100_000, 1_000_000, 900_000), Level::Ok);
        assert_eq!(level(100_000, 0, 0), Level::Ok);
        assert_eq!(level(2_000, 1_000_000, 900_000), Level::Warn);
        assert_eq!(level(100, 1_000_000, 900_000), Level::Fail);
        assert_eq!(level(100_000, 1_000_000, 10), Level::Fail);
    }
}
