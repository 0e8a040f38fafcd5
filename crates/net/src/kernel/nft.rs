//! Rules and elements, counted. Rules are written by `nft -j -f -`, in one transaction: all of it or nothing. What is done
//! often goes to the kernel without it (`super::nfnetlink`): starting a program takes 4 ms.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use clawpot_host::process::Tool;
use clawpot_types::{Error, Kind, Result};

use super::netlink::Netlink;
use super::nfnetlink::{self, Change};
use crate::rules::nft::{Element, Transaction};

/// Whether the `inet` table is there, in the calling thread's namespace. Some microseconds.
pub(crate) fn inet_table_exists(name: &str) -> Result<bool> {
    nfnetlink::inet_table_exists(&mut Netlink::netfilter()?, name)
        .map_err(|refused| refused.to_error(format!("looking for the table inet {name}")))
}

#[derive(Debug)]
pub(crate) struct Nft {
    program: PathBuf,
    /// Kept open between changes: one that is closed after a deletion waits until no CPU looks at what was deleted, some
    /// 15 ms.
    socket: Arc<Mutex<Option<Netlink>>>,
    runs: AtomicU64,
    transactions: AtomicU64,
}

impl Nft {
    pub(crate) fn new(program: PathBuf) -> Self {
        Self { program, socket: Arc::default(), runs: AtomicU64::new(0), transactions: AtomicU64::new(0) }
    }

    /// In `netns`, or in the caller's own. About 4 ms.
    pub(crate) async fn run(&self, transaction: &Transaction, netns: Option<OwnedFd>, what: &str) -> Result<()> {
        self.runs.fetch_add(1, Ordering::Relaxed);
        self.transactions.fetch_add(1, Ordering::Relaxed);
        let tool = Tool::new(&self.program).args(["-j", "-f", "-"]).input(transaction.to_json().to_string());
        let tool = match netns {
            Some(netns) => tool.with(|spawn| spawn.netns(netns)),
            None => tool,
        };
        tool.run().await.map(drop).map_err(|error: Error| error.context(what.to_owned()))
    }

    /// Elements of one `inet` table, in the calling thread's namespace. About 0.1 ms, longer while somebody else changes
    /// rules.
    pub(crate) async fn change(&self, change: Change, table: String, elements: [Element; 2], what: &str) -> Result<()> {
        self.transactions.fetch_add(1, Ordering::Relaxed);
        let socket = Arc::clone(&self.socket);
        let work = move || {
            // A socket or none.
            let mut kept = socket.lock().unwrap_or_else(PoisonError::into_inner);
            let mut netlink = kept.take().map_or_else(Netlink::netfilter, Ok)?;
            nfnetlink::change_elements(&mut netlink, change, &table, &elements)
                .map_err(|refused| refused.to_error(format!("changing elements of the table inet {table}")))?;
            *kept = Some(netlink);
            Ok(())
        };
        let done = tokio::task::spawn_blocking(work).await;
        done.unwrap_or_else(|error| Err(Error::new(Kind::Internal, "changing rules").because(error)))
            .map_err(|error| error.context(what.to_owned()))
    }

    /// How often the program was run so far.
    pub(crate) fn runs(&self) -> u64 {
        self.runs.load(Ordering::Relaxed)
    }

    /// Transactions on the host's table, and those that the program was run for.
    pub(crate) fn transactions(&self) -> u64 {
        self.transactions.load(Ordering::Relaxed)
    }
}
