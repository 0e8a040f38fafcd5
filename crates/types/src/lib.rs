//! The words everyone shares: ids, units, names, error kinds and the constants of the guest's view. serde only.
//!
//! - [`id`] who a thing is: [`VmId`], [`InstanceId`], [`ExecId`], [`Slot`], [`Digest`]
//! - [`name`] what people call it: [`VmName`], [`Label`], [`ImageRef`]
//! - [`unit`] how much of it: [`MiB`], [`Vcpus`], [`Millis`], [`Timestamp`]
//! - [`counter`] which one of its lives: [`Revision`], [`Generation`], [`Incarnation`]
//! - [`error`] what went wrong and what to do next: [`Error`], [`Kind`], [`Retry`]
//! - [`guest`] what every guest sees of its machine, the same in each

pub mod counter;
pub mod error;
pub mod guest;
pub mod id;
pub mod name;
pub mod unit;

pub use counter::{Generation, Incarnation, Revision};
pub use error::{Error, Kind, Result, Retry};
pub use id::{Digest, ExecId, InstanceId, Slot, VmId};
pub use name::{ImageRef, Label, VmName};
pub use unit::{MiB, Millis, Timestamp, Vcpus};
