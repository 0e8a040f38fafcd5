//! Ids. Each is parsed once at a door and trusted after.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::{Error, Kind, Result};

const ALPHABET: &[u8; 36] = b"abcdefghijklmnopqrstuvwxyz0123456789";

fn is_id_char(c: char) -> bool {
    c.is_ascii_lowercase() || c.is_ascii_digit()
}

macro_rules! random_id {
    ($(#[$doc:meta])* $name:ident, $len:literal, $word:literal) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// Characters in it, all of `[a-z0-9]`.
            pub const LEN: usize = $len;

            /// Made of random bytes; each character uses one (bias below 3 %, of no weight in an id).
            #[must_use]
            pub fn from_random(bytes: [u8; $len]) -> Self {
                Self(bytes.iter().map(|byte| char::from(ALPHABET[usize::from(*byte) % ALPHABET.len()])).collect())
            }

            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = Error;

            fn from_str(text: &str) -> Result<Self> {
                if text.len() == $len && text.chars().all(is_id_char) {
                    return Ok(Self(text.to_owned()));
                }
                let shown: String = text.chars().take(40).collect();
                Err(Error::new(Kind::InvalidArgument, format!("{} {shown:?}: must be {} of [a-z0-9]", $word, $len)))
            }
        }

        impl TryFrom<String> for $name {
            type Error = Error;

            fn try_from(text: String) -> Result<Self> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> Self {
                id.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

random_id!(
    /// A VM, for ever: ids are not used again.
    VmId, 16, "VM id"
);
random_id!(
    /// A volume, for ever: its file's name. Names may be used again, ids are not.
    VolumeId, 16, "volume id"
);
random_id!(
    /// An exec, chosen by whoever starts it.
    ExecId, 16, "exec id"
);
random_id!(
    /// One state directory on this host; part of every host name that its server makes.
    InstanceId, 4, "instance id"
);

/// A place on this host for one VM: its number names uid, netns, links and addresses.
/// Relative to the instance's block of slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Slot(pub u32);

impl Slot {
    /// Slots in one instance's block. 32 blocks of 1,024 /31s fill a /16.
    pub const PER_BLOCK: u32 = 1024;
}

impl fmt::Display for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// `sha256:` and 64 hex digits, lower case.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest(String);

impl Digest {
    const PREFIX: &str = "sha256:";

    #[must_use]
    pub fn from_sha256(bytes: &[u8; 32]) -> Self {
        use fmt::Write as _;
        let mut text = Self::PREFIX.to_owned();
        for byte in bytes {
            // Writing to a String cannot fail.
            write!(text, "{byte:02x}").unwrap_or_default();
        }
        Self(text)
    }

    /// The 64 digits.
    #[must_use]
    pub fn hex(&self) -> &str {
        &self.0[Self::PREFIX.len()..]
    }

    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Digest {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let digits = text.strip_prefix(Self::PREFIX).unwrap_or_default();
        if digits.len() == 64 && digits.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
            return Ok(Self(text.to_owned()));
        }
        let shown: String = text.chars().take(80).collect();
        Err(Error::new(Kind::InvalidArgument, format!("digest {shown:?}: must be sha256: and 64 hex digits")))
    }
}

impl TryFrom<String> for Digest {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> Self {
        digest.0
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_round_trip_and_refuse_the_rest() {
        let id = VmId::from_random([7; 16]);
        assert_eq!(id.as_str().parse::<VmId>().unwrap(), id);
        for bad in ["", "short", "UPPERCASEUPPERCA", "../../../../../..", "aaaaaaaaaaaaaaaaa"] {
            assert!(bad.parse::<VmId>().is_err(), "{bad}");
        }
    }

    #[test]
    fn digests_are_strict() {
        let digest = Digest::from_sha256(&[0xab; 32]);
        assert_eq!(digest.hex().len(), 64);
        assert_eq!(digest.as_str().parse::<Digest>().unwrap(), digest);
        assert!("sha256:AB".parse::<Digest>().is_err());
        assert!("md5:00".parse::<Digest>().is_err());
    }
}
