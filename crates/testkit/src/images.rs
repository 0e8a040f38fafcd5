//! `Images` over the fake host.

use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use clawpot_core::ports::{BootFiles, ImageConfig, ImageDetail, ImageInfo, Images, MachineDefaults, UnreadableImage};
use clawpot_core::{ImagePin, VmmKind};
use clawpot_types::{Digest, Error, ImageRef, Kind, MiB, Result, VmId};

use crate::faults::{Line, Method};
use crate::host::{Disk, FakeHost, FakeProcess};

#[derive(Debug)]
pub struct FakeImages {
    host: Arc<FakeHost>,
    line: Line,
}

impl FakeImages {
    /// Of the daemon that lives now.
    #[must_use]
    pub fn new(host: &Arc<FakeHost>) -> Self {
        Self { host: Arc::clone(host), line: host.faults.line() }
    }
}

#[async_trait]
impl Images for FakeImages {
    async fn resolve(&self, image: &ImageRef) -> Result<ImagePin> {
        let work = || {
            let inventory = self.host.lock();
            let found = match image {
                ImageRef::Name(name) => inventory.images.get(name).map(|(digest, _)| digest),
                ImageRef::Digest(digest) => inventory.images.values().map(|(known, _)| known).find(|d| *d == digest),
            };
            let names: Vec<&str> = inventory.images.keys().map(String::as_str).collect();
            found.map(|digest| ImagePin { digest: digest.clone() }).ok_or_else(|| {
                let hint = format!("images here: {}", names.join(", "));
                Error::new(Kind::NotFound, format!("image {image}: not here")).hint(hint)
            })
        };
        self.line.call(Method::ImagesResolve, work).await
    }

    async fn describe(&self, image: &ImageRef) -> Result<ImageDetail> {
        let digest = self.resolve(image).await?.digest;
        let info = ImageInfo {
            name: image.to_string(),
            digest,
            size_bytes: 1 << 20,
            created_at: crate::time::START,
            format: "ext4".to_owned(),
        };
        let (config, machine) = (ImageConfig::default(), MachineDefaults::default());
        Ok(ImageDetail {
            info,
            names: vec![image.to_string()],
            config,
            machine,
            kernel: None,
            source: None,
            revision: None,
        })
    }

    async fn look(&self, pin: &ImagePin) -> Result<Option<()>> {
        let work = || {
            let inventory = self.host.lock();
            Ok(inventory.images.values().any(|(digest, verified)| *digest == pin.digest && *verified).then_some(()))
        };
        self.line.call(Method::ImagesLook, work).await
    }

    async fn ensure(&self, pin: &ImagePin) -> Result<BootFiles> {
        let work = || {
            self.host.change(|inventory| {
                let image = inventory.images.values_mut().find(|(digest, _)| *digest == pin.digest);
                let Some((_, verified)) = image else {
                    return Err(Error::new(Kind::NotFound, format!("image {}: gone", pin.digest)));
                };
                *verified = true;
                Ok(BootFiles {
                    kernel: "/fake/kernel".into(),
                    kernel_digest: Digest::from_sha256(&[0xce; 32]),
                    initramfs: "/fake/initramfs".into(),
                    rootfs: "/fake/rootfs".into(),
                })
            })
        };
        self.line.call(Method::ImagesEnsure, work).await
    }

    async fn boots(&self, _: &ImagePin, _: VmmKind) -> Result<()> {
        Ok(())
    }

    async fn list(&self) -> Result<(Vec<ImageInfo>, Vec<UnreadableImage>)> {
        let inventory = self.host.lock();
        let info = |(name, (digest, _)): (&String, &(Digest, bool))| ImageInfo {
            name: name.clone(),
            digest: digest.clone(),
            size_bytes: 1 << 20,
            created_at: crate::time::START,
            format: "ext4".to_owned(),
        };
        Ok((inventory.images.iter().map(info).collect(), Vec::new()))
    }

    fn disk_path(&self, vm: &VmId) -> PathBuf {
        format!("/fake/disks/{vm}").into()
    }

    async fn look_disk(&self, vm: &VmId) -> Result<Option<()>> {
        let work = || Ok(self.host.lock().disks.contains_key(vm).then_some(()));
        self.line.call(Method::ImagesLookDisk, work).await
    }

    async fn create_disk(&self, vm: &VmId, size: MiB) -> Result<PathBuf> {
        let work = || {
            self.host.change(|inventory| {
                inventory.disks_made += 1;
                let serial = inventory.disks_made;
                inventory.disks.entry(vm.clone()).or_insert(Disk { size, serial });
            });
            Ok(self.disk_path(vm))
        };
        self.line.call(Method::ImagesCreateDisk, work).await
    }

    async fn remove_disk(&self, vm: &VmId) -> Result<()> {
        let work = || {
            self.host.change(|inventory| {
                let lives = |process: &FakeProcess| matches!(process, FakeProcess::Lives { .. });
                if inventory.machines.iter().any(|(id, machine)| id.vm == *vm && lives(&machine.process)) {
                    inventory.violation(format!("the disk of {vm} was removed under its living VMM"));
                }
                inventory.disks.remove(vm);
            });
            Ok(())
        };
        self.line.call(Method::ImagesRemoveDisk, work).await
    }
}
