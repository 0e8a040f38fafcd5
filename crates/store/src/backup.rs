//! An online copy of the state.

use std::fs::File;
use std::path::{Path, PathBuf};

use clawpot_types::{Error, Kind, Result};
use rusqlite::{Connection, OpenFlags};
use rustix::fs::{CWD, RenameFlags};

use crate::error::sql;
use crate::{schema, store};

/// Copies the state of `state_dir` to the file `to` as it is at one moment, also while a server writes it; works from any
/// process of the same user and needs no lock. Blocks. Nothing is at `to` before the copy is whole, verified and on disk.
///
/// To restore: stop the server, remove `state.db-wal` and `state.db-shm`, copy the file to `STATE/state.db`. The copy carries no
/// epoch, so whoever held a revision of the old store is sent to list again.
///
/// # Errors
/// `AlreadyExists`: `to` is there, nothing is overwritten; `NotFound`: no state in the directory; `Exhausted`: no room for the copy.
pub fn backup(state_dir: &Path, to: &Path) -> Result<()> {
    let what = || format!("backing {} up to {}", state_dir.display(), to.display());
    if to.symlink_metadata().is_ok() {
        return Err(exists(to).context(what()));
    }
    let from = store::path(state_dir);
    if !from.is_file() {
        let error = Error::new(Kind::NotFound, format!("{}: no state store", from.display()));
        return Err(error.hint("give the server's state directory").context(what()));
    }
    let temporary = temporary_beside(to)?;
    let copied = copy(&from, &temporary).and_then(|()| publish(&temporary, to));
    copied.map_err(|error| match std::fs::remove_file(&temporary) {
        Ok(()) => error.context(what()),
        Err(gone) if gone.kind() == std::io::ErrorKind::NotFound => error.context(what()),
        Err(left) => error.context(what()).and_cleanup(Error::io(format!("removing {}", temporary.display()), left)),
    })
}

/// Made here, so that only the owner may read it, and beside `to`, so that renaming is atomic.
fn temporary_beside(to: &Path) -> Result<PathBuf> {
    use std::os::unix::fs::OpenOptionsExt as _;
    let name = to
        .file_name()
        .ok_or_else(|| Error::new(Kind::InvalidArgument, format!("{}: not a file's name", to.display())))?;
    let temporary = to.with_file_name(format!(".{}.{}.part", name.to_string_lossy(), std::process::id()));
    File::options()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&temporary)
        .map_err(|error| Error::io(format!("creating {}", temporary.display()), error))?;
    Ok(temporary)
}

fn copy(from: &Path, temporary: &Path) -> Result<()> {
    let failed = |error| sql(format!("copying to {}", temporary.display()), error);
    let source = schema::connect(from, OpenFlags::SQLITE_OPEN_READ_WRITE)?;
    schema::check_ours(&source, from)?;
    let mut target = Connection::open(temporary).map_err(failed)?;
    {
        let copying = rusqlite::backup::Backup::new(&source, &mut target).map_err(failed)?;
        // In one step, which reads one snapshot: in several, each commit of the server would begin it anew.
        match copying.step(-1).map_err(failed)? {
            rusqlite::backup::StepResult::Done => {}
            other => {
                let text = format!("copying {}: {other:?}", from.display());
                return Err(Error::new(Kind::Unavailable, text).hint("try again"));
            }
        }
    }
    target.execute_batch("PRAGMA journal_mode = DELETE; DELETE FROM meta WHERE name = 'epoch';").map_err(failed)?;
    let verdict: String = target.query_row("PRAGMA integrity_check(1)", [], |row| row.get(0)).map_err(failed)?;
    if verdict != "ok" {
        return Err(Error::new(Kind::Corrupt, format!("the state store {}: {verdict}", from.display()))
            .hint("the damage is in the store itself; keep it, and the last good backup"));
    }
    target.close().map_err(|(_, error)| failed(error))
}

fn publish(temporary: &Path, to: &Path) -> Result<()> {
    let failed = |error| Error::io(format!("publishing {}", to.display()), error);
    File::open(temporary).and_then(|file| file.sync_all()).map_err(failed)?;
    match rustix::fs::renameat_with(CWD, temporary, CWD, to, RenameFlags::NOREPLACE) {
        Ok(()) => {}
        Err(rustix::io::Errno::EXIST) => return Err(exists(to)),
        Err(errno) => return Err(failed(errno.into())),
    }
    let parent = to.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(parent).and_then(|dir| dir.sync_all()).map_err(failed)
}

fn exists(to: &Path) -> Error {
    Error::new(Kind::AlreadyExists, format!("{} is there already", to.display()))
        .hint("backups are never overwritten; give another name")
}
