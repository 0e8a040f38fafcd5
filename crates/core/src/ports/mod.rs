//! The traits that drivers implement. Object-safe; `app.rs` alone names a driver.
//!
//! On every method: effects are idempotent, a dropped future leaves at most what the next call of the same method finds
//! and completes, and a driver that cannot do a thing returns `Kind::Unsupported`, never `Ok(())`.

mod build;
mod guest;
mod host;
mod images;
mod net;
mod store;
mod vmm;
mod volumes;

pub use build::{
    BuildName, BuildOrder, BuilderGuest, BuilderSays, FlakeSource, LARGEST_SOURCE, LaidOut, Revision, Source, Workbench,
};
pub use guest::{Guest, GuestEndpoint, Hello};
pub use host::{Clock, HostRoom, Ids};
pub use images::{
    BootFiles, Collect, Collected, Credentials, Garbage, ImageConfig, ImageDetail, ImageInfo, ImageLibrary,
    ImageProgress, ImageSource, ImageStep, Images, Import, MachineDefaults, Pull, UnreadableImage,
};
pub use net::{Net, Seat};
pub use store::{
    Change, Durability, Entry, EventLog, Expect, Guard, Listing, Op, StateStore, Txn, TxnOutcome, Unreadable,
};
pub use vmm::{Capabilities, Console, DiskFile, Machine, Vmm};
pub use volumes::{Check, Copied, VolumeFile, Volumes};

use std::pin::Pin;

/// A stream behind a port.
pub type BoxStream<T> = Pin<Box<dyn futures_core::Stream<Item = T> + Send>>;
