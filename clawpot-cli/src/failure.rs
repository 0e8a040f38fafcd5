//! What went wrong, told once, at the edge: `error: which thing, doing what`, its causes, and what to do next.

use std::fmt::Write as _;
use std::io;

use owo_colors::OwoColorize as _;
use tonic::{Code, Status};

use crate::field;
use crate::output::text::printable;

/// Metadata key in which the server says what to do next (ASCII, percent-encoded).
const HINT_KEY: &str = "clawpot-hint";

/// Ends the program. Built where the failure is understood, printed in `main`.
#[derive(Debug)]
pub struct Failure {
    what: String,
    causes: Vec<String>,
    /// Lines of a console, shown as they are.
    console: Vec<String>,
    hint: Option<String>,
    code: u8,
    /// Nobody reads our output any more: nothing is said, and `code` is the exit code.
    quiet: bool,
}

impl Failure {
    /// `what`: which thing, doing what. Exit code 1.
    pub fn new(what: impl Into<String>) -> Self {
        Self { what: what.into(), causes: Vec::new(), console: Vec::new(), hint: None, code: 1, quiet: false }
    }

    /// One cause more, from the outermost to the innermost.
    #[must_use]
    pub fn because(mut self, cause: impl Into<String>) -> Self {
        self.causes.push(cause.into());
        self
    }

    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    #[must_use]
    pub fn console(mut self, lines: Vec<String>) -> Self {
        self.console = lines;
        self
    }

    /// The exit code.
    #[must_use]
    pub fn code(mut self, code: u8) -> Self {
        if !self.quiet {
            self.code = code;
        }
        self
    }

    /// What the server answered while `doing`.
    pub fn status(doing: &str, status: &Status) -> Self {
        if crate::api::is_broken(status) {
            return Self::broken(doing, status);
        }
        let mut lines = status.message().lines().filter(|line| !line.trim().is_empty());
        let first = lines.next().map_or_else(|| format!("{doing}: {}", status.code().description()), str::to_owned);
        let mut failure = Self::new(field::as_typed(&first));
        failure.causes.extend(lines.map(|line| line.trim().trim_start_matches("cause: ").to_owned()));
        failure.hint = told_hint(status).or_else(|| usual_hint(status.code()).map(str::to_owned));
        failure
    }

    /// The server went away while `doing`.
    fn broken(doing: &str, status: &Status) -> Self {
        let mut failure = Self::new(format!("{doing}: the connection to the server broke"));
        failure.causes = causes_of(status);
        failure.hint("see whether it runs: `systemctl status clawpot`, `journalctl -u clawpot`")
    }

    /// Our own output could not be written. A closed pipe is how `| head` ends us: success.
    pub fn output(error: &io::Error) -> Self {
        let mut failure = Self::new("standard output: writing").because(error.to_string());
        if error.kind() == io::ErrorKind::BrokenPipe {
            failure.quiet = true;
            failure.code = 0;
        }
        failure
    }

    /// The outermost cause, or what happened where there is none.
    pub fn first_cause(&self) -> &str {
        self.causes.first().unwrap_or(&self.what)
    }

    /// What to do about it, where that is known.
    pub fn next_step(&self) -> Option<&str> {
        self.hint.as_deref()
    }

    #[cfg(test)]
    pub fn exit_code(&self) -> u8 {
        self.code
    }

    /// Prints it on stderr and gives the exit code.
    pub fn report(&self) -> u8 {
        if !self.quiet {
            // Where stderr is gone too, the exit code is all that is left to say.
            crate::output::say(&self.render());
        }
        self.code
    }

    fn render(&self) -> String {
        let mut text = format!("{} {}", "error:".red().bold(), printable(&self.what));
        for cause in &self.causes {
            push(&mut text, &format!("\n  {} {}", "cause:".yellow(), printable(cause)));
        }
        for line in &self.console {
            push(&mut text, &format!("\n  {} {}", "|".dimmed(), printable(line)));
        }
        if let Some(hint) = &self.hint {
            push(&mut text, &format!("\n  {} {}", "hint:".cyan(), printable(hint)));
        }
        text
    }
}

fn push(text: &mut String, more: &str) {
    // Writing to a String cannot fail.
    text.write_str(more).unwrap_or_default();
}

fn causes_of(status: &Status) -> Vec<String> {
    let mut causes = Vec::new();
    let mut next = std::error::Error::source(status);
    while let Some(cause) = next {
        let text = cause.to_string();
        if causes.last() != Some(&text) {
            causes.push(text);
        }
        next = cause.source();
    }
    causes
}

fn told_hint(status: &Status) -> Option<String> {
    let text = status.metadata().get(HINT_KEY)?.to_str().ok()?;
    Some(percent_decoded(text)).filter(|hint| !hint.is_empty())
}

fn usual_hint(code: Code) -> Option<&'static str> {
    match code {
        Code::NotFound => Some("`clawpot ls` lists the VMs"),
        Code::Unimplemented => Some("client and server differ in version: see `clawpot version`"),
        Code::Internal => Some("this looks like a defect of the server; its log has more: `journalctl -u clawpot`"),
        _ => None,
    }
}

/// `%41` → `A`; what is not an escape stays as it is.
fn percent_decoded(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut decoded = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let escape = (bytes[at] == b'%').then(|| text.get(at + 1..at + 3)).flatten();
        match escape.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
            Some(byte) => {
                decoded.push(byte);
                at += 3;
            }
            None => {
                decoded.push(bytes[at]);
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&decoded).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::output::text::without_ansi;

    fn shown(failure: &Failure) -> String {
        without_ansi(&failure.render())
    }

    #[test]
    fn a_status_becomes_error_causes_and_hint() {
        let mut status = Status::already_exists("VM \"web\": creating it\nthe name is taken by k3jq8s0d1f2g3h4j\n");
        status.metadata_mut().insert(HINT_KEY, "choose another --name, or %60clawpot rm web%60".parse().unwrap());
        insta::assert_snapshot!(shown(&Failure::status("creating the VM", &status)), @r#"
        error: VM "web": creating it
          cause: the name is taken by k3jq8s0d1f2g3h4j
          hint: choose another --name, or `clawpot rm web`
        "#);
    }

    #[test]
    fn an_empty_status_still_says_what_was_done() {
        insta::assert_snapshot!(shown(&Failure::status("listing VMs", &Status::unimplemented(""))), @r"
        error: listing VMs: Operation is not implemented or not supported
          hint: client and server differ in version: see `clawpot version`
        ");
    }

    #[test]
    fn a_guest_cannot_write_to_the_terminal_through_an_error() {
        let failure = Failure::new("VM web: booting").console(vec!["\x1b[2Jgone\x07".to_owned()]);
        insta::assert_snapshot!(shown(&failure), @r"
        error: VM web: booting
          | ^[[2Jgone^G
        ");
    }

    #[test]
    fn percent_signs_that_are_no_escapes_stay() {
        assert_eq!(percent_decoded("100% sure: %zz %C3%A4 %4"), "100% sure: %zz ä %4");
    }

    #[test]
    fn a_closed_pipe_is_success_and_silent() {
        let failure = Failure::output(&io::ErrorKind::BrokenPipe.into());
        assert!(failure.quiet);
        assert_eq!(failure.code(125).report(), 0);
    }
}
