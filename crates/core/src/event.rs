//! What happened, for people.

use clawpot_types::{Incarnation, Revision, Timestamp, VmId, VmName};
use serde::{Deserialize, Serialize};

/// Kind of the event of a command that is run in a guest. There may be thousands for each create and delete, so the log
/// keeps them apart: however many there are, they push out none of another kind.
pub const EXEC: &str = "vm.exec";

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// The revision of the transaction that it is part of; ascending.
    pub id: Revision,
    pub time: Timestamp,
    pub vm: VmId,
    pub name: VmName,
    pub incarnation: Incarnation,
    /// "vm.create", "vm.phase", …
    pub kind: String,
    pub message: String,
    /// "uid=1000", or "server".
    pub actor: String,
}

/// An event before it is committed: the store gives it its id.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Draft {
    pub time: Timestamp,
    pub vm: VmId,
    pub name: VmName,
    pub incarnation: Incarnation,
    /// At most one of a kind for each VM in one transaction.
    pub kind: &'static str,
    pub message: String,
    pub actor: String,
}

impl Draft {
    #[must_use]
    pub fn committed(&self, id: Revision) -> Event {
        Event {
            id,
            time: self.time,
            vm: self.vm.clone(),
            name: self.name.clone(),
            incarnation: self.incarnation,
            kind: self.kind.to_owned(),
            message: self.message.clone(),
            actor: self.actor.clone(),
        }
    }
}
