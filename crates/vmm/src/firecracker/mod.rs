//! Firecracker (wip)
mod api;
mod client;
mod elf;
mod jailer;
mod libs;
mod version;
