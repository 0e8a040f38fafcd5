//! Labels: `-l KEY=VALUE`, repeatable.

use std::collections::HashMap;

use clawpot_types::Label;

use crate::failure::Failure;

/// The parser of one label.
pub fn label(text: &str) -> Result<(Label, Label), String> {
    let (key, value) = text.split_once('=').ok_or_else(|| format!("label {text:?}: must be KEY=VALUE"))?;
    if key.is_empty() {
        return Err(format!("label {text:?}: has no key; write KEY=VALUE"));
    }
    let part = |text: &str| text.parse::<Label>().map_err(|error| error.to_string());
    Ok((part(key)?, part(value)?))
}

/// As the wire wants them. The same key twice is a mistake, not a choice of ours.
pub fn wire(labels: &[(Label, Label)]) -> Result<HashMap<String, String>, Failure> {
    if labels.len() > Label::MAX_COUNT {
        return Err(usage(format!("{} labels: must be at most {}", labels.len(), Label::MAX_COUNT)));
    }
    let mut map = HashMap::with_capacity(labels.len());
    for (key, value) in labels {
        if map.insert(key.to_string(), value.to_string()).is_some() {
            return Err(usage(format!("label {:?}: given twice", key.as_str())));
        }
    }
    Ok(map)
}

fn usage(what: String) -> Failure {
    Failure::new(what).code(2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_key_and_value() {
        let (key, value) = label("team=red team").unwrap();
        assert_eq!((key.as_str(), value.as_str()), ("team", "red team"));
        for bad in ["team", "=x", "", "a=b=c", "a=b,c", &format!("a={}", "x".repeat(129))] {
            assert!(label(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_key_given_twice_is_refused() {
        let twice = [label("a=1").unwrap(), label("a=2").unwrap()];
        assert!(wire(&twice).is_err());
        assert_eq!(wire(&twice[..1]).unwrap().len(), 1);
    }
}
