//! Releases of Firecracker that stand beside the images, in `firecracker/v1.15.1/` (`scripts/install-vm-assets.sh`).

/// Below the image directory.
pub const FETCHED: &str = "firecracker";

/// Which of these directories' names is the newest release's, in numbers: 1.15 comes after 1.9. Other names are none.
pub fn newest<N: AsRef<str>>(names: impl IntoIterator<Item = N>) -> Option<N> {
    names
        .into_iter()
        .filter_map(|name| Some((numbers(name.as_ref())?, name)))
        .max_by(|a, b| a.0.cmp(&b.0))
        .map(|found| found.1)
}

/// Of "v1.15.1".
fn numbers(name: &str) -> Option<[u32; 3]> {
    let mut parts = name.strip_prefix('v')?.split('.').map(|part| part.parse().ok());
    let found = [parts.next()??, parts.next()??, parts.next()??];
    parts.next().is_none().then_some(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_count_and_not_letters() {
        assert_eq!(newest(["v1.9.1", "v1.15.1", "v1.15.0", "notes", "v2", "v1.16.0.part", "1.99.0"]), Some("v1.15.1"));
        assert_eq!(newest(["notes"]), None);
    }
}
