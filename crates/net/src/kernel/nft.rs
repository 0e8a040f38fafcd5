//! Runs `nft -j -f -`: one transaction, all of it or nothing. Only whether a table is there is asked by netlink: that is
//! asked often.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};

use clawpot_host::process::Tool;
use clawpot_types::{Error, Result};

use rustix::io::Errno;

use super::netlink::{Netlink, Refused, append_attribute};
use crate::rules::nft::Transaction;

/// `NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_GETTABLE`
const GET_TABLE: u16 = 0x0a01;
/// `struct nfgenmsg`: family inet, version, resource.
const INET: [u8; 4] = [1, 0, 0, 0];
const NFTA_TABLE_NAME: u16 = 1;

/// Whether the `inet` table is there, in the calling thread's namespace. Some microseconds.
pub(crate) fn inet_table_exists(name: &str) -> Result<bool> {
    let mut body = INET.to_vec();
    append_attribute(&mut body, NFTA_TABLE_NAME, &[name.as_bytes(), &[0]].concat());
    match Netlink::netfilter()?.request_raw(GET_TABLE, 0, &body) {
        Ok(()) => Ok(true),
        Err(Refused(Errno::NOENT)) => Ok(false),
        Err(refused) => Err(refused.to_error(format!("looking for the table inet {name}"))),
    }
}

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
