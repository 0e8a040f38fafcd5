//! A finding.

use owo_colors::OwoColorize as _;
use serde::Serialize;

use crate::output::{table, text::printable};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Level {
    Ok,
    /// VMs run, but something about them will be missed.
    Warn,
    /// VMs cannot run.
    Fail,
    /// It could not be seen from here.
    Unknown,
}

/// A finding as `-o json` shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    pub check: &'static str,
    pub level: Level,
    pub found: String,
    /// What to do about it.
    pub fix: Option<String>,
}

impl Check {
    pub fn ok(check: &'static str, found: impl Into<String>) -> Self {
        Self { check, level: Level::Ok, found: found.into(), fix: None }
    }

    pub fn warn(check: &'static str, found: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { check, level: Level::Warn, found: found.into(), fix: Some(fix.into()) }
    }

    pub fn fail(check: &'static str, found: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { check, level: Level::Fail, found: found.into(), fix: Some(fix.into()) }
    }

    pub fn unknown(check: &'static str, found: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { check, level: Level::Unknown, found: found.into(), fix: Some(fix.into()) }
    }
}

/// The findings as a table, the fixes below it.
pub fn report(checks: &[Check]) -> String {
    let rows = checks.iter().map(|check| [word(check.level).to_owned(), check.check.to_owned(), check.found.clone()]);
    let plain = table::rows(["RESULT", "CHECK", "FOUND"], rows);
    let mut lines: Vec<String> = plain.lines().map(str::to_owned).collect();
    // Colours go in after the columns are aligned: they would be counted as width.
    for (line, check) in lines.iter_mut().skip(1).zip(checks) {
        *line = line.replacen(word(check.level), &painted(check.level), 1);
    }
    for check in checks {
        if let Some(fix) = &check.fix {
            lines.push(format!(
                "\n{}: {}\n  {} {}",
                check.check,
                printable(&check.found),
                "fix:".cyan(),
                printable(fix)
            ));
        }
    }
    lines.join("\n")
}

fn word(level: Level) -> &'static str {
    match level {
        Level::Ok => "ok",
        Level::Warn => "warn",
        Level::Fail => "fail",
        Level::Unknown => "unknown",
    }
}

fn painted(level: Level) -> String {
    match level {
        Level::Ok => word(level).green().to_string(),
        Level::Warn => word(level).yellow().to_string(),
        Level::Fail => word(level).red().to_string(),
        Level::Unknown => word(level).dimmed().to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::output::text::without_ansi;

    #[test]
    fn the_fix_stands_below_the_table() {
        let checks =
            [Check::ok("tun", "/dev/net/tun opens"), Check::fail("nft", "not in the PATH", "apt-get install nftables")];
        insta::assert_snapshot!(without_ansi(&report(&checks)), @r#"
RESULT  CHECK  FOUND
ok      tun    /dev/net/tun opens
fail    nft    not in the PATH

nft: not in the PATH
  fix: apt-get install nftables
"#);
    }
}
