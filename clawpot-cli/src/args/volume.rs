//! `--volume NAME:/PATH[:ro]`.

use clawpot_common::v1::VolumeMount;
use clawpot_types::{GuestPath, VolumeName};

/// The parser of it.
pub fn mount(text: &str) -> Result<VolumeMount, String> {
    let said = |error: clawpot_types::Error| error.to_string();
    let Some((name, rest)) = text.split_once(':') else {
        return Err(format!("{text:?}: must be NAME:/PATH or NAME:/PATH:ro"));
    };
    let (path, read_only) = match rest.rsplit_once(':') {
        None => (rest, false),
        Some((path, "ro")) => (path, true),
        Some((path, "rw")) => (path, false),
        Some((_, mode)) => return Err(format!("mode {mode:?}: must be ro or rw")),
    };
    let (name, path): (VolumeName, GuestPath) = (name.parse().map_err(said)?, path.parse().map_err(said)?);
    Ok(VolumeMount { volume: name.to_string(), path: path.to_string(), read_only })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn volumes_are_read_with_their_mode() {
        let want = |read_only| VolumeMount { volume: "db".into(), path: "/srv/db".into(), read_only };
        assert_eq!(mount("db:/srv/db"), Ok(want(false)));
        assert_eq!(mount("db:/srv/db/:rw"), Ok(want(false)));
        assert_eq!(mount("db:/srv/db:ro"), Ok(want(true)));
    }

    #[test]
    fn what_is_wrong_is_told() {
        for (text, want) in [
            ("db", "NAME:/PATH"),
            ("db:data", "absolute"),
            ("db:/", "root"),
            ("db:/a/../b", "'..'"),
            ("db:/a:rx", "must be ro or rw"),
            ("DB:/a", "volume \"DB\""),
            (":/a", "volume \"\""),
        ] {
            let error = mount(text).unwrap_err();
            assert!(error.contains(want), "{text}: {error}");
        }
    }
}
