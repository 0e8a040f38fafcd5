//! Units. Conversions are checked: 4096 MiB is never 0 bytes.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::{Error, Kind, Result};

/// Mebibytes of memory or disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct MiB(pub u64);

impl MiB {
    /// Bytes, or `None` where they do not fit 64 bits.
    #[must_use]
    pub const fn bytes(self) -> Option<u64> {
        self.0.checked_mul(1 << 20)
    }

    /// Whole mebibytes in `bytes`, rounded down.
    #[must_use]
    pub const fn from_bytes(bytes: u64) -> Self {
        Self(bytes >> 20)
    }
}

impl MiB {
    /// Memory that one VM may have, MiB: below 64 no kernel with its initramfs starts; above 1 TiB is a slip of the pen.
    pub const MEMORY: std::ops::RangeInclusive<u64> = 64..=1 << 20;
    /// Writable disk that one VM may have, MiB: up to 4 TiB, the disk is sparse.
    pub const DISK: std::ops::RangeInclusive<u64> = 64..=4 << 20;

    /// As a VM's memory, checked. The client and the server refuse with the same words.
    pub fn memory(mib: u64) -> Result<Self> {
        Self::within(mib, &Self::MEMORY, "memory")
    }

    /// As a VM's disk, checked.
    pub fn disk(mib: u64) -> Result<Self> {
        Self::within(mib, &Self::DISK, "disk")
    }

    fn within(mib: u64, range: &std::ops::RangeInclusive<u64>, what: &str) -> Result<Self> {
        if range.contains(&mib) {
            return Ok(Self(mib));
        }
        let (least, most) = (range.start(), range.end());
        Err(Error::new(Kind::InvalidArgument, format!("{what} {mib} MiB: must be {least} to {most} MiB")))
    }
}

impl fmt::Display for MiB {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} MiB", self.0)
    }
}

/// Number of virtual CPUs: 1 to 32 (Firecracker's limit, `MAX_SUPPORTED_VCPUS` in its source).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub struct Vcpus(u8);

impl Vcpus {
    pub const MAX: u32 = 32;
    pub const ONE: Self = Self(1);

    #[must_use]
    pub const fn get(self) -> u8 {
        self.0
    }
}

impl TryFrom<u32> for Vcpus {
    type Error = Error;

    fn try_from(count: u32) -> Result<Self> {
        match u8::try_from(count) {
            Ok(small) if (1..=Self::MAX).contains(&count) => Ok(Self(small)),
            _ => Err(Error::new(Kind::InvalidArgument, format!("{count} vCPUs: must be 1 to {}", Self::MAX))),
        }
    }
}

impl From<Vcpus> for u32 {
    fn from(count: Vcpus) -> Self {
        count.0.into()
    }
}

/// A duration in whole milliseconds, as records keep it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Millis(pub u64);

impl From<Millis> for Duration {
    fn from(millis: Millis) -> Self {
        Self::from_millis(millis.0)
    }
}

/// Microseconds since the Unix epoch on the host's wall clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Timestamp(pub u64);

impl Timestamp {
    /// How long after `earlier`; zero when the clock went back.
    #[must_use]
    pub const fn since(self, earlier: Self) -> Duration {
        Duration::from_micros(self.0.saturating_sub(earlier.0))
    }

    /// `self` + `duration`, at most the end of time.
    #[must_use]
    pub fn after(self, duration: Duration) -> Self {
        Self(self.0.saturating_add(u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn four_gib_is_not_zero() {
        assert_eq!(MiB(4096).bytes(), Some(4 << 30));
        assert_eq!(MiB(1 << 50).bytes(), None);
    }

    #[test]
    fn memory_and_disk_are_checked() {
        assert_eq!(MiB::memory(64).unwrap(), MiB(64));
        assert_eq!(MiB::disk(4_194_304).unwrap().to_string(), "4194304 MiB");
        assert_eq!(MiB::memory(1).unwrap_err().to_string(), "memory 1 MiB: must be 64 to 1048576 MiB");
        for bad in [0, 63, 1_048_577, 1 << 32, u64::MAX] {
            assert!(MiB::memory(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn vcpus_are_checked() {
        for bad in [0, 33, 257, u32::MAX] {
            assert!(Vcpus::try_from(bad).unwrap_err().to_string().contains("must be 1 to 32"));
        }
        assert_eq!(Vcpus::try_from(32).unwrap().get(), 32);
        assert!(serde_json::from_str::<Vcpus>("0").is_err());
    }
}
