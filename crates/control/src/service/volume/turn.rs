//! One thing at a time is done to a volume, by name. What its record says is for the next daemon, and for VMs; this is for us.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};

use clawpot_types::{Error, Kind, Result, VolumeName};

use super::rows::find_volume;
use crate::service::Service;

#[derive(Debug, Default)]
pub(crate) struct Turns(Mutex<BTreeSet<VolumeName>>);

/// Until it is dropped.
#[derive(Debug)]
pub(super) struct Turn {
    turns: Arc<Turns>,
    name: VolumeName,
}

impl Turns {
    /// `None`: it is another's.
    pub(super) fn take(self: &Arc<Self>, name: &VolumeName) -> Option<Turn> {
        let mine = self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(name.clone());
        mine.then(|| Turn { turns: Arc::clone(self), name: name.clone() })
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.turns.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.name);
    }
}

impl Service {
    /// Refused, saying what is being done to it, while it is another's.
    pub(super) async fn volume_turn(&self, name: &VolumeName) -> Result<Turn> {
        if let Some(turn) = self.turns().take(name) {
            return Ok(turn);
        }
        if let Some((_, record)) = find_volume(&self.deps, name).await? {
            record.may_be_used(false)?;
        }
        Err(taken(name))
    }
}

pub(super) fn taken(name: &VolumeName) -> Error {
    Error::new(Kind::FailedPrecondition, format!("volume {name}: something else is being done to it"))
        .hint("try again when that is done: clawpot volume ls")
}
