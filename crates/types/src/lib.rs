//! The words everyone shares: ids, units, names, error kinds and the constants of the guest's view. serde only.
//!
//! - [`id`] who a thing is: [`VmId`], [`InstanceId`], [`VolumeId`], [`ExecId`], [`Slot`], [`Digest`]
//! - [`name`] what people call it: [`VmName`], [`VolumeName`], [`Label`], [`ImageRef`]
//! - [`path`] where it is inside a guest: [`GuestPath`]
//! - [`unit`] how much of it: [`MiB`], [`Vcpus`], [`Millis`], [`Timestamp`]
//! - [`counter`] which one of its lives: [`Revision`], [`Generation`], [`Incarnation`]
//! - [`error`] what went wrong and what to do next: [`Error`], [`Kind`], [`Retry`]
//! - [`guest`] what every guest sees of its machine, the same in each
//! - [`ext4`] what a file system says of itself; [`release`] which Firecracker beside the images is the newest

pub mod counter;
pub mod error;
pub mod ext4;
pub mod guest;
pub mod id;
pub mod name;
pub mod path;
pub mod release;
pub mod unit;

pub use counter::{Generation, Incarnation, Revision};
pub use error::{Error, Kind, Result, Retry};
pub use id::{Digest, ExecId, InstanceId, Slot, VmId, VolumeId};
pub use name::{ImageRef, Label, VmName, VolumeName};
pub use path::GuestPath;
pub use unit::{MiB, Millis, Timestamp, Vcpus};
