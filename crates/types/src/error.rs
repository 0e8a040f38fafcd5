//! One error for every seam: which thing, doing what, why, and what to do next.

use std::fmt;

use serde::{Deserialize, Serialize};

pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What kind of failure it is; the API's status and the CLI's exit code follow from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// The request can never succeed as it is.
    InvalidArgument,
    NotFound,
    AlreadyExists,
    /// Someone else changed it meanwhile.
    Conflict,
    /// Not in this phase, or not on this host as it is.
    FailedPrecondition,
    /// A resource is used up: memory, disk, slots.
    Exhausted,
    /// The other side does not answer; it may later.
    Unavailable,
    /// This driver or host cannot do it.
    Unsupported,
    Timeout,
    /// Data that does not read back as what was written.
    Corrupt,
    PermissionDenied,
    Cancelled,
    /// Asking below what is still kept; list again.
    Compacted,
    /// A defect, or the host said something unforeseen.
    Internal,
}

/// Whether repeating the same request can help.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Retry {
    Never,
    /// After a while, unchanged.
    Later,
    /// After what the hint says.
    AfterFix,
}

/// `what` says which thing and doing what; the chain of `source`s says why; `hint` says what to do next.
#[derive(Debug)]
pub struct Error {
    kind: Kind,
    what: String,
    hint: Option<String>,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
    cleanup: Option<Box<Error>>,
}

impl Error {
    /// `what`: which thing, doing what — "VM web: creating its disk".
    pub fn new(kind: Kind, what: impl Into<String>) -> Self {
        Self { kind, what: what.into(), hint: None, source: None, cleanup: None }
    }

    /// The cause. Not repeated in `what`: the chain is printed in one place.
    #[must_use]
    pub fn because(mut self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// What the reader can do next, as a sentence or a command.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// A clean-up that failed too, kept beside the cause.
    #[must_use]
    pub fn and_cleanup(mut self, failed: Self) -> Self {
        self.cleanup = Some(Box::new(failed));
        self
    }

    /// The same failure seen from one level up.
    #[must_use]
    pub fn context(self, what: impl Into<String>) -> Self {
        Self {
            kind: self.kind,
            what: what.into(),
            hint: self.hint.clone(),
            cleanup: None,
            source: Some(Box::new(self)),
        }
    }

    /// An I/O error while `what`; its kind follows from the errno where that tells something.
    pub fn io(what: impl Into<String>, source: std::io::Error) -> Self {
        use std::io::ErrorKind as Io;
        let kind = match source.kind() {
            Io::NotFound => Kind::NotFound,
            Io::PermissionDenied => Kind::PermissionDenied,
            Io::AlreadyExists => Kind::AlreadyExists,
            Io::StorageFull | Io::QuotaExceeded | Io::OutOfMemory => Kind::Exhausted,
            Io::TimedOut => Kind::Timeout,
            Io::ConnectionRefused | Io::ConnectionReset | Io::BrokenPipe | Io::UnexpectedEof => Kind::Unavailable,
            _ => Kind::Internal,
        };
        Self::new(kind, what).because(source)
    }

    #[must_use]
    pub fn kind(&self) -> Kind {
        self.kind
    }

    #[must_use]
    pub fn what(&self) -> &str {
        &self.what
    }

    /// The nearest hint of the chain.
    #[must_use]
    pub fn next_step(&self) -> Option<&str> {
        self.hint.as_deref()
    }

    #[must_use]
    pub fn cleanup(&self) -> Option<&Self> {
        self.cleanup.as_deref()
    }

    #[must_use]
    pub fn retry(&self) -> Retry {
        match self.kind {
            Kind::Conflict | Kind::Unavailable | Kind::Timeout | Kind::Cancelled => Retry::Later,
            Kind::Exhausted | Kind::FailedPrecondition | Kind::Compacted => Retry::AfterFix,
            _ if self.hint.is_some() => Retry::AfterFix,
            _ => Retry::Never,
        }
    }

    /// `what: cause: cause …`, for one line of a log or a record.
    #[must_use]
    pub fn chain(&self) -> String {
        let mut text = self.to_string();
        let mut next = std::error::Error::source(self);
        while let Some(cause) = next {
            text.push_str(": ");
            text.push_str(&cause.to_string());
            next = cause.source();
        }
        text
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_deref().map(|source| source as &(dyn std::error::Error + 'static))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_chain_names_each_level_once() {
        let io = std::io::Error::new(std::io::ErrorKind::StorageFull, "no space left");
        let error = Error::io("writing /disks/a", io).hint("free some disk").context("VM web: creating its disk");
        assert_eq!(error.chain(), "VM web: creating its disk: writing /disks/a: no space left");
        assert_eq!(error.kind(), Kind::Exhausted);
        assert_eq!(error.next_step(), Some("free some disk"));
        assert_eq!(error.retry(), Retry::AfterFix);
    }
}
