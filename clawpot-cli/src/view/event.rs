//! Something that happened.

use clawpot_common::v1::Event;
use serde::Serialize;

use super::{known, or_dash};
use crate::output::{text::printable, time};

/// An event as `-o json` shows it, one per line.
#[derive(Debug, Serialize)]
pub struct EventView {
    /// Ascending.
    pub id: u64,
    pub time: Option<String>,
    pub vm_id: Option<String>,
    pub vm_name: Option<String>,
    /// Of an event of a volume.
    pub volume_id: Option<String>,
    pub volume_name: Option<String>,
    /// Of an event of an image.
    pub image_digest: Option<String>,
    pub image_name: Option<String>,
    /// Of a collection of images: files that went.
    pub images_removed: Option<u64>,
    pub incarnation: u64,
    pub kind: String,
    pub message: String,
    /// "uid=1000", or "server".
    pub actor: Option<String>,
}

impl From<&Event> for EventView {
    fn from(event: &Event) -> Self {
        Self {
            id: event.id,
            time: event.time.as_ref().map(time::rfc3339),
            vm_id: known(&event.vm_id),
            vm_name: known(&event.vm_name),
            volume_id: known(&event.volume_id),
            volume_name: known(&event.volume_name),
            image_digest: known(&event.image_digest),
            image_name: known(&event.image_name),
            images_removed: (event.images_removed > 0).then_some(event.images_removed),
            incarnation: event.incarnation,
            kind: event.kind.clone(),
            message: event.message.clone(),
            actor: known(&event.actor),
        }
    }
}

/// One line. Events stream, so columns have a width of their own instead of the widest cell's.
pub fn line(event: &Event) -> String {
    let at = event.time.as_ref().map_or_else(|| "-".to_owned(), time::rfc3339);
    let names = [&event.vm_name, &event.vm_id, &event.volume_name, &event.volume_id, &event.image_name];
    let about = or_dash(names.into_iter().find(|name| !name.is_empty()).map_or("", String::as_str));
    printable(&format!("{at:<27}  {about:<16}  {:<13}  {:<10}  {}", event.kind, or_dash(&event.actor), event.message))
        .into_owned()
}

/// Above the first line.
pub const HEADER: &str = "TIME                         VM, VOLUME, IMAGE KIND           ACTOR       MESSAGE";
