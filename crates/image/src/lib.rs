//! Images and disks on this host.
//!
//! - [`LocalImages`] the `Images` port: what the server is given
//! - [`Library`] the `ImageLibrary` port: pull, import, export, tag, collect; its rooms are in `library/`
//! - [`manifest`] what the image store's files say (format: `assets/README.md`); [`oci`] what others' say
//! - [`store`] where they are, names and digests to manifests; [`write`] changes to it; [`gc`] mark and sweep
//! - [`refs`] who uses what, across processes; [`lock`] locks between them
//! - [`build`] layers to a file system, by way of [`unpack`], a process of its own: `clawpot-unpack`
//! - `owners` users of the host that such a process becomes
//! - [`Bench`] the `Workbench` port: images that are built of flakes
//! - [`kernel`] can it be started, and does it do there what a guest needs?
//! - [`verify`] files are what their digest says; each is read once, not once a VM
//! - [`LocalVolumes`] the `Volumes` port: disks that outlive VMs
//! - [`disks`] VMs' writable disks, cloned from a formatted template
//!
//! The image store is shared by servers and written by `scripts/` too. The state directory gets `disks/`, `templates/` and
//! `verified.json`. Nothing here knows of VMMs, networks or records.

pub mod build;
pub mod disks;
mod driver;
mod flake;
pub mod gc;
pub mod kernel;
mod library;
pub mod lock;
pub mod manifest;
pub mod oci;
mod owners;
pub mod refs;
pub mod store;
pub mod unpack;
pub mod verify;
mod volumes;
pub mod write;

pub use driver::{Kernel, LocalImages};
pub use flake::Bench;
pub use library::{Library, Room};
pub use volumes::LocalVolumes;
