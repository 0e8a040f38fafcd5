//! Connections that only read. In WAL mode they neither wait for the writer nor hold it up.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use clawpot_types::{Error, Kind, Result};
use rusqlite::{Connection, OpenFlags};
use tokio::sync::Semaphore;

use crate::{error, schema};

/// Reads at a time; whoever comes later waits.
const CONNECTIONS: usize = 4;

pub(crate) struct Readers {
    path: PathBuf,
    free: Arc<Semaphore>,
    idle: Mutex<Vec<Connection>>,
}

impl Readers {
    /// Opens the first connection, so that what is wrong is said at the start.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let first = connect(path)?;
        Ok(Self { path: path.to_owned(), free: Arc::new(Semaphore::new(CONNECTIONS)), idle: Mutex::new(vec![first]) })
    }

    /// Runs `read` on a thread that may block.
    pub(crate) async fn with<T: Send + 'static>(
        self: &Arc<Self>,
        read: impl FnOnce(&Connection) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let permit = Arc::clone(&self.free).acquire_owned().await.map_err(|_| error::closed())?;
        let this = Arc::clone(self);
        let done = tokio::task::spawn_blocking(move || {
            // Kept until the read has ended, also when nobody waits for it any more.
            let _permit = permit;
            let idle = this.idle().pop();
            let conn = match idle {
                Some(conn) => conn,
                None => connect(&this.path)?,
            };
            let result = read(&conn);
            this.idle().push(conn);
            result
        });
        done.await.map_err(|error| Error::new(Kind::Internal, "state store: reading").because(error))?
    }

    fn idle(&self) -> std::sync::MutexGuard<'_, Vec<Connection>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn connect(path: &Path) -> Result<Connection> {
    let conn = schema::connect(path, OpenFlags::SQLITE_OPEN_READ_WRITE)?;
    // Not opened read-only: a reader of a WAL must be able to write its index (-shm).
    conn.execute_batch("PRAGMA query_only = ON").map_err(|error| error::sql("state store: opening", error))?;
    Ok(conn)
}
