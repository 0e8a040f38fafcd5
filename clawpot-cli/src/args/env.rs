//! Environment variables: `-e K=V`, or `-e K` to take it from here.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt as _;

use bytes::Bytes;
use clap::builder::{OsStringValueParser, TypedValueParser};
use clawpot_common::v1::EnvVar;

/// The parser of `-e`.
pub fn parser() -> impl TypedValueParser<Value = EnvVar> {
    OsStringValueParser::new().try_map(|text: OsString| variable(&text, |name| std::env::var_os(name)))
}

fn variable(text: &OsStr, here: impl Fn(&OsStr) -> Option<OsString>) -> Result<EnvVar, String> {
    let bytes = text.as_bytes();
    let split = bytes.iter().position(|b| *b == b'=');
    let name = &bytes[..split.unwrap_or(bytes.len())];
    if name.is_empty() {
        return Err(format!("variable {}: has no name; write NAME=VALUE", text.display()));
    }
    let value = match split {
        Some(at) => Bytes::copy_from_slice(&bytes[at + 1..]),
        None => here(text)
            .map(|value| Bytes::copy_from_slice(value.as_bytes()))
            .ok_or_else(|| format!("variable {}: is not set here; write {0}=VALUE", text.display()))?,
    };
    Ok(EnvVar { name: Bytes::copy_from_slice(name), value })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<(String, String), String> {
        let here = |name: &OsStr| (name == "HOME").then(|| "/root".into());
        let text_of = |bytes: &Bytes| String::from_utf8_lossy(bytes).into_owned();
        variable(text.as_ref(), here).map(|var| (text_of(&var.name), text_of(&var.value)))
    }

    #[test]
    fn values_are_given_or_taken_from_here() {
        assert_eq!(read("A=b=c"), Ok(("A".into(), "b=c".into())));
        assert_eq!(read("A="), Ok(("A".into(), String::new())));
        assert_eq!(read("HOME"), Ok(("HOME".into(), "/root".into())));
        assert_eq!(read("NOPE").unwrap_err(), "variable NOPE: is not set here; write NOPE=VALUE");
        assert!(read("=x").is_err() && read("").is_err());
    }
}
