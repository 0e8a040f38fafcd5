//! THE STUDY: every decision, and nothing else. No I/O, no runtime, no clock, no randomness.
//!
//! - [`phase`] the states a VM can be in, drawn; [`request`] which request is accepted in which of them
//! - [`record`] what is written down of a VM before anything of it exists
//! - [`facts`] what a look at the host tells; [`mod@plan`] record × facts → the one next step
//! - [`admission`] what may be taken in beside what is there
//! - [`exit`] how a run ended, and what follows from it
//! - [`exec`] frames between a caller and a process in a guest
//! - [`event`] what happened, for people
//! - [`volume`] disks that outlive VMs, and who may have them
//! - [`ports`] the traits that drivers implement

pub mod admission;
pub mod event;
pub mod exec;
pub mod exit;
pub mod facts;
pub mod phase;
pub mod plan;
pub mod ports;
pub mod record;
pub mod request;
pub mod slot;
pub mod volume;

pub use exit::{Exit, Reason, Restart, RestartPolicy};
pub use facts::{Fact, Facts, GuestFact, LastWords, VmmEnd, VmmFact};
pub use phase::Phase;
pub use plan::{Next, Step, plan};
pub use record::{
    Desired, DiskSource, ExtraDisk, Failure, ImagePin, MachineId, Quarantine, Reach, Timing, VmRecord, VmSpec, VmmKind,
};
