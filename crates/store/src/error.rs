//! SQLite's errors in our words.

use clawpot_types::{Error, Kind};
use rusqlite::ErrorCode;
use rusqlite::ffi;

const FREE_SPACE: &str =
    "free some space on the state directory's filesystem; VMs can still be deleted, with what was held back for that";
const RESTORE: &str = "stop the server and put a backup back (clawpot-server backup makes them)";

/// What `what` means to the caller. Keeps SQLite's own text as the cause.
pub(crate) fn sql(what: impl Into<String>, source: rusqlite::Error) -> Error {
    let (kind, hint) = classify(&source);
    let error = Error::new(kind, what).because(source);
    match hint {
        Some(hint) => error.hint(hint),
        None => error,
    }
}

fn classify(source: &rusqlite::Error) -> (Kind, Option<&'static str>) {
    let Some(failure) = source.sqlite_error() else {
        return (Kind::Corrupt, Some(RESTORE));
    };
    match failure.code {
        ErrorCode::DiskFull => (Kind::Exhausted, Some(FREE_SPACE)),
        // The shared memory of the WAL could not grow: a full disk by another name.
        ErrorCode::SystemIoFailure if failure.extended_code == ffi::SQLITE_IOERR_SHMSIZE => {
            (Kind::Exhausted, Some(FREE_SPACE))
        }
        ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase => (Kind::Corrupt, Some(RESTORE)),
        ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked => {
            (Kind::Unavailable, Some("another process holds the database, perhaps a sqlite3 shell; end it"))
        }
        ErrorCode::PermissionDenied | ErrorCode::ReadOnly | ErrorCode::CannotOpen => {
            (Kind::PermissionDenied, Some("the server's user must be able to write the state directory"))
        }
        ErrorCode::OutOfMemory => (Kind::Exhausted, None),
        _ => (Kind::Internal, None),
    }
}

/// The store is going away; nothing was done.
pub(crate) fn closed() -> Error {
    Error::new(Kind::Unavailable, "state store: it is closed")
}

/// A counter as SQLite keeps it.
pub(crate) fn to_sql(number: u64) -> Result<i64, Error> {
    i64::try_from(number).map_err(|error| {
        Error::new(Kind::InvalidArgument, format!("state store: {number} is above 2^63-1")).because(error)
    })
}

/// A counter as SQLite kept it. None of ours is negative.
pub(crate) fn from_sql(number: i64) -> Result<u64, Error> {
    u64::try_from(number)
        .map_err(|error| Error::new(Kind::Corrupt, format!("state store: counter {number}")).because(error))
}
