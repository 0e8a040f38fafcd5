//! Which VMMs this host has, and which of them new VMs get (DESIGN §7: `--vmm auto`).

use std::ffi::OsString;
use std::sync::Arc;

use clawpot_control::Vmms;
use clawpot_core::VmmKind;
use clawpot_core::ports::Vmm;
use clawpot_types::{InstanceId, Result};
use clawpot_vmm::console::Consoles;
use clawpot_vmm::qemu::{self, Qemu};

use crate::config::{Config, VmmSetting};

pub struct Chosen {
    pub vmms: Vmms,
    /// Why the default is the default, for people.
    pub reason: String,
}

pub async fn choose(config: &Config, instance: &InstanceId, consoles: &Consoles) -> Result<Chosen> {
    let path = std::env::var_os("PATH");
    let qemu = qemu(config, instance, consoles, path).await;
    let reason = match config.vmm {
        VmmSetting::Qemu => "asked for by --vmm qemu".to_owned(),
        VmmSetting::Firecracker | VmmSetting::Auto => "no firecracker".to_owned(),
    };
    let all: Vec<Arc<dyn Vmm>> = vec![Arc::new(qemu?)];
    Ok(Chosen { vmms: Vmms::new(VmmKind::Qemu, all)?, reason })
}

async fn qemu(config: &Config, instance: &InstanceId, consoles: &Consoles, path: Option<OsString>) -> Result<Qemu> {
    let program = config.qemu.as_ref().map(|path| path.display().to_string());
    let settings = qemu::Config { program, path, accel: qemu::Accel::Tcg };
    Qemu::new(&config.state_dir, instance, consoles.clone(), &settings).await
}
