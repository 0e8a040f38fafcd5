//! How things are shown: tables and JSON on stdout, everything else on stderr.

pub mod color;
pub mod progress;
pub mod table;
pub mod text;
pub mod time;

use std::io::{self, Write as _};

use serde::Serialize;

use crate::failure::Failure;

/// Writes `text` and a newline to stdout.
pub fn line(text: &str) -> Result<(), Failure> {
    write(|out| writeln!(out, "{text}"))
}

/// Writes bytes to stdout as they are.
pub fn raw(bytes: &[u8]) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    out.write_all(bytes).and_then(|()| out.flush()).map_err(|error| Failure::output(&error))
}

/// Writes `value` as indented JSON to stdout.
pub fn json<T: Serialize + ?Sized>(value: &T) -> Result<(), Failure> {
    line(&serde_json::to_string_pretty(value).map_err(unencodable)?)
}

/// Writes `value` as one line of JSON to stdout, for streams.
pub fn json_line<T: Serialize + ?Sized>(value: &T) -> Result<(), Failure> {
    line(&serde_json::to_string(value).map_err(unencodable)?)
}

fn unencodable(error: serde_json::Error) -> Failure {
    Failure::new("standard output: encoding the result as JSON").because(error.to_string())
}

fn write(with: impl FnOnce(&mut dyn io::Write) -> io::Result<()>) -> Result<(), Failure> {
    let mut out = anstream::AutoStream::auto(io::stdout().lock());
    with(&mut out).and_then(|()| out.flush()).map_err(|error| Failure::output(&error))
}

/// A line on stderr. That it cannot be written changes nothing for what was asked.
pub fn say(text: &str) {
    let mut err = anstream::AutoStream::auto(io::stderr().lock());
    if writeln!(err, "{text}").is_err() {
        // Nobody listens; the exit code still tells.
    }
}

/// A remark of ours among another program's output: `clawpot: …` on stderr.
pub fn note(text: &str) {
    let end = if crate::exec::terminal::is_raw() { "\r" } else { "" };
    say(&format!("clawpot: {}{end}", text::printable(text)));
}
