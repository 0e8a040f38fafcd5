use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use clawpot_core::ports::Net as _;
use clawpot_types::guest::{
    GATEWAY_ADDRESS, GUEST_ADDRESS, GUEST_MAC, MANAGEMENT_ADDRESS, MANAGEMENT_MAC, MANAGEMENT_TAP, TAP,
};
use clawpot_types::{InstanceId, Slot};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
use rustix::thread::{UnshareFlags, unshare_unsafe};

use crate::kernel::link::{self, End, Mac, Own};
use crate::kernel::netlink::Netlink;
use crate::kernel::tap;
use crate::{Claim, Paths, SlotNet, host_facts, instance};

/// The host's uplink, the internet's end of it, and addresses behind that.
pub(super) const HOST: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 2);
pub(super) const INTERNET: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);
pub(super) const PUBLIC: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 10);
pub(super) const PRIVATE: [Ipv4Addr; 4] = [
    Ipv4Addr::new(10, 9, 9, 9),
    Ipv4Addr::new(172, 16, 3, 3),
    Ipv4Addr::new(192, 168, 5, 5),
    Ipv4Addr::new(169, 254, 169, 254),
];

/// Everything that listens, listens here.
pub(super) const PORT: u16 = 7;

/// What does not answer by then is silent.
pub(super) const PATIENCE: Duration = Duration::from_millis(300);
/// And so long it is asked again where it is to answer: far more than that ever takes.
pub(super) const LONG: Duration = Duration::from_secs(30);

/// Runs a test as "the host". Skips visibly where that is not possible.
pub(super) fn on_host<F: Future<Output = ()>>(test: impl FnOnce(World) -> F + Send + 'static) {
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: needs root");
        return;
    }
    let host = std::thread::spawn(move || {
        isolate(UnshareFlags::NEWNET | UnshareFlags::NEWNS);
        mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
        std::fs::create_dir_all("/run/netns").unwrap();
        mount("tmpfs", "/run/netns", "tmpfs", MountFlags::empty(), None).unwrap();
        let world = World::new();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(test(world));
    });
    if let Err(panic) = host.join() {
        std::panic::resume_unwind(panic);
    }
}

fn isolate(flags: UnshareFlags) {
    // SAFETY: namespaces only; the thread shares no descriptor table afterwards that it shared before.
    unsafe { unshare_unsafe(flags) }.unwrap();
}

pub(super) struct World {
    root: tempfile::TempDir,
    _internet: Servers,
    _host: Servers,
}

impl World {
    fn new() -> Self {
        let mut host = Netlink::route().unwrap();
        link::up(&mut host, "lo").unwrap();
        sysctl("net/ipv4/ip_forward", "1");
        let (netns, internet) = std::thread::spawn(|| {
            isolate(UnshareFlags::NEWNET);
            (clawpot_host::netns::current().unwrap(), Netlink::route().unwrap())
        })
        .join()
        .unwrap();
        let mut internet = internet;
        let near = End { name: "uplink", mac: [2, 0, 0, 0, 0, 1] };
        link::add_veth(&mut host, &near, &End { name: "world", mac: [2, 0, 0, 0, 0, 2] }, netns.as_fd()).unwrap();
        give(&mut host, "uplink", HOST, 24);
        give(&mut internet, "world", INTERNET, 24);
        link::up(&mut internet, "lo").unwrap();
        for address in PRIVATE.into_iter().chain([PUBLIC]) {
            let index = link::index(&mut internet, "lo").unwrap();
            link::add_address(&mut internet, &Own { index, address, prefix: 32 }, None).unwrap();
        }
        let index = link::index(&mut host, "uplink").unwrap();
        link::add_default_route(&mut host, index, INTERNET).unwrap();
        let everywhere: Vec<_> = PRIVATE.into_iter().chain([PUBLIC, INTERNET]).map(|ip| (ip, PORT)).collect();
        let servers = inside(&netns, move || Servers::start(&everywhere));
        Self { root: tempfile::tempdir().unwrap(), _internet: servers, _host: Servers::start(&[(HOST, PORT)]) }
    }

    pub(super) fn blocks(&self) -> PathBuf {
        self.root.path().join("blocks")
    }

    pub(super) fn claim(&self, name: &str) -> Claim {
        let state = self.root.path().join(name);
        std::fs::create_dir_all(&state).unwrap();
        let instance = instance::read_or_create(&state).unwrap();
        let facts = host_facts(Path::new(crate::NETNS_DIR)).unwrap();
        Claim::take(&self.blocks(), &instance, &state, &facts).unwrap()
    }

