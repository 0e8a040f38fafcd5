//! Unix sockets reached through their directory: `sun_path` holds 107 bytes, a state directory's path may be longer.

use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use clawpot_types::{Error, Kind, Result};
use rustix::fs::{FileType, Mode, OFlags};
use tokio::net::{UnixListener, UnixStream};

/// Connects to the socket at `path`, however long the path is. `NotFound`: no such socket (yet); `Unavailable`: nobody
/// listens; `FailedPrecondition`: what is there is not a socket. The last part of the path is not followed: a VMM that
/// its guest has taken over must not lead us to another's socket.
pub async fn connect(path: &Path) -> Result<UnixStream> {
    let what = || format!("connecting to {}", path.display());
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let socket = rustix::fs::open(path, flags, Mode::empty()).map_err(|errno| crate::failed(what(), errno))?;
    let kind = rustix::fs::fstat(&socket).map_err(|errno| crate::failed(what(), errno))?.st_mode;
    if !FileType::from_raw_mode(kind).is_socket() {
        return Err(Error::new(Kind::FailedPrecondition, format!("{}: not a socket", what())));
    }
    // The very file that was looked at.
    let stream = UnixStream::connect(format!("/proc/self/fd/{}", socket.as_raw_fd())).await;
    stream.map_err(|error| Error::io(what(), error))
}

/// Listens at `path`, however long the path is. `AlreadyExists`: remove the old one first.
pub fn listen(path: &Path) -> Result<UnixListener> {
    let what = || format!("listening at {}", path.display());
    let (dir, short) = short_path(path).map_err(|error| error.context(what()))?;
    let listener = UnixListener::bind(&short).map_err(|error| match error.kind() {
        std::io::ErrorKind::AddrInUse => Error::new(Kind::AlreadyExists, what()).because(error),
        _ => Error::io(what(), error),
    })?;
    drop(dir);
    Ok(listener)
}

/// Supplementary groups of whoever connected to `socket`, as they were then (`SO_PEERGROUPS`).
pub fn peer_groups(socket: &impl AsRawFd) -> std::io::Result<Vec<u32>> {
    // NGROUPS_MAX: what Linux lets a process have.
    const MOST: usize = 65_536;
    // Most have few; the kernel says how many bytes it wants where these do not suffice.
    let mut groups: Vec<libc::gid_t> = vec![0; 64];
    loop {
        let size = size_of::<libc::gid_t>();
        let mut bytes = libc::socklen_t::try_from(groups.len() * size).map_err(std::io::Error::other)?;
        // SAFETY: the buffer has as many bytes as the call is told, which writes no more and says how many.
        let done = unsafe {
            libc::getsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_PEERGROUPS,
                groups.as_mut_ptr().cast(),
                &raw mut bytes,
            )
        };
        let count = usize::try_from(bytes).map_err(std::io::Error::other)? / size;
        if done == 0 {
            groups.truncate(count);
            return Ok(groups);
        }
        let error = std::io::Error::last_os_error();
        if error.raw_os_error() != Some(libc::ERANGE) || count <= groups.len() || count > MOST {
            return Err(error);
        }
        groups.resize(count, 0);
    }
}

/// `/proc/self/fd/N/<name>` for `path`, good while the returned descriptor lives.
fn short_path(path: &Path) -> Result<(std::os::fd::OwnedFd, PathBuf)> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(Error::new(Kind::InvalidArgument, format!("{}: not a socket's path", path.display())));
    };
    let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
    let dir = rustix::fs::open(parent, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .map_err(|errno| crate::failed(format!("opening {}", parent.display()), errno))?;
    let short = PathBuf::from(format!("/proc/self/fd/{}", dir.as_raw_fd())).join(name);
    Ok((dir, short))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_path_of_any_length_and_only_a_socket() {
        let temp = tempfile::tempdir().unwrap();
        let deep = temp.path().join("d".repeat(100)).join("e".repeat(100));
        std::fs::create_dir_all(&deep).unwrap();
        let path = deep.join("s.sock");
        assert_eq!(connect(&path).await.unwrap_err().kind(), Kind::NotFound);
        let listener = listen(&path).unwrap();
        connect(&path).await.unwrap();
        assert_eq!(listen(&path).unwrap_err().kind(), Kind::AlreadyExists);
        std::os::unix::fs::symlink(&path, deep.join("link")).unwrap();
        assert_eq!(connect(&deep.join("link")).await.unwrap_err().kind(), Kind::FailedPrecondition);
        drop(listener);
        assert_eq!(connect(&path).await.unwrap_err().kind(), Kind::Unavailable);
    }
}
