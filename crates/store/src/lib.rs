//! The embedded state store: SQLite in WAL mode, one file for records and events (DESIGN §10).
//!
//! ```text
//! txn, append ──► queue (bounded) ──► writer (one thread; group commit) ──► state.db
//!                                        └─► hub ──► watchers
//! get, list   ──► readers (own connections, never wait for the writer)
//! ```
//! - [`lock`] one server per state directory
//! - [`store`] the front: [`SqliteStore`] implements `StateStore` and `EventLog`
//! - `queue`, `writer`, `apply`, `hub`, `readers`, `rows` the way of a write and of a read
//! - `schema` tables, versions, migrations; `ballast` room to delete on a full disk
//! - [`mod@backup`] an online copy
//!
//! Architecture Invariant: the writer's thread alone writes the database, and a change is published only once it is committed.

mod apply;
pub mod backup;
mod ballast;
mod error;
mod hub;
pub mod lock;
mod queue;
mod readers;
mod rows;
mod schema;
pub mod store;
mod writer;

pub use backup::backup;
pub use lock::StateLock;
pub use store::{Options, SqliteStore};
