//! Which VMMs this host has, and which of them new VMs get (DESIGN §7: `--vmm auto`). A driver that is here, chosen or not,
//! adopts the VMs that an earlier server started with it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use clawpot_control::Vmms;
use clawpot_core::VmmKind;
use clawpot_core::ports::Vmm;
use clawpot_host::process::find_program;
use clawpot_image::LocalImages;
use clawpot_types::{Error, InstanceId, Result, release};
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
        qemu: qemu.as_ref().map(|qemu| qemu.capabilities().version).map_err(why_not),
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
    let firecracker = firecracker.as_ref().map_err(why_not)?;
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

/// The directory of the newest release beside the images of which there is a program.
fn fetched(image_dir: &Path) -> Option<PathBuf> {
    let dir = image_dir.join(release::FETCHED);
    let names = std::fs::read_dir(&dir).ok()?.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let whole = |name: &String| find_program(&dir.join(name).join("firecracker").to_string_lossy(), None).is_ok();
    release::newest(names.filter(whole)).map(|name| dir.join(name))
}

/// Why a driver is not there, and what to do about that, as the end of a sentence that names it.
fn why_not(error: &Error) -> String {
    let chain = error.chain();
    let why = chain.strip_prefix("looking for Firecracker: ").unwrap_or(&chain);
    error.next_step().map_or_else(|| why.to_owned(), |next| format!("{why} ({next})"))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn the_newest_fetched_release_is_taken() {
        let images = tempfile::tempdir().unwrap();
        assert_eq!(fetched(images.path()), None);
        let releases = images.path().join("firecracker");
        for (release, mode) in [("v1.9.1", 0o755), ("v1.15.1", 0o755), ("v1.15.0", 0o755), ("v1.17.0", 0o644)] {
            std::fs::create_dir_all(releases.join(release)).unwrap();
            let program = releases.join(release).join("firecracker");
            std::fs::File::create(&program).unwrap();
            std::fs::set_permissions(program, PermissionsExt::from_mode(mode)).unwrap();
        }
        // Half fetched, as is one that cannot be run.
        std::fs::create_dir(releases.join("v1.16.0")).unwrap();
        assert_eq!(fetched(images.path()), Some(releases.join("v1.15.1")));
    }

    #[tokio::test]
    async fn why_there_is_no_firecracker_is_said_once_with_what_to_do() {
        let state = tempfile::tempdir().unwrap();
        let settings = firecracker::Config {
            program: Some("/nonexistent/firecracker".into()),
            jailer: None,
            probe_limit: None,
            path: None,
        };
        let instance = InstanceId::from_random([1; InstanceId::LEN]);
        let none = Firecracker::new(state.path(), &instance, Consoles::new(state.path()), &settings).await;
        assert_eq!(
            identify(&none).await.unwrap_err(),
            "the program /nonexistent/firecracker is not the absolute path of an executable file (install Firecracker's release, \
             or configure the path of firecracker)"
        );
    }
}
