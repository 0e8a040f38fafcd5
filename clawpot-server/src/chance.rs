//! The clock, and randomness for what nobody named.

use std::time::{SystemTime, UNIX_EPOCH};

use clawpot_core::ports::{Clock, Ids};
use clawpot_types::{Timestamp, VmId, VmName, VolumeId};

#[derive(Debug)]
pub struct WallClock;

impl Clock for WallClock {
    fn now(&self) -> Timestamp {
        // A clock before 1970 reads as 1970.
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Timestamp(u64::try_from(since.as_micros()).unwrap_or(u64::MAX))
    }
}

#[derive(Debug)]
pub struct RandomIds;

/// Bytes of the kernel's generator.
pub fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    let mut filled = 0;
    while filled < N {
        match rustix::rand::getrandom(&mut bytes[filled..], rustix::rand::GetRandomFlags::empty()) {
            Ok(count) => filled += count,
            Err(rustix::io::Errno::INTR) => {}
            // Cannot fail once the kernel's pool is seeded; an id without randomness must not be made.
            Err(error) => panic!("getrandom: {error}"),
        }
    }
    bytes
}

const FIRST: [&str; 24] = [
    "amber", "brave", "brisk", "calm", "clear", "copper", "crisp", "eager", "fair", "gentle", "golden", "happy",
    "keen", "light", "lucky", "mellow", "noble", "proud", "quick", "quiet", "rapid", "silver", "sunny", "swift",
];
const SECOND: [&str; 24] = [
    "badger", "beaver", "crab", "crane", "dove", "falcon", "finch", "fox", "hare", "heron", "ibis", "lark", "lynx",
    "marten", "otter", "owl", "panda", "raven", "robin", "seal", "stork", "swan", "tern", "wren",
];

impl Ids for RandomIds {
    fn vm_id(&self) -> VmId {
        VmId::from_random(random())
    }

    fn volume_id(&self) -> VolumeId {
        VolumeId::from_random(random())
    }

    fn vm_name(&self) -> VmName {
        let [first, second, a, b] = random::<4>();
        let pick = |words: &[&'static str], byte: u8| words[usize::from(byte) % words.len()];
        let number = u16::from_be_bytes([a, b]) % 10_000;
        let name = format!("{}-{}-{number:04}", pick(&FIRST, first), pick(&SECOND, second));
        // Words of letters with digits at the end are a name.
        name.parse().unwrap_or_else(|error| panic!("{name}: {error}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chosen_names_are_names() {
        for first in FIRST {
            for second in SECOND {
                assert!(format!("{first}-{second}-0000").parse::<VmName>().is_ok());
            }
        }
    }
}
