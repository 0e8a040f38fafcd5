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
    let vm = or_dash(if event.vm_name.is_empty() { &event.vm_id } else { &event.vm_name });
    printable(&format!("{at:<27}  {vm:<16}  {:<9}  {:<10}  {}", event.kind, or_dash(&event.actor), event.message))
        .into_owned()
}

/// Above the first line.
pub const HEADER: &str = "TIME                         VM                KIND       ACTOR       MESSAGE";
