//! Sizes in MiB: `512`, `512M`, `2G`, `1T`. Nothing wraps.

use clawpot_types::MiB;

/// MiB of memory.
pub fn memory(text: &str) -> Result<MiB, String> {
    MiB::memory(mib("memory", text)?).map_err(|error| error.to_string())
}

/// MiB of disk.
pub fn disk(text: &str) -> Result<MiB, String> {
    MiB::disk(mib("disk", text)?).map_err(|error| error.to_string())
}

fn mib(what: &str, text: &str) -> Result<u64, String> {
    let refuse = || format!("{what} {text:?}: must be a whole number of MiB, or one with a suffix: 512M, 2G, 1T");
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let factor: u64 = match text[digits.len()..].to_ascii_lowercase().as_str() {
        "" | "m" | "mb" | "mib" => 1,
        "g" | "gb" | "gib" => 1 << 10,
        "t" | "tb" | "tib" => 1 << 20,
        _ => return Err(refuse()),
    };
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return Err(refuse());
    }
    let too_large = || format!("{what} {text:?}: larger than any machine");
    digits.parse::<u64>().ok().and_then(|n| n.checked_mul(factor)).ok_or_else(too_large)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sizes_are_read_with_their_unit() {
        for (text, want) in [("64", 64), ("512M", 512), ("512MiB", 512), ("2G", 2048), ("4096", 4096), ("1t", 1 << 20)]
        {
            assert_eq!(memory(text), Ok(MiB(want)), "{text}");
        }
    }

    #[test]
    fn nothing_wraps_and_the_reason_is_said() {
        let refusals: Vec<String> = [
            "0",
            "1",
            "4294967296",
            "17592186044416T",
            "18446744073709551616",
            "",
            "-5",
            "1.5G",
            "G",
            "512K",
            "5 G",
            "٣",
        ]
        .into_iter()
        .map(|text| memory(text).unwrap_err())
        .collect();
        insta::assert_snapshot!(refusals.join("\n"), @r#"
memory 0 MiB: must be 64 to 1048576 MiB
memory 1 MiB: must be 64 to 1048576 MiB
memory 4294967296 MiB: must be 64 to 1048576 MiB
memory "17592186044416T": larger than any machine
memory "18446744073709551616": larger than any machine
memory "": must be a whole number of MiB, or one with a suffix: 512M, 2G, 1T
memory "-5": must be a whole number of MiB, or one with a suffix: 512M, 2G, 1T
memory "1.5G": must be a whole number of MiB, or one with a suffix: 512M, 2G, 1T
memory "G": must be a whole number of MiB, or one with a suffix: 512M, 2G, 1T
memory "512K": must be a whole number of MiB, or one with a suffix: 512M, 2G, 1T
memory "5 G": must be a whole number of MiB, or one with a suffix: 512M, 2G, 1T
memory "٣": must be a whole number of MiB, or one with a suffix: 512M, 2G, 1T
"#);
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(text in ".{0,24}") {
            if let Ok(size) = disk(&text) {
                prop_assert!(MiB::DISK.contains(&size.0));
            }
        }
    }
}
