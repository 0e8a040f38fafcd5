//! An image.

use std::time::SystemTime;

use clawpot_common::v1::Image;
use clawpot_types::MiB;
use serde::Serialize;

use crate::output::{table, time};

/// An image as `-o json` shows it.
#[derive(Debug, Serialize)]
pub struct ImageView {
    pub name: String,
    pub digest: String,
    pub size_bytes: u64,
    /// "ext4" or "erofs".
    pub format: String,
    pub created_at: Option<String>,
}

impl From<&Image> for ImageView {
    fn from(image: &Image) -> Self {
        Self {
            name: image.name.clone(),
            digest: image.digest.clone(),
            size_bytes: image.size_bytes,
            format: image.format.clone(),
            created_at: image.created_at.as_ref().map(time::rfc3339),
        }
    }
}

/// `image ls`. Digests are cut to 12 digits, which `-o json` does not.
pub fn list(images: &[Image], now: SystemTime) -> String {
    let rows = images.iter().map(|image| {
        let digits = image.digest.strip_prefix("sha256:").unwrap_or(&image.digest);
        [
            image.name.clone(),
            digits.chars().take(12).collect(),
            MiB::from_bytes(image.size_bytes).to_string(),
            image.format.clone(),
            time::age_of(image.created_at.as_ref(), now),
        ]
    });
    table::rows(["NAME", "DIGEST", "SIZE", "FORMAT", "AGE"], rows)
}
