//! Unix sockets: 0660, for root and one group. A socket that another server answers on is not taken away.

use std::fs;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::Path;

use clawpot_types::{Error, Kind, Result};
use rustix::fs::{Gid, Mode, chmod, chown};
use tokio::net::UnixListener;

/// `sun_path` holds 108 bytes with the final NUL.
const MAX_PATH: usize = 107;

/// Binds `path`, which `flag` sets; `group` may connect beside root. Not reachable by anyone else at any moment: the socket is bound in a
/// directory of its own, given its mode, and only then renamed into place.
pub fn bind(path: &Path, flag: &str, group: Option<u32>) -> Result<UnixListener> {
    let shown = path.display();
    let failed = |doing: &str, error| Error::io(format!("socket {shown}: {doing}"), error);
    let (Some(dir), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(Error::new(Kind::InvalidArgument, format!("socket {shown}: not a file's path")));
    };
    let nursery = dir.join(format!(".{}.{}", name.to_string_lossy(), std::process::id()));
    let fresh = nursery.join("s");
    if fresh.as_os_str().len() > MAX_PATH {
        let what = format!("socket {shown}: the path is too long for a Unix socket ({MAX_PATH} bytes)");
        return Err(
            Error::new(Kind::InvalidArgument, what).hint(format!("choose a shorter one with {flag}, e.g. under /run"))
        );
    }
    fs::create_dir_all(dir).map_err(|error| failed("making its directory", error))?;
    refuse_if_served(path, flag)?;
    match fs::create_dir(&nursery) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => return Err(failed("making it", error)),
        _ => chmod(&nursery, Mode::RWXU).map_err(|error| failed("making it", error.into()))?,
    }
    let bound = (|| {
        // Left by a process of the same number.
        match fs::remove_file(&fresh) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(&fresh)?;
        chown(&fresh, None, Some(Gid::from_raw(group.unwrap_or(0))))?;
        chmod(&fresh, Mode::from_raw_mode(0o660))?;
        fs::rename(&fresh, path)?;
        Ok(listener)
    })();
    let swept = fs::remove_dir_all(&nursery);
    let listener = bound.map_err(|error| failed("binding it", error))?;
    swept.map_err(|error| failed("sweeping up", error))?;
    Ok(listener)
}

fn refuse_if_served(path: &Path, flag: &str) -> Result<()> {
    let Ok(found) = fs::symlink_metadata(path) else { return Ok(()) };
    if !found.file_type().is_socket() {
        let what = format!("socket {}: something else is there, of {} bytes", path.display(), found.size());
        return Err(Error::new(Kind::AlreadyExists, what).hint(format!("choose another path with {flag}")));
    }
    match std::os::unix::net::UnixStream::connect(path) {
        Ok(_) => {
            Err(Error::new(Kind::AlreadyExists, format!("socket {}: another server answers on it", path.display()))
                .hint(format!("stop that server, or choose another path with {flag}")))
        }
        Err(_) => Ok(()),
    }
}

/// The group's id from `/etc/group`. `asked`: by name, must exist; otherwise `clawpot` where there is one.
pub fn group(asked: Option<&str>) -> Result<Option<u32>> {
    let name = asked.unwrap_or("clawpot");
    let text = fs::read_to_string("/etc/group").map_err(|error| Error::io("reading /etc/group", error))?;
    let id = text.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next() == Some(name)).then(|| fields.nth(1)?.parse().ok()).flatten()
    });
    match (id, asked) {
        (None, Some(name)) => Err(Error::new(Kind::NotFound, format!("group {name:?}: there is none of that name"))
            .hint(format!("groupadd --system {name}"))),
        (id, _) => Ok(id),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_a_dead_socket_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api.sock");
        let listener = bind(&path, "--socket", None).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o660);
        assert!(bind(&path, "--socket", None).unwrap_err().chain().contains("another server answers"));
        drop(listener);
        bind(&path, "--socket", None).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "nothing is left of the making");
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        assert!(bind(&path, "--socket", None).unwrap_err().chain().contains("something else is there"));
        let long = dir.path().join("x".repeat(120));
        assert!(bind(&long, "--socket", None).unwrap_err().next_step().unwrap().contains("shorter"));
    }
}
