//! The connection to the server, and what its failures mean.

use std::io::{self, IsTerminal as _};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clawpot_common::client;
use clawpot_common::v1::build_service_client::BuildServiceClient;
use clawpot_common::v1::event_service_client::EventServiceClient;
use clawpot_common::v1::host_service_client::HostServiceClient;
use clawpot_common::v1::image_service_client::ImageServiceClient;
use clawpot_common::v1::vm_service_client::VmServiceClient;
use clawpot_common::v1::volume_service_client::VolumeServiceClient;
use clawpot_common::v1::{GetHostRequest, Host};
use tonic::transport::Channel;
use tonic::{Code, Response, Status};

use crate::failure::Failure;

/// How long a listing or a wait tries to reach a server that went away meanwhile.
pub const RECONNECT: Duration = Duration::from_secs(60);

/// How long a server that is asked how it is may take to say so: far more than it needs.
const PATIENCE: Duration = Duration::from_secs(5);

/// After this long whoever sits at a terminal is told what is being waited for.
const SILENCE: Duration = Duration::from_secs(5);

/// A server that answered. The channel dials again by itself when the connection broke.
#[derive(Clone, Debug)]
pub struct Api {
    channel: Channel,
}

impl Api {
    pub async fn connect(socket: &Path) -> Result<Self, Failure> {
        let channel = client::connect(socket).await.map_err(|error| unreachable(&error.socket, io_cause(&error)))?;
        Ok(Self { channel })
    }

    pub fn vms(&self) -> VmServiceClient<Channel> {
        VmServiceClient::new(self.channel.clone())
    }

    pub fn events(&self) -> EventServiceClient<Channel> {
        EventServiceClient::new(self.channel.clone())
    }

    pub fn hosts(&self) -> HostServiceClient<Channel> {
        HostServiceClient::new(self.channel.clone())
    }

    /// The host, for those who ask how the server is: it has [`PATIENCE`] for the answer.
    pub async fn host(&self) -> Result<Host, Failure> {
        let doing = "asking the server about itself";
        let mut hosts = self.hosts();
        match tokio::time::timeout(PATIENCE, hosts.get_host(GetHostRequest {})).await {
            Ok(answer) => answer.map(Response::into_inner).map_err(|status| Failure::status(doing, &status)),
            Err(_) => Err(Failure::new(doing).because(format!("it took the connection, but did not answer within {PATIENCE:?}"))
                .hint("see what it does: `journalctl -u clawpot`; restart it: `sudo systemctl restart clawpot`; VMs go on running")),
        }
    }

    pub fn builds(&self) -> BuildServiceClient<Channel> {
        BuildServiceClient::new(self.channel.clone())
    }

    pub fn volumes(&self) -> VolumeServiceClient<Channel> {
        VolumeServiceClient::new(self.channel.clone())
    }

    pub fn images(&self) -> ImageServiceClient<Channel> {
        ImageServiceClient::new(self.channel.clone())
    }
}

/// Whether it is worth looking for the server again: the connection broke, or the server said that it cannot answer now.
pub fn is_lost(status: &Status) -> bool {
    is_broken(status) || status.code() == Code::Unavailable
}

/// Whether the connection broke: a status that the server sent has no source.
pub fn is_broken(status: &Status) -> bool {
    std::error::Error::source(status).is_some()
}

/// Growing pauses between attempts: 50 ms, doubled up to 1 s, until `limit` has passed since the first. Who waits for
/// longer than a moment is told why.
#[derive(Debug)]
pub struct Backoff {
    next: Duration,
    until: Instant,
    silent: bool,
}

impl Backoff {
    const LONGEST: Duration = Duration::from_secs(1);

    pub fn new(limit: Duration) -> Self {
        Self { next: Duration::from_millis(50), until: Instant::now() + limit, silent: false }
    }

    /// For who tells it in words of its own.
    pub fn silent(limit: Duration) -> Self {
        Self { silent: true, ..Self::new(limit) }
    }

    /// The next pause, or `None` when it is time to give up.
    pub fn pause(&mut self) -> Option<Duration> {
        let pause = self.next;
        self.next = (pause * 2).min(Self::LONGEST);
        let left = self.until.saturating_duration_since(Instant::now());
        if pause > left {
            return None;
        }
        if pause == Self::LONGEST && !std::mem::replace(&mut self.silent, true) {
            crate::output::note(&format!("the server does not answer; trying again for {} s", left.as_secs()));
        }
        Some(pause)
    }

    pub fn until(&self) -> Instant {
        self.until
    }
}

