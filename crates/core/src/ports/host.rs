use clawpot_types::{Timestamp, VmId, VmName};

/// The wall clock.
pub trait Clock: Send + Sync {
    fn now(&self) -> Timestamp;
}

/// Randomness for names that nobody chose.
pub trait Ids: Send + Sync {
    fn vm_id(&self) -> VmId;
    /// A name that is easy to say; may clash, then ask again.
    fn vm_name(&self) -> VmName;
}
