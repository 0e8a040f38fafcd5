//! Durations: `90` (seconds), `1500ms`, `30s`, `5m`, `2h`.

use std::time::Duration;

/// A duration over zero and at most a year.
pub fn positive(text: &str) -> Result<Duration, String> {
    match duration(text)? {
        Duration::ZERO => Err(format!("duration {text:?}: must be more than 0; leave the option out for no limit")),
        duration => Ok(duration),
    }
}

/// A duration of at most a year.
pub fn duration(text: &str) -> Result<Duration, String> {
    const YEAR_MS: u64 = 365 * 86_400_000;
    let refuse = || format!("duration {text:?}: must be a whole number of seconds, or like 1500ms, 30s, 5m, 2h");
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit_ms = match &text[digits.len()..] {
        "ms" => 1,
        "" | "s" => 1_000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => return Err(refuse()),
    };
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return Err(refuse());
    }
    let ms = digits.parse::<u64>().ok().and_then(|n| n.checked_mul(unit_ms)).filter(|ms| *ms <= YEAR_MS);
    ms.map(Duration::from_millis).ok_or_else(|| format!("duration {text:?}: must be at most a year"))
}

/// Whole milliseconds, for the wire.
#[must_use]
pub fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read_with_their_unit() {
        for (text, ms) in [("90", 90_000), ("1500ms", 1_500), ("30s", 30_000), ("5m", 300_000), ("2h", 7_200_000)] {
            assert_eq!(positive(text), Ok(Duration::from_millis(ms)), "{text}");
        }
        for bad in ["", "0", "0s", "-1", "1.5s", "5d", "s", "18446744073709551615h", "99999999h"] {
            assert!(positive(bad).is_err(), "{bad}");
        }
    }
}
