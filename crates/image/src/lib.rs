//! Images and disks on this host.
//!
//! - [`LocalImages`] the `Images` port: what the server is given
//! - [`manifest`] what the image store's files say (format: `assets/README.md`)
//! - [`store`] where they are; names and digests to manifests
//! - [`verify`] files are what their digest says; each is read once, not once a VM
//! - [`disks`] VMs' writable disks, cloned from a formatted template
//!
//! The image store is read here and written by `scripts/`. The state directory gets `disks/`, `templates/` and
//! `verified.json`. Nothing here knows of VMMs, networks or records.

pub mod disks;
mod driver;
pub mod manifest;
pub mod store;
pub mod verify;

pub use driver::{Kernel, LocalImages};
