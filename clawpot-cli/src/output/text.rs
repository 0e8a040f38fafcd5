//! Text from guests and servers, made harmless for a terminal.

use std::borrow::Cow;

/// `text` with every control character but tab shown as `^X`, so that nothing in it can drive the terminal.
#[must_use]
pub fn printable(text: &str) -> Cow<'_, str> {
    if !text.contains(is_control) {
        return Cow::Borrowed(text);
    }
    let mut safe = String::with_capacity(text.len() + 8);
    for c in text.chars() {
        match c {
            '\u{0}'..='\u{1f}' if is_control(c) => {
                safe.push('^');
                safe.push(char::from(u8::try_from(u32::from(c)).unwrap_or_default() + 0x40));
            }
            _ if is_control(c) => safe.push('\u{fffd}'),
            _ => safe.push(c),
        }
    }
    Cow::Owned(safe)
}

/// C0 but tab, DEL, C1, and the marks that reorder what is read.
fn is_control(c: char) -> bool {
    (c.is_control() && c != '\t') || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// As [`printable`], for a stream of bytes: newlines stay, and `\r\n` becomes `\n`.
#[must_use]
pub fn printable_bytes(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes).replace("\r\n", "\n");
    text.split('\n').map(|line| printable(line.trim_end_matches('\r'))).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
pub fn without_ansi(text: &str) -> String {
    anstream::adapter::strip_str(text).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_are_shown_not_sent() {
        assert_eq!(printable("plain\ttab é"), "plain\ttab é");
        assert_eq!(printable("\x1b]0;x\x07\x7f\u{9b}\u{202e}"), "^[]0;x^G\u{fffd}\u{fffd}\u{fffd}");
        assert_eq!(printable_bytes(b"a\r\nb\r\n\x1bc"), "a\nb\n^[c");
    }
}
