//! The words of the command line, each checked as the server would check it, before anything is sent.

pub mod env;
pub mod labels;
pub mod process;
pub mod size;
pub mod time;
pub mod vm;
pub mod volume;

pub use process::ProcessArgs;
pub use vm::VmArgs;
