//! Names that people choose.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::{Digest, Error, Kind, Result};

fn shown(text: &str) -> String {
    let mut head: String = text.chars().take(40).collect();
    if text.chars().count() > 40 {
        head.push('…');
    }
    head
}

/// A VM's name: a DNS label (RFC 1035), since it is the guest's hostname too. Unique on its host.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct VmName(String);

impl VmName {
    /// Longest name, characters (a DNS label).
    pub const MAX: usize = 63;

    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for VmName {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let fits = text.len() <= Self::MAX
            && text.starts_with(|c: char| c.is_ascii_lowercase())
            && !text.ends_with('-')
            && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
        if fits {
            return Ok(Self(text.to_owned()));
        }
        Err(Error::new(
            Kind::InvalidArgument,
            format!(
                "name {:?} ({} characters): must be 1 to 63 of [a-z0-9-], start with a letter and not end with '-'",
                shown(text),
                text.chars().count()
            ),
        ))
    }
}

/// A volume's name: 1 to 63 of `[a-z0-9._-]`, a letter or digit first. Unique in its server.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct VolumeName(String);

impl VolumeName {
    /// Longest name, characters.
    pub const MAX: usize = 63;

    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for VolumeName {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let is_alphanumeric = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
        let fits = text.len() <= Self::MAX
            && text.bytes().next().is_some_and(is_alphanumeric)
            && text.bytes().all(|b| is_alphanumeric(b) || b"._-".contains(&b));
        if fits {
            return Ok(Self(text.to_owned()));
        }
        Err(Error::new(
            Kind::InvalidArgument,
            format!("volume {:?}: must be 1 to 63 of [a-z0-9._-] and start with a letter or digit", shown(text)),
        ))
    }
}

/// A label's key or value: at most 128 printable ASCII characters without `=` and `,`; a key is not empty.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Label(String);

impl Label {
    pub const MAX: usize = 128;
    /// Labels on one VM.
    pub const MAX_COUNT: usize = 64;

    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Label {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        if text.len() <= Self::MAX && text.bytes().all(|b| matches!(b, b' '..=b'~') && b != b'=' && b != b',') {
            return Ok(Self(text.to_owned()));
        }
        Err(Error::new(
            Kind::InvalidArgument,
            format!("label {:?}: must be at most 128 printable ASCII characters without '=' and ','", shown(text)),
        ))
    }
}

/// An image: its name, or the digest of its manifest.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum ImageRef {
    Name(String),
    Digest(Digest),
}

impl ImageRef {
    /// Longest name, bytes: with every `/` escaped it is still a file name.
    pub const MAX: usize = 200;
}

impl FromStr for ImageRef {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        if text.starts_with("sha256:") {
            return text.parse().map(Self::Digest);
        }
        // As a registry's references, and as short ones: `debian`, `localhost:5000/team/app:1.2-RC1`.
        let part = |part: &str| {
            part.starts_with(|c: char| c.is_ascii_alphanumeric())
                && part.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-' | b':'))
        };
        if (1..=Self::MAX).contains(&text.len()) && text.split('/').all(part) {
            return Ok(Self::Name(text.to_owned()));
        }
        Err(Error::new(
            Kind::InvalidArgument,
            format!(
                "image {:?}: must be 1 to 200 of [A-Za-z0-9._:/-], each part starting with a letter or digit",
                shown(text)
            ),
        ))
    }
}

impl fmt::Display for ImageRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name(name) => f.write_str(name),
            Self::Digest(digest) => digest.fmt(f),
        }
    }
}

macro_rules! string_like {
    ($($name:ident),*) => {$(
        impl TryFrom<String> for $name {
            type Error = Error;

            fn try_from(text: String) -> Result<Self> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> Self {
                name.to_string()
            }
        }
    )*};
}
string_like!(VmName, VolumeName, Label, ImageRef);

impl fmt::Display for VmName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for VolumeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_hostnames() {
        for good in ["a", "web-1", &"a".repeat(63)] {
            assert!(good.parse::<VmName>().is_ok(), "{good}");
        }
        for bad in ["", "1a", "a/b", "A", "a_b", "a-", "-a", "ä", "a b", &"a".repeat(64), &"a".repeat(300)] {
            assert!(bad.parse::<VmName>().is_err(), "{bad}");
        }
        let long = "b".repeat(300).parse::<VmName>().unwrap_err().to_string();
        assert!(long.contains("(300 characters)") && long.len() < 250, "{long}");
    }

    #[test]
    fn volume_names_are_plain() {
        for good in ["a", "1", "db.main_2-old", &"a".repeat(63)] {
            assert!(good.parse::<VolumeName>().is_ok(), "{good}");
        }
        for bad in ["", ".a", "-a", "A", "a/b", "a:b", "a b", "ä", &"a".repeat(64)] {
            assert!(bad.parse::<VolumeName>().is_err(), "{bad}");
        }
    }

    #[test]
    fn image_names_are_references() {
        for good in ["debian", "a/b", "localhost:5000/team/app:1.2-RC1"] {
            assert!(good.parse::<ImageRef>().is_ok(), "{good}");
        }
        for bad in ["", ".", "../etc", "a/../b", "a//b", "/a", "a/", "sha256:12", "-x", "a b", "a@b", "a%2fb"] {
            assert!(bad.parse::<ImageRef>().is_err(), "{bad}");
        }
    }
}
