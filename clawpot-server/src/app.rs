//! The composition root: the only place that names a driver. Order matters: the lock before anything else, the store before
//! what it speaks of, the doors last.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use clawpot_agent_client::{AgentClient, BuilderClient};
use clawpot_control::{Builds, Deps, Service};
use clawpot_core::ports::{Clock as _, ImageLibrary as _};
use clawpot_image::{Bench, Library, LocalImages, LocalVolumes};
use clawpot_net::{Claim, SlotNet};
use clawpot_store::{SqliteStore, StateLock};
use clawpot_types::{Error, InstanceId, Kind, Result};
use clawpot_vmm::console::Consoles;
use tracing::{info, warn};

use crate::api::host::About;
use crate::chance::{RandomIds, WallClock};
use crate::config::Config;
use crate::resolver::{self, Keeper};
use crate::room::ThisHost;
use crate::vmms;

#[derive(Debug)]
pub struct App {
    pub service: Service,
    pub about: About,
    pub library: Library,
    pub builds: Builds,
    net: Arc<SlotNet>,
    resolver: Option<Keeper>,
    /// Held as long as the server lives.
    lock: StateLock,
}

impl App {
    /// Finds everything that is there and brings the server up to where it can answer.
    pub async fn start(config: &Config) -> Result<Self> {
        need_root()?;
        let lock = StateLock::acquire(&config.state_dir)?;
        let instance = clawpot_net::instance::read_or_create(&config.state_dir)?;
        let store = Arc::new(SqliteStore::open(&lock, clawpot_store::Options::default())?);
        let images = LocalImages::open(&config.image_dir, &config.state_dir)?;
        warn_of_two_file_systems(config);
        let library = images.library(&unpacker()?, config.image_room);
        let volumes = LocalVolumes::open(&config.state_dir, &unpacker()?)?;
        let consoles = Consoles::new(&config.state_dir);
        let vmms::Chosen { vmms, reason } = vmms::choose(config, &instance, &images, &consoles).await?;
        let bench = Bench::open(library.clone(), &unpacker()?, &config.state_dir, vmms.default().capabilities().kind)?;
        let net = Arc::new(network(config, &instance).await?);
        let resolver = match Keeper::start(config, &instance, net.resolver()).await {
            Ok(keeper) => Some(keeper),
            Err(error) => {
                warn!(error = error.chain(), "no resolver: VMs resolve no names");
                None
            }
        };
        info!(%instance, vmm = %vmms.default().capabilities().kind, reason, "starting");
        let deps = Deps {
            store: store.clone(),
            events: store,
            images: Arc::new(images),
            volumes: Arc::new(volumes),
            net: net.clone(),
            vmms,
            console: Arc::new(consoles),
            guest: Arc::new(AgentClient::new()),
            clock: Arc::new(WallClock),
            ids: Arc::new(RandomIds),
            room: Arc::new(ThisHost::new(&config.state_dir)),
            boot_id: clawpot_host::boot_id()?,
            settings: config.control.clone(),
        };
        let service = clawpot_control::start(deps).await?;
        // What VMs are made of is told anew: the state directory may have moved.
        if let Some(live) = crate::api::image::live(&service)
            && let Err(error) = library.hold(Some(live)).await
        {
            warn!(error = error.chain(), "telling other servers which images are used");
        }
        let builds = Builds::new(service.clone(), Arc::new(bench), Arc::new(BuilderClient));
        tokio::spawn(builds.clear_up());
        let about = About { instance, vmm_reason: reason, started_at: WallClock.now() };
        Ok(Self { service, about, library, builds, net, resolver, lock })
    }

    /// The last thing. VMs keep what they need; where there is none, nothing of this instance stays on the host.
    /// What was queued is on disk when the store is dropped.
    pub async fn close(mut self) -> Result<()> {
        // A machine that no record knows runs on as one that has a record does, until its grace time is over.
        let left = if self.service.records().count() == 0 && !self.service.may_have_strays() {
            self.give_up().await
        } else {
            self.resolver.iter().for_each(Keeper::leave);
            Ok(())
        };
        drop(self.builds);
        drop(self.service);
        drop(self.lock);
        left
    }

    async fn give_up(&mut self) -> Result<()> {
        if let Some(resolver) = &mut self.resolver {
            resolver.remove().await?;
        }
        self.library.hold(None).await?;
        self.net.give_up().await
    }
}

/// `clawpot-unpack`, which stands beside this program. Only a pull, an import and a volume that was not unmounted miss it.
fn unpacker() -> Result<PathBuf> {
    let own = std::env::current_exe().map_err(|error| Error::io("finding this program", error))?;
    Ok(own.with_file_name("clawpot-unpack"))
}

/// VMs that live are adopted all the same, so it is no reason to end here.
fn warn_of_two_file_systems(config: &Config) {
    use std::os::unix::fs::MetadataExt as _;
    let device = |path: &Path| std::fs::metadata(path).map(|meta| meta.dev()).ok();
    let (images, state) = (&config.image_dir, &config.state_dir);
    if device(images) != device(state) {
        warn!(
            images = %images.display(),
            state = %state.display(),
            "images and state are on two file systems: no VM can be made until both are on one"
        );
    }
}

async fn network(config: &Config, instance: &InstanceId) -> Result<SlotNet> {
    let netns_dir = Path::new(clawpot_net::NETNS_DIR);
    let facts = clawpot_net::host_facts(netns_dir)?;
    let claim = Claim::take(Path::new(clawpot_net::BLOCKS_DIR), instance, &config.state_dir, &facts)?;
    let nft = clawpot_host::process::find_program("nft", std::env::var_os("PATH").as_deref())
        .map_err(|error| error.context("the network of VMs needs nft").hint("apt-get install nftables"))?;
    SlotNet::open(claim, clawpot_net::Paths { netns_dir: netns_dir.to_owned(), nft }).await
}

fn need_root() -> Result<()> {
    if rustix::process::geteuid().is_root() {
        return Ok(());
    }
    Err(Error::new(
        Kind::PermissionDenied,
        "clawpot-server: it makes namespaces, taps and cgroups, which only root may",
    )
    .hint("run it with sudo, or as a systemd unit"))
}

/// `clawpot-server clear-host`. A server that ends leaves VMs that are stopped the addresses they know and a resolver; of these
/// nothing stays. What they are stays: their records and disks, and the hold on their images.
///
/// # Errors
/// `FailedPrecondition`: a server or a VM runs; nothing was touched then.
pub async fn clear_host(config: &Config) -> Result<()> {
    need_root()?;
    let Some(instance) = clawpot_net::instance::read(&config.state_dir)? else {
        // No server ever ran here.
        return Ok(());
    };
    let lock = StateLock::acquire(&config.state_dir)?;
    let net = network(config, &instance).await?;
    let seat = net.resolver();
    // It looks for VMs first.
    net.give_up().await?;
    resolver::remove(config, &instance, seat).await?;
    drop(lock);
    Ok(())
}

/// `clawpot-server backup FILE`.
pub fn backup(config: &Config, to: &Path) -> Result<()> {
    clawpot_store::backup(&config.state_dir, to)?;
    println!("{}", to.display());
    Ok(())
}
