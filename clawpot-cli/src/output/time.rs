//! Times and durations, short for people and exact for programs.

use std::time::{Duration, SystemTime};

use prost_types::Timestamp;

/// `3m`: one number, the largest unit that fits.
#[must_use]
pub fn age(duration: Duration) -> String {
    let s = duration.as_secs();
    match s {
        0..60 => format!("{s}s"),
        60..3_600 => format!("{}m", s / 60),
        3_600..172_800 => format!("{}h", s / 3_600),
        _ => format!("{}d", s / 86_400),
    }
}

/// How long before `now` it was; `-` where it is unknown.
#[must_use]
pub fn age_of(time: Option<&Timestamp>, now: SystemTime) -> String {
    let then = time.and_then(|time| SystemTime::try_from(*time).ok());
    // A time in the future is a clock that was set back: zero.
    then.map_or_else(|| "-".to_owned(), |then| age(now.duration_since(then).unwrap_or_default()))
}

/// `in 5m`, or `now` where it is over or about to be.
#[must_use]
pub fn until(time: &Timestamp, now: SystemTime) -> String {
    let left = SystemTime::try_from(*time).ok().and_then(|then| then.duration_since(now).ok()).unwrap_or_default();
    if left.as_secs() == 0 { "now".to_owned() } else { format!("in {}", age(left)) }
}

/// `2026-11-21T10:19:00.123456Z`, to the microsecond.
#[must_use]
pub fn rfc3339(time: &Timestamp) -> String {
    Timestamp { seconds: time.seconds, nanos: time.nanos / 1_000 * 1_000 }.to_string()
}

/// Three digits at most: `812 µs`, `4.21 ms`, `412 ms`, `1.50 s`.
#[must_use]
pub fn duration(duration: Duration) -> String {
    let us = duration.as_micros();
    let fraction = |value: f64, unit: &str| {
        let digits = if value < 10.0 { 2 } else { usize::from(value < 100.0) };
        format!("{value:.digits$} {unit}")
    };
    match us {
        0..1_000 => format!("{us} µs"),
        1_000..1_000_000 => fraction(duration.as_secs_f64() * 1e3, "ms"),
        _ => fraction(duration.as_secs_f64(), "s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_are_one_number() {
        let shown = |s| age(Duration::from_secs(s));
        assert_eq!(
            [0, 59, 60, 3_599, 3_600, 172_799, 172_800].map(shown),
            ["0s", "59s", "1m", "59m", "1h", "47h", "2d"]
        );
    }

    #[test]
    fn durations_have_three_digits() {
        let shown = |us| duration(Duration::from_micros(us));
        assert_eq!(
            [0, 812, 4_213, 41_234, 412_345, 1_500_000, 71_000_000].map(shown),
            ["0 µs", "812 µs", "4.21 ms", "41.2 ms", "412 ms", "1.50 s", "71.0 s"]
        );
    }

    #[test]
    fn times_are_rfc_3339() {
        assert_eq!(rfc3339(&Timestamp { seconds: 0, nanos: 0 }), "1970-01-01T00:00:00Z");
        assert_eq!(rfc3339(&Timestamp { seconds: 1_795_256_340, nanos: 123_456_789 }), "2026-11-21T10:19:00.123456Z");
    }
}
