//! VMM drivers (DESIGN §7): each implements [`clawpot_core::ports::Vmm`], both run their VMM the same way.
//!
//! - [`qemu`] where there is no usable hardware virtualisation; [`firecracker`] the product
//! - [`jail`] what they share: a machine's directory, cgroup, process and end
//! - [`console`] the FIFO that a VMM prints to, drained into bounded logs; implements [`clawpot_core::ports::Console`]
//! - [`relay`] a VM's `CONNECT` socket where its VMM serves none
//! - [`cmdline`] the kernel's command line
//! - [`probe`] which of the two this host can run
//!
//! Called by the server's composition root; calls `clawpot-host` for every process, file and group.

pub mod cmdline;
pub mod console;
pub mod firecracker;
pub mod jail;
pub mod probe;
pub mod qemu;
pub mod relay;
