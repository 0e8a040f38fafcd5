//! Firecracker, the product's VMM (DESIGN §7): always inside its jailer, told by its API, reached by its vsock.
//!
//! - [`driver`] the [`clawpot_core::ports::Vmm`] port, on top of what both drivers share ([`crate::jail`])
//! - [`jailer`] the command line that puts it into chroot, netns and uid
//! - [`libs`] its programs, kept under one name; what a dynamic build needs in the chroot; [`elf`] whether it is one
//! - [`boot`] from a process to a running guest, also where another daemon left off
//! - [`api`] requests and answers; [`client`] how they travel; [`version`] what a release can, and what is wrong with it
//! - [`probe`] whether guests run on this host at all

mod api;
mod boot;
mod client;
mod driver;
mod elf;
mod jailer;
mod libs;
mod probe;
mod version;

pub use driver::{Config, Firecracker};
pub use probe::Probed;
pub use version::{Flaw, Version};
