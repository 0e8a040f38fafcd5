//! One exhaustive table from error kinds to gRPC codes; the chain and the hint travel with it.

use clawpot_types::{Error, Kind};
use tonic::metadata::MetadataValue;
use tonic::{Code, Status};

use crate::limits;

/// Metadata keys of a failed call: what to do next, and whether repeating may help ("never", "later", "after-fix").
pub const HINT: &str = "clawpot-hint";
pub const RETRY: &str = "clawpot-retry";

#[must_use]
pub const fn code(kind: Kind) -> Code {
    match kind {
        Kind::InvalidArgument => Code::InvalidArgument,
        Kind::NotFound => Code::NotFound,
        Kind::AlreadyExists => Code::AlreadyExists,
        Kind::Conflict => Code::Aborted,
        Kind::FailedPrecondition => Code::FailedPrecondition,
        Kind::Exhausted => Code::ResourceExhausted,
        Kind::Unavailable => Code::Unavailable,
        Kind::Unsupported => Code::Unimplemented,
        Kind::Timeout => Code::DeadlineExceeded,
        Kind::Corrupt => Code::DataLoss,
        Kind::PermissionDenied => Code::PermissionDenied,
        Kind::Cancelled => Code::Cancelled,
        Kind::Compacted => Code::OutOfRange,
        Kind::Internal => Code::Internal,
    }
}

/// After what was cut short.
const CUT: &str = " […]";

/// First line: which thing, doing what; each further line a cause.
#[must_use]
#[allow(clippy::needless_pass_by_value, reason = "made for map_err")]
pub fn status(error: Error) -> Status {
    let mut message = error.what().to_owned();
    let mut cause = std::error::Error::source(&error);
    while let Some(next) = cause {
        message.push('\n');
        message.push_str(&next.to_string());
        cause = next.source();
    }
    if let Some(cleanup) = error.cleanup() {
        message.push_str("\nand cleaning up failed: ");
        message.push_str(&cleanup.chain());
    }
    if message.len() > limits::ERROR_BYTES {
        message.truncate(message.floor_char_boundary(limits::ERROR_BYTES - CUT.len()));
        message.push_str(CUT);
    }
    let mut status = Status::new(code(error.kind()), message);
    if let Some(hint) = error.next_step() {
        put(&mut status, HINT, hint);
    }
    let retry = match error.retry() {
        clawpot_types::Retry::Never => "never",
        clawpot_types::Retry::Later => "later",
        clawpot_types::Retry::AfterFix => "after-fix",
    };
    put(&mut status, RETRY, retry);
    status
}

/// Metadata is ASCII: other bytes and `%` are percent-encoded.
fn put(status: &mut Status, key: &'static str, value: &str) {
    let mut text = String::with_capacity(value.len());
    for byte in value.bytes() {
        if matches!(byte, b' '..=b'~') && byte != b'%' {
            text.push(char::from(byte));
        } else {
            text.push_str(&format!("%{byte:02X}"));
        }
    }
    if let Ok(value) = MetadataValue::try_from(text) {
        status.metadata_mut().insert(key, value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn causes_are_lines_and_hints_are_metadata() {
        let io = std::io::Error::new(std::io::ErrorKind::StorageFull, "no space left on device");
        let status = status(Error::io("writing it", io).hint("free 10 % – now").context("VM web: creating its disk"));
        assert_eq!(status.code(), Code::ResourceExhausted);
        assert_eq!(status.message(), "VM web: creating its disk\nwriting it\nno space left on device");
        assert_eq!(status.metadata().get(HINT).unwrap(), "free 10 %25 %E2%80%93 now");
        assert_eq!(status.metadata().get(RETRY).unwrap(), "after-fix");
    }

    #[test]
    fn an_error_is_no_longer_than_a_header_may_be() {
        let long = status(Error::new(Kind::Internal, "ü".repeat(limits::ERROR_BYTES)));
        assert!(long.message().len() <= limits::ERROR_BYTES && long.message().ends_with("ü […]"));
    }
}
