//! The serial console: all that is seen of a machine that the host cannot talk to.

use std::error::Error;
use std::fmt::{Display, Write as _};

/// One line. A console that takes nothing stops nobody.
pub fn say(message: impl Display) {
    let mut line = String::new();
    // Writing to a String cannot fail.
    writeln!(line, "clawpot-agent: {message}").unwrap_or_default();
    rustix::io::write(rustix::stdio::stderr(), line.as_bytes()).unwrap_or_default();
}

/// `error: cause: cause …`
#[must_use]
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        write!(text, ": {cause}").unwrap_or_default();
        next = cause.source();
    }
    text
}
