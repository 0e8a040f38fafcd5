//! Whether anyone but root can put something else where the server takes its programs and files from. It runs the jailer as
//! root and trusts what lies there.

use std::collections::BTreeSet;
use std::fs::Metadata;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use super::Places;
use super::check::Check;

const NAME: &str = "paths";
const STICKY: u32 = 0o1000;

pub fn examine(places: &Places, programs: &[PathBuf]) -> Check {
    let wanted = [&places.state, &places.images].into_iter().chain(programs);
    let mut loose = BTreeSet::new();
    for path in wanted {
        // What does not exist yet will be made by the server, in what does.
        let Some(there) = path.ancestors().find_map(|path| path.canonicalize().ok()) else { continue };
        loose.extend(
            there
                .ancestors()
                .filter(|part| std::fs::metadata(part).is_ok_and(|meta| is_loose(&meta)))
                .map(Path::to_path_buf),
        );
    }
    judge(&loose)
}

/// In a sticky directory only the owner of an entry, or root, can replace it.
fn is_loose(meta: &Metadata) -> bool {
    meta.uid() != 0 || (meta.mode() & 0o022 != 0 && meta.mode() & STICKY == 0)
}

fn judge(loose: &BTreeSet<PathBuf>) -> Check {
    if loose.is_empty() {
        return Check::ok(NAME, "only root can change the server's programs, images and state");
    }
    let all: Vec<String> = loose.iter().map(|path| path.display().to_string()).collect();
    Check::warn(
        NAME,
        format!("others than root can change {}, and so what the server runs as root", all.join(", ")),
        "give these to root and take others' right to write (`sudo chown root`, `sudo chmod go-w`), or keep programs, images \
         and state elsewhere",
    )
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;
    use crate::doctor::check::Level;

    #[test]
    fn who_may_write_there_is_named() {
        assert_eq!(judge(&BTreeSet::new()).level, Level::Ok);
        let found = judge(&BTreeSet::from(["/srv".into(), "/srv/images".into()]));
        assert_eq!(found.level, Level::Warn);
        assert!(found.found.contains("/srv, /srv/images"));
    }

    #[test]
    fn a_directory_that_all_may_write_is_loose() {
        let dir = tempfile::tempdir().unwrap();
        let with = |mode| {
            std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(mode)).unwrap();
            is_loose(&std::fs::metadata(dir.path()).unwrap())
        };
        assert!(with(0o777) && with(0o775));
        // Root's own temporary directories are shut to others; those of other users are theirs.
        let others = std::fs::metadata(dir.path()).unwrap().uid() != 0;
        assert_eq!(with(0o755), others);
        assert_eq!(with(0o1777), others);
    }
}
