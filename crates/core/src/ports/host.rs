use async_trait::async_trait;
use clawpot_types::{Result, Timestamp, VmId, VmName, VolumeId};

use crate::admission::Room;

/// The wall clock.
pub trait Clock: Send + Sync {
    fn now(&self) -> Timestamp;
}

/// Randomness for names that nobody chose.
pub trait Ids: Send + Sync {
    fn vm_id(&self) -> VmId;
    fn volume_id(&self) -> VolumeId;
    /// A name that is easy to say; may clash, then ask again.
    fn vm_name(&self) -> VmName;
}

/// What the host has.
#[async_trait]
pub trait HostRoom: Send + Sync {
    /// A few system calls; as it is now.
    async fn look(&self) -> Result<Room>;
}
