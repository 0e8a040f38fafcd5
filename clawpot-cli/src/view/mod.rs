//! What is shown: our own JSON, whose field names and types stay, and the tables. Unknown or unset things are `null`.

pub mod event;
pub mod host;
pub mod image;
pub mod vm;
pub mod volume;

/// An empty string on the wire means "not known".
fn known(text: &str) -> Option<String> {
    (!text.is_empty()).then(|| text.to_owned())
}

/// `-` where a table has nothing to say.
fn or_dash(text: &str) -> String {
    if text.is_empty() { "-".to_owned() } else { text.to_owned() }
}