    /// A server's view: started, or started again.
    pub(super) async fn open(&self, name: &str) -> SlotNet {
        SlotNet::open(self.claim(name), paths()).await.unwrap()
    }

    pub(super) fn instance(&self, name: &str) -> InstanceId {
        instance::read(&self.root.path().join(name)).unwrap().unwrap()
    }
}

pub(super) fn paths() -> Paths {
    let nft = clawpot_host::process::find_program("nft", None).unwrap();
    Paths { netns_dir: crate::NETNS_DIR.into(), nft }
}

pub(super) fn sysctl(key: &str, value: &str) {
    std::fs::File::options()
        .write(true)
        .open(Path::new("/proc/sys").join(key))
        .unwrap()
        .write_all(value.as_bytes())
        .unwrap();
}

fn give(netlink: &mut Netlink, name: &str, address: Ipv4Addr, prefix: u8) {
    let index = link::index(netlink, name).unwrap();
    link::add_address(netlink, &Own { index, address, prefix }, None).unwrap();
    link::up(netlink, name).unwrap();
}

/// Runs `work` on a new thread inside.
pub(super) fn inside<T: Send>(netns: &OwnedFd, work: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        scope
            .spawn(|| {
                let kind = Some(rustix::thread::LinkNameSpaceType::Network);
                rustix::thread::move_into_link_name_space(netns.as_fd(), kind).unwrap();
                work()
            })
            .join()
            .unwrap()
    })
}

/// UDP and TCP that answer with the address they were asked from.
pub(super) struct Servers {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Servers {
    pub(super) fn start(places: &[(Ipv4Addr, u16)]) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let mut threads = Vec::new();
        for place in places {
            let (udp, tcp) = (UdpSocket::bind(place).unwrap(), TcpListener::bind(place).unwrap());
            udp.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
            tcp.set_nonblocking(true).unwrap();
            let stop = Arc::clone(&stop);
            threads.push(std::thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    if let Ok((_, from)) = udp.recv_from(&mut [0; 64]) {
                        drop(udp.send_to(from.ip().to_string().as_bytes(), from));
                    }
                    if let Ok((mut stream, from)) = tcp.accept() {
                        drop(stream.write_all(from.ip().to_string().as_bytes()));
                    }
                }
            }));
        }
        Self { stop, threads }
    }
}

impl Drop for Servers {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            drop(thread.join());
        }
    }
}

/// A Linux "machine" behind a slot's taps: a netns whose NICs are joined to them frame by frame.
pub(super) struct Guest {
    netns: OwnedFd,
    stop: Arc<AtomicBool>,
    cables: Vec<JoinHandle<()>>,
}

impl Guest {
    pub(super) fn start(net: &SlotNet, slot: Slot) -> Self {
        let slot = clawpot_host::netns::open(&net.seat(slot).unwrap().netns).unwrap();
        let (netns, nics) = std::thread::spawn(|| {
            isolate(UnshareFlags::NEWNET);
            let nics = [nic("eth0", GUEST_MAC, GUEST_ADDRESS), nic("eth1", MANAGEMENT_MAC, MANAGEMENT_ADDRESS)];
            let mut netlink = Netlink::route().unwrap();
            let index = link::index(&mut netlink, "eth0").unwrap();
            link::add_default_route(&mut netlink, index, GATEWAY_ADDRESS).unwrap();
            (clawpot_host::netns::current().unwrap(), nics)
        })
        .join()
        .unwrap();
        let taps = inside(&slot, || [TAP, MANAGEMENT_TAP].map(plug));
        inside(&slot, || [TAP, MANAGEMENT_TAP].map(until_running));
        let stop = Arc::new(AtomicBool::new(false));
        let cables = nics
            .into_iter()
            .zip(taps)
            .map(|(nic, tap)| {
                let stop = Arc::clone(&stop);
                std::thread::spawn(move || cable(&nic, &tap, &stop))
            })
            .collect();
        Self { netns, stop, cables }
    }

