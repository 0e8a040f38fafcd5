//! Which VMMs this host has, and which of them new VMs get (DESIGN §7: `--vmm auto`). A driver that is here, chosen or not,
//! adopts the VMs that an earlier server started with it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use clawpot_control::Vmms;
use clawpot_core::VmmKind;
use clawpot_core::ports::Vmm;
use clawpot_image::LocalImages;
use clawpot_types::{Error, InstanceId, Result};
use clawpot_vmm::console::Consoles;
use clawpot_vmm::firecracker::{self, Firecracker};
use clawpot_vmm::probe::{self, Host, Wanted};
use clawpot_vmm::qemu::{self, Qemu};

use crate::config::{Config, VmmSetting};

pub struct Chosen {
    pub vmms: Vmms,
    /// Why the default is the default, for people.
    pub reason: String,
}

pub async fn choose(
    config: &Config,
    instance: &InstanceId,
    images: &LocalImages,
    consoles: &Consoles,
) -> Result<Chosen> {
    let qemu = qemu(config, instance, consoles).await;
    let firecracker = firecracker(config, instance, consoles).await;
    let kernel = images.kernel().await;
    let host = Host {
        kvm: Host::kvm(),
        firecracker: identify(&firecracker).await,
        qemu: qemu.as_ref().map(|qemu| qemu.capabilities().version).map_err(Error::chain),
        kernel: kernel.as_ref().map(|kernel| kernel.digest.clone()).map_err(Error::chain),
        boot_id: clawpot_host::boot_id()?,
    };
    let wanted = match config.vmm {
        VmmSetting::Auto => Wanted::Auto,
        VmmSetting::Firecracker => Wanted::Only(VmmKind::Firecracker),
        VmmSetting::Qemu => Wanted::Only(VmmKind::Qemu),
    };
    let chosen = {
        let boot = async {
            match (&firecracker, &kernel) {
                (Ok(firecracker), Ok(kernel)) => firecracker.probe(&kernel.kernel, &kernel.initramfs).await,
                // Never polled: without either there is nothing to probe.
                _ => Err(Error::new(clawpot_types::Kind::Internal, "probing without a Firecracker or a kernel")),
            }
        };
        probe::choose(wanted, &host, &config.state_dir, boot).await?
    };
    let mut all: Vec<Arc<dyn Vmm>> = Vec::new();
    if let Ok(qemu) = qemu {
        all.push(Arc::new(qemu));
    }
    if let Ok(firecracker) = firecracker {
        all.push(Arc::new(firecracker));
    }
    Ok(Chosen { vmms: Vmms::new(chosen.kind, all)?, reason: chosen.why })
}

/// Version and digest. Reading the program takes some milliseconds.
async fn identify(firecracker: &Result<Firecracker>) -> Result<(String, clawpot_types::Digest), String> {
    let firecracker = firecracker.as_ref().map_err(Error::chain)?;
    let program = firecracker.program().to_owned();
    let digest = tokio::task::spawn_blocking(move || probe::digest_of(&program)).await;
    let digest = digest.map_err(|error| error.to_string())?.map_err(|error| error.chain())?;
    Ok((firecracker.capabilities().version, digest))
}

async fn qemu(config: &Config, instance: &InstanceId, consoles: &Consoles) -> Result<Qemu> {
    let settings = qemu::Config {
        program: config.qemu.as_ref().map(|path| path.display().to_string()),
        path: std::env::var_os("PATH"),
        accel: qemu::Accel::Tcg,
    };
    Qemu::new(&config.state_dir, instance, consoles.clone(), &settings).await
}

async fn firecracker(config: &Config, instance: &InstanceId, consoles: &Consoles) -> Result<Firecracker> {
    let fetched = fetched(&config.image_dir);
    let settings = firecracker::Config {
        program: config.firecracker.clone().or_else(|| Some(fetched.as_ref()?.join("firecracker"))),
        jailer: config.jailer.clone(),
        probe_limit: config.probe_limit,
        path: std::env::var_os("PATH"),
    };
    Firecracker::new(&config.state_dir, instance, consoles.clone(), &settings).await
}

/// The newest release that `scripts/install-vm-assets.sh` put beside the images, in `firecracker/v1.15.1`.
fn fetched(image_dir: &Path) -> Option<PathBuf> {
    let found = std::fs::read_dir(image_dir.join("firecracker")).ok()?;
    let releases = found.filter_map(|entry| Some(entry.ok()?.path())).filter(|dir| dir.join("firecracker").is_file());
    releases.max_by_key(|dir| (release(dir), dir.clone()))
}

/// The numbers of its name, in which 1.15 comes after 1.9.
fn release(dir: &Path) -> Vec<u32> {
    let name = dir.file_name().unwrap_or_default().to_string_lossy();
    name.split(|c: char| !c.is_ascii_digit()).filter_map(|number| number.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_fetched_release_is_taken() {
        let images = tempfile::tempdir().unwrap();
        assert_eq!(fetched(images.path()), None);
        let releases = images.path().join("firecracker");
        for release in ["v1.9.1", "v1.15.1", "v1.15.0", "notes"] {
            std::fs::create_dir_all(releases.join(release)).unwrap();
            std::fs::File::create(releases.join(release).join("firecracker")).unwrap();
        }
        // Half fetched.
        std::fs::create_dir(releases.join("v1.16.0")).unwrap();
        assert_eq!(fetched(images.path()), Some(releases.join("v1.15.1")));
    }
}
