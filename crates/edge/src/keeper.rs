//! The server's side of the resolver: one process in a cgroup of its own, which is how it is found again.

use std::ffi::OsString;
use std::fs::File;
use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::PathBuf;
use std::time::Duration;

use clawpot_host::cgroup::{Cgroup, Limits, Member};
use clawpot_host::process::{Identity, Output, Rlimits, Spawn, User, is_alive};
use clawpot_types::{Error, Kind, Result};
use rustix::net::sockopt::set_socket_recv_buffer_size_force;

const PORT: u16 = 53;

/// In-flight queries have a socket each at most, and there are connections, both ways.
const DESCRIPTORS: u64 = 2048;

/// Bytes of queries that wait while the process is busy: a burst of some thousand, of all guests.
const RECEIVE_BUFFER: usize = 1 << 20;

/// For a killed process to be gone, and for a new one to be there whole.
const GONE: Duration = Duration::from_secs(5);

/// The resolver as it should be. Makes nothing by itself.
#[derive(Clone, Debug)]
pub struct Resolver {
    /// `clawpot-edge`, absolute.
    pub program: PathBuf,
    /// Nobody else's.
    pub user: User,
    /// Of the host's; there already.
    pub address: Ipv4Addr,
    /// Nobody else is in it.
    pub cgroup: Cgroup,
    /// Where it writes; bounded.
    pub log: PathBuf,
    /// [`crate::resolver::RESOLV_CONF`], or another file that its user can read.
    pub resolv_conf: PathBuf,
}

/// What [`Resolver::ensure`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kept {
    /// It ran as it should.
    Running,
    /// It did not, or another program or address was wanted.
    Started,
}

impl Resolver {
    /// A living resolver of this program at this address. Cheap when there is one; to be repeated, for it may die. While
    /// one is replaced its guests wait some milliseconds.
    ///
    /// `FailedPrecondition`: somebody else has the port; `NotFound`: no program.
    pub async fn ensure(&self) -> Result<Kept> {
        let what = || format!("keeping the resolver at {}", self.address);
        if self.runs_as_wanted().await.map_err(|error| error.context(what()))? {
            return Ok(Kept::Running);
        }
        self.end().await.map_err(|error| error.context(what()))?;
        let keeper = self.clone();
        let started = tokio::task::spawn_blocking(move || keeper.start())
            .await
            .unwrap_or_else(|error| Err(Error::new(Kind::Internal, "starting it").because(error)));
        if let Err(error) = started {
            let error = error.context(what());
            // An empty group of its own is all that may be there.
            return match self.end().await {
                Ok(()) => Err(error),
                Err(left) => Err(error.and_cleanup(left)),
            };
        }
        Ok(Kept::Started)
    }

    /// No process and no cgroup is left of it; its log stays.
    pub async fn remove(&self) -> Result<()> {
        self.end().await
    }

    /// Exactly one process, with the program's present file and the wanted arguments.
    async fn runs_as_wanted(&self) -> Result<bool> {
        let members = self.cgroup.members()?;
        let [member] = &members[..] else { return Ok(false) };
        let program = std::fs::metadata(&self.program)
            .map_err(|error| Error::io(format!("looking at {}", self.program.display()), error))?;
        let identity = match Identity::of(member.pid) {
            Ok(identity) => identity,
            Err(error) if error.kind() == Kind::NotFound => return Ok(false),
            Err(error) => return Err(error),
        };
        Ok(identity.exe == (program.dev(), program.ino()) && cmdline(member).await == self.cmdline())
    }

    /// The group goes too: once a group was killed, Linux (6.18 seen) kills whatever is born into it afterwards.
    async fn end(&self) -> Result<()> {
        self.cgroup.kill()?;
        tokio::time::timeout(GONE, self.cgroup.empty()).await.unwrap_or_else(|_| {
            Err(Error::new(Kind::Timeout, format!("ending the resolver: it does not die within {} s", GONE.as_secs())))
        })?;
        self.cgroup.remove().await
    }

    fn start(&self) -> Result<()> {
        let (udp, tcp) = self.bind()?;
        let log = File::options()
            .append(true)
            .create(true)
            .mode(0o640)
            .open(&self.log)
            .map_err(|error| Error::io(format!("opening {}", self.log.display()), error))?;
        self.cgroup.create(&Limits::default())?;
        let child = Spawn::new(&self.program)
            .args(self.args())
            .user(self.user)
            .cwd("/")
            .cgroup(&self.cgroup)?
            .fd(udp, 3)
            .fd(tcp, 4)
            .stderr(Output::To(log.into()))
            .rlimits(Rlimits { nofile: DESCRIPTORS, ..Rlimits::default() })
            .spawn()?;
        tracing::info!(pid = child.pid(), address = %self.address, "resolver started");
        Ok(())
    }

    /// Of this address and no other: an answer sent from a socket bound to "any" would bear the address of the link it
    /// leaves by, and no guest would take it.
    fn bind(&self) -> Result<(OwnedFd, OwnedFd)> {
        let failed = |error: std::io::Error| {
            let what = format!("listening at {}:{PORT}", self.address);
            match error.kind() {
                std::io::ErrorKind::AddrInUse => Error::new(Kind::FailedPrecondition, what)
                    .because(error)
                    .hint("something else on this host listens on port 53 of all addresses; bind it to its own"),
                _ => Error::io(what, error),
            }
        };
        let udp = UdpSocket::bind((self.address, PORT)).map_err(failed)?;
        let tcp = TcpListener::bind((self.address, PORT)).map_err(failed)?;
        // A request: on a kernel that refuses, the default serves too.
        set_socket_recv_buffer_size_force(&udp, RECEIVE_BUFFER).unwrap_or_default();
        Ok((udp.into(), tcp.into()))
    }

    fn args(&self) -> Vec<OsString> {
        let mut args: Vec<OsString> =
            ["resolver", "--fd", "3", "--fd", "4", "--address"].into_iter().map(Into::into).collect();
        args.push(self.address.to_string().into());
        args.push("--resolv-conf".into());
        args.push(self.resolv_conf.clone().into());
        args
    }

    /// As `/proc/PID/cmdline` shows it.
    fn cmdline(&self) -> Vec<u8> {
        let program = self.program.as_os_str().to_owned();
        let words = std::iter::once(program).chain(self.args());
        words.flat_map(|word| [word.as_bytes(), &[0]].concat()).collect()
    }
}

/// Of a process that lives. Empty for a moment after exec: the kernel closes our pipe before it lays the arguments down. On a
/// busy machine the moment is longer than a look or two, and a resolver that was taken for another's would be started again.
async fn cmdline(process: &Member) -> Vec<u8> {
    let laid_down = async {
        loop {
            let bytes = std::fs::read(format!("/proc/{}/cmdline", process.pid)).unwrap_or_default();
            if !bytes.is_empty() || !is_alive(&process.pidfd).unwrap_or(false) {
                return bytes;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(GONE, laid_down).await.unwrap_or_default()
}
