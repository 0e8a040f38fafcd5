//! Which Firecracker it is, what that release can do, and what is known to be wrong with it.

use std::fmt;
use std::str::FromStr;

use clawpot_types::{Error, Kind, Result};

/// Major, minor, patch.
type Numbers = (u16, u16, u16);

/// `major.minor.patch`; a suffix ("-dev", "-dirty") is kept for people and does not count in comparisons.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Version {
    numbers: Numbers,
    suffix: String,
}

/// A published flaw of some releases.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flaw {
    pub name: &'static str,
    pub what: &'static str,
    /// Ranges of affected releases, both ends included.
    affected: &'static [(Numbers, Numbers)],
}

/// Ranges as the advisories give them.
const FLAWS: &[Flaw] = &[
    Flaw {
        name: "CVE-2026-1386",
        what: "the jailer follows a symbolic link while it copies the binary into the jail",
        affected: &[((0, 0, 0), (1, 13, 1)), ((1, 14, 0), (1, 14, 0))],
    },
    Flaw {
        name: "CVE-2026-5747",
        what: "a guest can write out of bounds through virtio-pci",
        affected: &[((1, 13, 0), (1, 14, 3)), ((1, 15, 0), (1, 15, 0))],
    },
];

/// The oldest release that is driven (DESIGN §7): older ones have both flaws above in some form and another jailer.
const OLDEST: Numbers = (1, 15, 1);

impl Version {
    /// The version in what `firecracker --version` or `jailer --version` prints ("Firecracker v1.16.1").
    pub fn from_banner(banner: &str) -> Result<Self> {
        banner
            .split_whitespace()
            .filter_map(|word| word.strip_prefix('v'))
            .find_map(|word| word.parse().ok())
            .ok_or_else(|| unreadable(banner.lines().next().unwrap_or_default()))
    }

    /// `Unsupported` for a release too old to be driven.
    pub fn check(&self) -> Result<()> {
        if self.numbers >= OLDEST {
            return Ok(());
        }
        let (major, minor, patch) = OLDEST;
        let names: Vec<&str> = self.flaws().map(|flaw| flaw.name).collect();
        let flawed = if names.is_empty() { String::new() } else { format!(" and has {}", names.join(", ")) };
        Err(Error::new(Kind::Unsupported, format!("Firecracker {self}: is older than {major}.{minor}.{patch}{flawed}"))
            .hint("install the current release of firecracker and jailer"))
    }

    /// What is known to be wrong with this release.
    pub fn flaws(&self) -> impl Iterator<Item = &'static Flaw> + '_ {
        FLAWS.iter().filter(|flaw| flaw.affected.iter().any(|(from, to)| (*from..=*to).contains(&self.numbers)))
    }

    /// `PUT /serial` takes a rate limiter (1.16.0's change log).
    #[must_use]
    pub fn limits_serial(&self) -> bool {
        self.numbers >= (1, 16, 0)
    }
}

impl FromStr for Version {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let numbers_end = text.find(|c: char| c != '.' && !c.is_ascii_digit()).unwrap_or(text.len());
        let (numbers, suffix) = text.split_at(numbers_end);
        let mut parts = numbers.split('.').map(str::parse::<u16>);
        match (parts.next(), parts.next(), parts.next(), parts.next()) {
            (Some(Ok(major)), Some(Ok(minor)), Some(Ok(patch)), None) => {
                Ok(Self { numbers: (major, minor, patch), suffix: suffix.to_owned() })
            }
            _ => Err(unreadable(text)),
        }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (major, minor, patch) = self.numbers;
        write!(f, "{major}.{minor}.{patch}{}", self.suffix)
    }
}

fn unreadable(text: &str) -> Error {
    let text: String = text.chars().take(80).collect();
    Error::new(Kind::Unsupported, format!("Firecracker's version: {text:?} is not one"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn version(text: &str) -> Version {
        text.parse().expect("a version")
    }

    #[test]
    fn banners_are_read() {
        let banner = "Firecracker v1.16.1\n\nSupported snapshot data format versions: v9.0.0\n";
        assert_eq!(Version::from_banner(banner).unwrap().to_string(), "1.16.1");
        assert_eq!(Version::from_banner("Jailer v1.17.0-dev\n").unwrap().to_string(), "1.17.0-dev");
        for bad in ["", "Firecracker", "Firecracker v1", "Firecracker v1.2.3.4", "v99999.0.0"] {
            assert_eq!(Version::from_banner(bad).unwrap_err().kind(), Kind::Unsupported, "{bad:?}");
        }
    }

    #[test]
    fn flaws_follow_the_advisories() {
        let names = |text: &str| version(text).flaws().map(|flaw| flaw.name).collect::<Vec<_>>();
        assert_eq!(names("1.12.0"), ["CVE-2026-1386"]);
        assert_eq!(names("1.13.1"), ["CVE-2026-1386", "CVE-2026-5747"]);
        assert_eq!(names("1.13.2"), ["CVE-2026-5747"]);
        assert_eq!(names("1.14.0"), ["CVE-2026-1386", "CVE-2026-5747"]);
        assert_eq!(names("1.14.3"), ["CVE-2026-5747"]);
        assert_eq!(names("1.15.0"), ["CVE-2026-5747"]);
        for good in ["1.14.4", "1.15.1", "1.16.1"] {
            assert!(names(good).is_empty(), "{good}");
        }
    }

    #[test]
    fn old_releases_are_refused_with_the_reason() {
        let error = version("1.15.0").check().unwrap_err();
        assert_eq!(error.kind(), Kind::Unsupported);
        assert_eq!(error.to_string(), "Firecracker 1.15.0: is older than 1.15.1 and has CVE-2026-5747");
        assert!(version("1.15.1").check().is_ok());
        assert!(version("1.17.0-dev").check().is_ok());
        assert!(!version("1.15.1").limits_serial());
        assert!(version("1.16.0").limits_serial());
    }
}
