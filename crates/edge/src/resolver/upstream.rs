//! The host's own resolvers, as resolv.conf names them now.

use std::fs;
use std::net::{IpAddr, Ipv4Addr};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use hickory_proto::rr::{Name, RecordType};
use hickory_resolver::TokioResolver;
use hickory_resolver::config::{NameServerConfig, ResolveHosts, ResolverConfig, ResolverOpts};
use hickory_resolver::lookup::Lookup;
use hickory_resolver::net::NetError;
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::system_conf::parse_resolv_conf;

/// How often the file is looked at, at most.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// For one query at all servers, retries included. A guest's own resolver shall hear of the failure before it tries again.
const PATIENCE: Duration = Duration::from_millis(4500);

/// After which that one does: glibc's default.
const A_GUESTS_PATIENCE: Duration = Duration::from_secs(5);
const _: () = assert!(PATIENCE.as_millis() < A_GUESTS_PATIENCE.as_millis());

/// For one try at one server.
const ONE_TRY: Duration = Duration::from_secs(2);

/// Answers kept, of all guests together; a few MiB at most.
const CACHED: u64 = 2048;

#[derive(Debug)]
pub(super) struct Upstream {
    resolv_conf: PathBuf,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    resolver: Option<TokioResolver>,
    /// Which file the resolver was made from; `None`: it could not be read.
    stamp: Option<Stamp>,
    looked: Option<Instant>,
}

/// Changes when the file does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    file: (u64, u64),
    size: u64,
    changed: (i64, i64),
}

impl Upstream {
    pub(super) fn new(resolv_conf: PathBuf) -> Self {
        let state = State { resolver: None, stamp: None, looked: None };
        Self { resolv_conf, state: Mutex::new(state) }
    }

    /// An answer, or that there is none (`NetError::Dns`), or why nobody answered.
    pub(super) async fn lookup(&self, name: Name, kind: RecordType) -> Result<Lookup, NetError> {
        let resolver = self.resolver()?;
        tokio::time::timeout(PATIENCE, resolver.lookup(name, kind)).await.unwrap_or(Err(NetError::Timeout))
    }

    fn resolver(&self) -> Result<TokioResolver, NetError> {
        let mut state = self.state();
        if state.looked.is_none_or(|last| last.elapsed() >= LOOK_AGAIN) {
            state.looked = Some(Instant::now());
            let stamp = self.stamp();
            if state.resolver.is_none() || stamp != state.stamp {
                state.stamp = stamp;
                self.reload(&mut state)?;
            }
        }
        state.resolver.clone().ok_or(NetError::NoConnections)
    }

    /// What cannot be read, or names nobody, leaves what was; and at first the host itself, as resolv.conf(5) has it.
    fn reload(&self, state: &mut State) -> Result<(), NetError> {
        let path = self.resolv_conf.display();
        let read = fs::read(&self.resolv_conf).map_err(NetError::from).and_then(parse_resolv_conf);
        let (servers, options) = match read {
            Ok((config, options)) => (config.name_servers().to_vec(), options),
            Err(error) if state.resolver.is_some() => {
                tracing::warn!(%path, %error, "the host's resolvers cannot be read; those known are kept");
                return Ok(());
            }
            Err(error) => {
                tracing::warn!(%path, %error, "the host's resolvers cannot be read; asking 127.0.0.1");
                (vec![NameServerConfig::udp_and_tcp(IpAddr::V4(Ipv4Addr::LOCALHOST))], ResolverOpts::default())
            }
        };
        let names: Vec<String> = servers.iter().map(|server| server.ip.to_string()).collect();
        tracing::info!(%path, servers = names.join(" "), "asking these resolvers");
        let config = ResolverConfig::from_name_servers(servers);
        let mut builder = TokioResolver::builder_with_config(config, TokioRuntimeProvider::default());
        *builder.options_mut() = ours(&options);
        state.resolver = Some(builder.build()?);
        Ok(())
    }

    fn stamp(&self) -> Option<Stamp> {
        let meta = fs::metadata(&self.resolv_conf).ok()?;
        Some(Stamp { file: (meta.dev(), meta.ino()), size: meta.size(), changed: (meta.mtime(), meta.mtime_nsec()) })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Written whole, never half.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The file's options where they concern its servers; the rest is ours.
fn ours(file: &ResolverOpts) -> ResolverOpts {
    let mut options = ResolverOpts::default();
    options.timeout = file.timeout.min(ONE_TRY);
    options.attempts = file.attempts.clamp(1, 3);
    // The host's own names are the host's.
    options.use_hosts_file = ResolveHosts::Never;
    options.preserve_intermediates = true;
    options.try_tcp_on_error = true;
    options.cache_size = CACHED;
    options
}
