//! Images that are built of flakes in a VM: the `Workbench` port, the host's side of a build's files.
//!
//! - [`source`] the flake's directory comes as an archive, and becomes a disk by way of [`crate::unpack`]
//! - [`dump`] what a guest left on the disk of results is read by `debugfs`, confined as [`crate::unpack`] is
//! - [`log`] what builds said, kept behind them: `build-logs/<id>.log`
//! - [`result`] is it a kernel, is it a file system; then it is an image
//!
//! Below the state directory, each build in a directory of its own: `builds/<id>/{source.tar,source.ext4,output.ext4}`. It is
//! made before the VM is accepted, and goes when the VM is gone.

mod dump;
mod log;
mod result;
mod source;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use clawpot_core::VmmKind;
use clawpot_core::ports::{BoxStream, BuildName, ImageDetail, LaidOut, Revision, Source, Workbench};
use clawpot_host::fs;
use clawpot_types::{Digest, Error, Kind, MiB, Result, VmId};

use self::log::Logs;
use crate::build::Builder;
use crate::library::Library;
use crate::store::digest_of;
use crate::write::plain_name;

const SOURCE: &str = "source.ext4";
const OUTPUT: &str = "output.ext4";
const ARCHIVE: &str = "source.tar";

/// Over one store and one state directory. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Bench {
    library: Library,
    /// Its cache is on the file system of the state directory, where jails can link to what it makes.
    builder: Builder,
    dir: PathBuf,
    logs: Arc<Logs>,
    /// What this server's VMs run in.
    vmm: VmmKind,
}

impl Bench {
    /// `state` exists and belongs to this process alone. Blocks. Nothing is removed: builds' VMs may still be there.
    pub fn open(library: Library, helper: &Path, state: &Path, vmm: VmmKind) -> Result<Self> {
        let state = std::path::absolute(state)
            .map_err(|error| Error::io(format!("finding the state directory {}", state.display()), error))?;
        let dir = state.join("builds");
        fs::ensure_dir(&dir, 0o700)?;
        crate::build::sweep(&dir)?;
        let builder = Builder { helper: helper.to_owned(), cache: dir.clone() };
        let logs = Arc::new(Logs::open(&state)?);
        Ok(Self { library, builder, dir, logs, vmm })
    }

    fn of(&self, build: &VmId) -> PathBuf {
        self.dir.join(build.as_str())
    }

    async fn blocking<T: Send + 'static>(&self, work: impl FnOnce(&Self) -> Result<T> + Send + 'static) -> Result<T> {
        let this = self.clone();
        crate::build::blocking(move || work(&this)).await
    }

    /// `strict`: also where the name means an image that was built, which may turn out to be the same.
    fn may_name(&self, name: &BuildName, strict: bool) -> Result<()> {
        plain_name(&name.name)?;
        if name.replace {
            return Ok(());
        }
        match self.library.store.resolve(&name.name) {
            Ok((_, manifest)) if !strict && manifest.revision.is_some() => Ok(()),
            Ok((digest, _)) => {
                let what = format!("image name {}: it means {digest} already", name.name);
                Err(Error::new(Kind::AlreadyExists, what)
                    .hint("choose another with --tag, or give --replace to let it mean the new image"))
            }
            Err(error) if error.kind() == Kind::NotFound => Ok(()),
            Err(error) => Err(error),
        }
    }
}

#[async_trait]
impl Workbench for Bench {
    async fn may_call(&self, name: &BuildName) -> Result<()> {
        let name = name.clone();
        self.blocking(move |this| this.may_name(&name, false)).await
    }

    async fn receive(&self, build: &VmId, archive: BoxStream<Result<Bytes>>) -> Result<Source> {
        source::receive(self, build, archive).await
    }

    fn key(&self, source: &Source, attr: &str) -> Digest {
        // Each on a line of its own, none of which can hold another; the number changes with what a result is made of.
        let lock = source.lock.as_ref().map_or("", Digest::as_str);
        digest_of(format!("clawpot build 1\n{}\n{lock}\n{attr}\n", source.digest).as_bytes())
    }

    async fn known(&self, key: Option<&Digest>, name: &BuildName) -> Result<Option<ImageDetail>> {
        let (key, name) = (key.cloned(), name.clone());
        self.blocking(move |this| {
            let store = &this.library.store;
            store.prepare()?;
            let held = store.lock()?;
            let found = match &key {
                Some(key) => store.made_of(key)?,
                None => None,
            };
            let Some((image, _)) = found else {
                return this.may_name(&name, true).map(|()| None);
            };
            store.set_name(&name.name, &image, name.replace, &held)?;
            drop(held);
            store.describe(&name.name).map(Some)
        })
        .await
    }

    async fn lay_out(&self, build: &VmId, size: MiB) -> Result<LaidOut> {
        let dir = self.of(build);
        let made = dir.clone();
        self.blocking(move |_| fs::ensure_dir(&made, 0o700)).await?;
        let output = dir.join(OUTPUT);
        format_output(&output, size).await?;
        let (mut disks, mut sources) = (vec![output], MiB(0));
        if let Some(source) = source::disk(self, &dir).await? {
            let meta = std::fs::metadata(&source);
            let size = meta.map_err(|error| Error::io(format!("looking at {}", source.display()), error))?.len();
            sources = MiB(size.div_ceil(1 << 20));
            disks.push(source);
        }
        Ok(LaidOut { disks, sources })
    }

    async fn take(&self, build: &VmId, revision: Revision, name: &BuildName) -> Result<ImageDetail> {
        result::take(self, build, revision, name).await
    }

    async fn clear(&self, build: &VmId) -> Result<()> {
        let dir = self.of(build);
        self.blocking(move |_| fs::remove_tree_if_exists(&dir)).await
    }

    async fn write_log(&self, build: &VmId, text: String) -> Result<()> {
        let build = build.clone();
        self.blocking(move |this| this.logs.add(&build, &text)).await
    }

    async fn read_log(&self, build: &VmId) -> Result<BoxStream<Result<Bytes>>> {
        let build = build.clone();
        let file = self.blocking(move |this| this.logs.open_one(&build)).await?;
        Ok(log::stream(file))
    }

    async fn left(&self) -> Result<Vec<VmId>> {
        self.blocking(|this| {
            let failed = |error| Error::io(format!("listing {}", this.dir.display()), error);
            let mut builds = Vec::new();
            for entry in std::fs::read_dir(&this.dir).map_err(failed)? {
                // Whatever bears another name is no build.
                builds.extend(entry.map_err(failed)?.file_name().to_string_lossy().parse::<VmId>().ok());
            }
            builds.sort();
            Ok(builds)
        })
        .await
    }
}

/// Without a journal: what was synced is there, and nobody replays anything.
async fn format_output(path: &Path, size: MiB) -> Result<()> {
    let made = crate::disks::make_ext4(path, size, "build-out", &["-O".as_ref(), "^has_journal".as_ref()]).await;
    made.map_err(|error| error.context(format!("making the disk of results {}", path.display())))
}
