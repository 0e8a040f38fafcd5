//! What this host has and lacks for VMs. Works without a server and without root, and says what it could not see.
//!
//! Each check looks (`look`) and judges (`judge`); judging is pure and tested with what real hosts said.
//!
//! - [`server`] is one there · [`kvm`], [`vmm`] what VMs run on · [`devices`] TUN, kernel modules
//! - [`cgroup`] their processes · [`storage`] their files, [`images`] what makes them · [`firewall`], [`routes`] their network · [`users`] their uids
//! - [`paths`] who may change what the server trusts · [`tenants`] what leaks between VMs below them · [`tuning`] what costs
//! - [`check`] a finding · [`tool`] the only place here that runs a program

mod cgroup;
pub mod check;
mod devices;
mod firewall;
mod images;
mod kvm;
mod paths;
mod routes;
mod server;
mod storage;
mod tenants;
mod tool;
mod tuning;
mod users;
mod vmm;

use std::path::PathBuf;

use check::Check;

use crate::api::Api;
use crate::failure::Failure;

/// Where the server keeps its things.
#[derive(Debug)]
pub struct Places {
    pub state: PathBuf,
    pub images: PathBuf,
}

/// Every check, in the order in which it should be mended.
pub async fn examine(api: Result<Api, Failure>, places: &Places) -> Vec<Check> {
    let host = server::look(api).await;
    let kvm = kvm::look();
    let mut checks = vec![server::judge(&host), kvm::judge(&kvm, host.as_ref().ok())];
    checks.extend(vmm::examine(kvm.is_ok(), &places.images));
    checks.push(devices::tun());
    checks.push(devices::modules());
    checks.push(cgroup::examine());
    checks.extend(storage::examine(places));
    checks.push(images::e2fsprogs());
    checks.push(images::unpacking());
    checks.push(firewall::nft());
    checks.push(firewall::foreign());
    checks.push(routes::forwarding());
    checks.push(routes::overlaps());
    checks.push(users::examine());
    checks.push(paths::examine(places, &vmm::programs(&places.images)));
    checks.extend(tenants::examine());
    checks.extend(tuning::examine(kvm.is_ok()));
    checks
}
