//! The doors: proto ⇄ domain, one file per service. Wire types stop here.
//!
//! - [`vm`] · [`event`] · [`host`] · [`image`] · [`build`] · [`volume`] the services · [`exec`] frames · [`convert`] records as
//!   messages
//! - [`validate`] forms are checked with the field's path in every error · [`status`] one table from errors to statuses
//! - [`access`] who may call what · [`guard`] stands before all of them · [`meter`] counts what comes in

pub mod access;
pub mod build;
pub mod convert;
pub mod event;
pub mod exec;
pub mod guard;
pub mod host;
pub mod image;
mod meter;
pub mod status;
pub mod validate;
pub mod vm;
pub mod volume;

#[cfg(test)]
mod fuzz_corpus;