    pub(super) fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        inside(&self.netns, work)
    }

    /// What the other side says our address is, by TCP. For what is to answer: else it takes long.
    pub(super) fn tcp(&self, ip: Ipv4Addr, port: u16) -> Option<String> {
        again(|| self.tcp_once(ip, port))
    }

    /// The same by UDP.
    pub(super) fn udp(&self, ip: Ipv4Addr, port: u16) -> Option<String> {
        again(|| self.udp_once(ip, port))
    }

    pub(super) fn reaches(&self, ip: Ipv4Addr, port: u16) -> bool {
        again(|| self.tcp_once(ip, port).or_else(|| self.udp_once(ip, port))).is_some()
    }

    /// Neither by TCP nor by UDP.
    pub(super) fn hears_nothing_of(&self, ip: Ipv4Addr, port: u16) -> bool {
        self.tcp_once(ip, port).is_none() && self.udp_once(ip, port).is_none()
    }

    fn tcp_once(&self, ip: Ipv4Addr, port: u16) -> Option<String> {
        self.run(|| {
            let mut stream = TcpStream::connect_timeout(&SocketAddr::new(IpAddr::V4(ip), port), PATIENCE).ok()?;
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            let mut text = String::new();
            stream.read_to_string(&mut text).ok()?;
            Some(text)
        })
    }

    fn udp_once(&self, ip: Ipv4Addr, port: u16) -> Option<String> {
        self.run(|| {
            let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
            socket.set_read_timeout(Some(PATIENCE)).unwrap();
            socket.connect((ip, port)).ok()?;
            socket.send(b"?").ok()?;
            let mut bytes = [0; 64];
            let length = socket.recv(&mut bytes).ok()?;
            Some(String::from_utf8_lossy(&bytes[..length]).into_owned())
        })
    }

    /// Which of them it reaches; all are tried at once, since what is dropped in silence takes its time.
    pub(super) fn which<'a>(&self, targets: &[(&'a str, Ipv4Addr)]) -> Vec<&'a str> {
        std::thread::scope(|scope| {
            let tries: Vec<_> = targets
                .iter()
                .map(|(what, ip)| {
                    (what, [scope.spawn(|| self.tcp_once(*ip, PORT)), scope.spawn(|| self.udp_once(*ip, PORT))])
                })
                .collect();
            let reached = |tries: [std::thread::ScopedJoinHandle<'_, Option<String>>; 2]| {
                tries.map(|one| one.join().unwrap()).into_iter().flatten().count() > 0
            };
            tries.into_iter().filter_map(|(what, tries)| reached(tries).then_some(*what)).collect()
        })
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for cable in self.cables.drain(..) {
            drop(cable.join());
        }
    }
}

pub(super) fn again<T>(ask: impl Fn() -> Option<T>) -> Option<T> {
    let begun = Instant::now();
    std::iter::repeat_with(ask)
        .take_while(|answer| answer.is_some() || begun.elapsed() < LONG)
        .find_map(|answer| answer)
}

fn plug(name: &str) -> OwnedFd {
    let file = tap::open().unwrap();
    tap::attach(&file, name).unwrap();
    rustix::io::ioctl_fionbio(&file, true).unwrap();
    file.into()
}

/// The kernel lets a tap send only a moment after it was opened; what comes before is lost.
fn until_running(name: &str) {
    const IFF_RUNNING: u32 = 0x40;
    let mut netlink = Netlink::route().unwrap();
    for _ in 0..30_000 {
        let message = rtnetlink::LinkUnspec::new_with_name(name).build();
        let mut flags = 0;
        let get = rtnetlink::packet_route::RouteNetlinkMessage::GetLink(message);
        netlink.get(get, |payload| flags = u32::from_ne_bytes(payload[8..12].try_into().unwrap())).unwrap();
        if flags & IFF_RUNNING != 0 {
            return;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    panic!("{name} does not come up");
}

fn nic(name: &str, mac: Mac, address: Ipv4Addr) -> OwnedFd {
    let file = plug(name);
    let mut netlink = Netlink::route().unwrap();
    link::set_mac(&mut netlink, name, mac).unwrap();
    give(&mut netlink, name, address, 30);
    file
}

fn cable(a: &OwnedFd, b: &OwnedFd, stop: &AtomicBool) {
    let mut frame = vec![0; 70_000];
    while !stop.load(Ordering::Relaxed) {
        let mut fds = [PollFd::new(a, PollFlags::IN), PollFd::new(b, PollFlags::IN)];
        let timeout = Timespec { tv_sec: 0, tv_nsec: 20_000_000 };
        poll(&mut fds, Some(&timeout)).unwrap();
        for (from, to) in [(a, b), (b, a)] {
            while let Ok(length) = rustix::io::read(from, &mut frame[..]) {
                // A frame that does not fit is lost, as on any cable.
                rustix::io::write(to, &frame[..length]).unwrap_or_default();
            }
        }
    }
}
