//! What happened, for people.

use clawpot_types::{Incarnation, Revision, Timestamp, VmId, VmName};
use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// The revision of the change it tells of; ascending, and the same when the change is replayed.
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
