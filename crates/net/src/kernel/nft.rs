//! Runs `nft -j -f -`: one transaction, all of it or nothing.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};

use clawpot_host::process::Tool;
use clawpot_types::{Error, Result};

use crate::rules::nft::Transaction;

#[derive(Debug)]
pub(crate) struct Nft {
    program: PathBuf,
    runs: AtomicU64,
}

impl Nft {
    pub(crate) fn new(program: PathBuf) -> Self {
        Self { program, runs: AtomicU64::new(0) }
    }

    /// In `netns`, or in the caller's own. About 4 ms.
    pub(crate) async fn run(&self, transaction: &Transaction, netns: Option<OwnedFd>, what: &str) -> Result<()> {
        self.runs.fetch_add(1, Ordering::Relaxed);
        let tool = Tool::new(&self.program).args(["-j", "-f", "-"]).input(transaction.to_json().to_string());
        let tool = match netns {
            Some(netns) => tool.with(|spawn| spawn.netns(netns)),
            None => tool,
        };
        tool.run().await.map(drop).map_err(|error: Error| error.context(what.to_owned()))
    }

    /// How often the program was run so far.
    pub(crate) fn runs(&self) -> u64 {
        self.runs.load(Ordering::Relaxed)
    }
}