/// Calls until an answer comes, for requests that may be repeated. The pauses are those of [`Backoff`].
pub async fn retrying<T, F>(doing: &str, mut call: impl FnMut() -> F) -> Result<T, Failure>
where
    F: Future<Output = Result<Response<T>, Status>>,
{
    let mut backoff = Backoff::new(RECONNECT);
    loop {
        let status = match told_if_slow(doing, call()).await {
            Ok(answer) => return Ok(answer.into_inner()),
            Err(status) => status,
        };
        match backoff.pause().filter(|_| is_lost(&status)) {
            Some(pause) => tokio::time::sleep(pause).await,
            None => return Err(Failure::status(doing, &status)),
        }
    }
}

/// A server that hangs would look like a program that does.
async fn told_if_slow<T>(doing: &str, call: impl Future<Output = T>) -> T {
    let mut call = std::pin::pin!(call);
    tokio::select! {
        answer = &mut call => return answer,
        () = tokio::time::sleep(SILENCE) => {}
    }
    if io::stderr().is_terminal() {
        crate::output::note(&format!("{doing}: the server has not answered yet; waiting on"));
    }
    call.await
}

/// The innermost I/O error of a failed connection.
fn io_cause(error: &client::Unreachable) -> Option<&io::Error> {
    let mut found = None;
    let mut next: Option<&(dyn std::error::Error + 'static)> = std::error::Error::source(error);
    while let Some(cause) = next {
        found = cause.downcast_ref::<io::Error>().or(found);
        next = cause.source();
    }
    found
}

fn unreachable(socket: &Path, cause: Option<&io::Error>) -> Failure {
    let failure = Failure::new(format!("server on {}: connecting", socket.display()));
    let kind = cause.map(io::Error::kind);
    let meta = std::fs::symlink_metadata(socket);
    match (kind, meta) {
        (Some(io::ErrorKind::PermissionDenied), meta) => {
            let owner = meta.ok().map(|meta| group_name(meta.gid()));
            failure.because("you may not open this socket").hint(permission_hint(owner.as_deref()))
        }
        (_, Err(error)) if error.kind() == io::ErrorKind::NotFound => {
            failure.because("the socket does not exist: no server runs there").hint(START_HINT)
        }
        (_, Ok(meta)) if !meta.file_type().is_socket() => {
            failure.because("this is not a socket").hint("give the server's socket with --socket or CLAWPOT_SOCKET")
        }
        (Some(io::ErrorKind::ConnectionRefused), Ok(_)) => {
            failure.because("the socket exists but no server answers on it: it has stopped").hint(START_HINT)
        }
        _ => failure.because(cause.map_or_else(|| "no answer".to_owned(), ToString::to_string)).hint(START_HINT),
    }
}

const START_HINT: &str = "start one with `sudo systemctl start clawpot` or `sudo clawpot-server --state-dir DIR`; if it \
                          listens elsewhere, give --socket PATH or set CLAWPOT_SOCKET";

fn permission_hint(group: Option<&str>) -> String {
    match group {
        Some(group) if group != "root" => {
            format!("join its group: `sudo usermod -aG {group} $USER`, then log in again; or use sudo")
        }
        _ => "use sudo, or ask for the server's socket to belong to a group that you are in".to_owned(),
    }
}

/// The group's name, or its number where it has none.
fn group_name(gid: u32) -> String {
    let groups = std::fs::read_to_string(PathBuf::from("/etc/group")).unwrap_or_default();
    let name = groups.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)?.parse() == Ok(gid)).then(|| name.to_owned())
    });
    name.unwrap_or_else(|| gid.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_may_not_open_the_socket_learns_which_group_may() {
        assert!(permission_hint(Some("clawpot")).starts_with("join its group: `sudo usermod -aG clawpot $USER`"));
        assert!(permission_hint(Some("root")).starts_with("use sudo"));
        assert_eq!(group_name(0), "root");
        assert_eq!(group_name(4_123_456_789), "4123456789");
        let denied = unreachable(Path::new("/"), Some(&io::ErrorKind::PermissionDenied.into()));
        assert_eq!(denied.first_cause(), "you may not open this socket");
    }

    #[test]
    fn pauses_grow_and_end() {
        let mut backoff = Backoff::silent(Duration::from_secs(60));
        let pauses: Vec<_> = std::iter::from_fn(|| backoff.pause()).take(6).map(|pause| pause.as_millis()).collect();
        assert_eq!(pauses, [50, 100, 200, 400, 800, 1_000]);
        assert_eq!(Backoff::silent(Duration::ZERO).pause(), None);
    }
}
