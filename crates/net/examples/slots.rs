//! What slots cost, from the first to the thousandth: made, given out, removed, and what a packet pays for the others.
//! Everything happens in namespaces of the bench's own; the machine's links and rules are not touched.
//!
//! `sudo target/release/examples/slots [SLOTS [FILE.json]]`, built by `cargo build --release -p clawpot-net --example slots`

// A bench says what went wrong by panicking.
#![allow(clippy::unwrap_used, reason = "not production code")]

use std::io::Write as _;
use std::net::{Ipv4Addr, UdpSocket};
use std::path::Path;
use std::time::{Duration, Instant};

use clawpot_core::ports::Net as _;
use clawpot_host::process::Tool;
use clawpot_net::{Claim, Paths, SlotNet, host_facts, instance};
use clawpot_types::Slot;
use clawpot_types::guest::{GATEWAY_MAC, GUEST_ADDRESS, GUEST_MAC, TAP};
use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
use rustix::thread::{UnshareFlags, unshare_unsafe};
use serde_json::{Value, json};

/// Slots in a step: the figures of each step are told apart, or a slope would hide in the mean.
const STEP: u32 = 100;
/// Where the guest's packets go; an address of the bench's own "internet".
const PUBLIC: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 10);
const PORT: u16 = 9;
const PACKETS: u32 = 20_000;

fn main() {
    let mut words = std::env::args().skip(1);
    let slots: u32 = words.next().map_or(1000, |text| text.parse().unwrap());
    let file = words.next();
    // SAFETY: the only thread there is; namespaces only.
    unsafe { unshare_unsafe(UnshareFlags::NEWNET | UnshareFlags::NEWNS) }.unwrap();
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
    std::fs::create_dir_all(clawpot_net::NETNS_DIR).unwrap();
    mount("tmpfs", clawpot_net::NETNS_DIR, "tmpfs", MountFlags::empty(), None).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let found = runtime.block_on(measure(slots));
    println!("{}", serde_json::to_string_pretty(&found).unwrap());
    if let Some(file) = file {
        let text = format!("{}\n", serde_json::to_string_pretty(&found).unwrap());
        clawpot_host::fs::replace(Path::new(&file), text.as_bytes(), 0o644).unwrap();
    }
}

async fn measure(slots: u32) -> Value {
    internet().await;
    let home = tempfile::tempdir().unwrap();
    let facts = host_facts(Path::new(clawpot_net::NETNS_DIR)).unwrap();
    let id = instance::read_or_create(home.path()).unwrap();
    let claim = Claim::take(&home.path().join("blocks"), &id, home.path(), &facts).unwrap();
    let nft = clawpot_host::process::find_program("nft", None).unwrap();
    let net = SlotNet::open(claim, Paths { netns_dir: clawpot_net::NETNS_DIR.into(), nft }).await.unwrap();

    net.ensure(Slot(0)).await.unwrap();
    let alone = packet(&net).await;
    let mut steps = Vec::new();
    let mut made = 1;
    let memory = kernel_kib();
    while made < slots {
        let end = (made + STEP).min(slots);
        let (mut cold, cpu) = (Vec::new(), cpu_time());
        for n in made..end {
            cold.push(timed(net.ensure(Slot(n))).await);
        }
        let cpu = millis((cpu_time() - cpu) / (end - made));
        let made_ms = figures(&mut cold);
        steps.push(json!({"slots": end, "made_ms": made_ms, "cpu_ms": cpu, "packet_us": packet(&net).await}));
        made = end;
    }
    let memory = kernel_kib().saturating_sub(memory) / u64::from(slots.max(2) - 1);
    let (warm, transactions, runs) = warm(&net, made).await;
    let (before, cpu) = (Instant::now(), cpu_time());
    let all: Vec<_> = (0..net.slots()).map(|n| net.remove(Slot(n))).collect();
    for removed in futures_join(all).await {
        removed.unwrap();
    }
    let (removed, cpu) = (before.elapsed(), cpu_time() - cpu);
    net.give_up().await.unwrap();
    json!({
        "slots": slots,
        "cpus": std::thread::available_parallelism().unwrap().get(),
        "load_at_end": std::fs::read_to_string("/proc/loadavg").unwrap().split(' ').next(),
        "kernel": rustix::system::uname().release().to_string_lossy(),
        "packet_us_with_one_slot": alone,
        "made": steps,
        "kernel_memory_kib_per_slot": memory,
        "given_warm_ms": warm,
        "nft_transactions_per_warm_slot": transactions,
        "nft_runs_per_warm_slot": runs,
        "all_removed_at_once_ms": millis(removed),
        "all_removed_at_once_cpu_ms": millis(cpu),
    })
}

/// Some slots more, made ready first: what a create pays.
async fn warm(net: &SlotNet, from: u32) -> (Value, f64, f64) {
    let wanted: Vec<Slot> = (from..net.slots()).take(20).map(Slot).collect();
    net.warm(&wanted).await;
    while net.list().await.unwrap().len() < wanted.len() + usize::try_from(from).unwrap() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // The last is listed before it is ready.
    tokio::time::sleep(Duration::from_millis(200)).await;
    let (transactions, runs) = (net.nft_transactions(), net.nft_runs());
    let mut times = Vec::new();
    for slot in &wanted {
        times.push(timed(net.ensure(*slot)).await);
    }
    let each = |count: u64| f64::from(u32::try_from(count).unwrap()) / f64::from(u32::try_from(wanted.len()).unwrap());
    (figures(&mut times), each(net.nft_transactions() - transactions), each(net.nft_runs() - runs))
}

async fn timed(work: impl Future<Output = clawpot_types::Result<()>>) -> Duration {
    let start = Instant::now();
    work.await.unwrap();
    start.elapsed()
}

async fn futures_join<T: Send + 'static>(all: Vec<impl Future<Output = T>>) -> Vec<T> {
    let mut all: Vec<_> = all.into_iter().map(|one| (Box::pin(one), None)).collect();
    std::future::poll_fn(move |context| {
        for (one, output) in all.iter_mut().filter(|(_, output)| output.is_none()) {
            if let std::task::Poll::Ready(value) = one.as_mut().poll(context) {
                *output = Some(value);
            }
        }
        if all.iter().any(|(_, output)| output.is_none()) {
            return std::task::Poll::Pending;
        }
        std::task::Poll::Ready(all.iter_mut().filter_map(|(_, output)| output.take()).collect())
    })
    .await
}

/// µs that a small UDP packet takes from the tap of slot 0 to a socket behind the host: all of it is done by the kernel
/// while the frame is written.
async fn packet(net: &SlotNet) -> f64 {
    let taps = clawpot_host::tap::open(&net.seat(Slot(0)).unwrap().netns, &[TAP]).unwrap();
    let mut tap = std::fs::File::from(taps.into_iter().next().unwrap());
    // The link lets through what is written a moment after it was opened.
    tokio::time::sleep(Duration::from_millis(300)).await;
    let frame = frame();
    let start = Instant::now();
    for _ in 0..PACKETS {
        tap.write_all(&frame).unwrap();
    }
    (start.elapsed() / PACKETS).as_secs_f64() * 1e6
}

/// A virtio-net header of nothing, Ethernet, IPv4, UDP without a checksum, eight bytes.
fn frame() -> Vec<u8> {
    let mut ip = vec![0x45, 0, 0, 36, 0, 0, 0x40, 0, 64, 17, 0, 0];
    ip.extend(GUEST_ADDRESS.octets().into_iter().chain(PUBLIC.octets()));
    let sum: u32 = ip.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1])).sum();
    let folded = !u16::try_from((sum & 0xffff) + (sum >> 16)).unwrap();
    ip[10..12].copy_from_slice(&folded.to_be_bytes());
    let udp =
        [&40_000_u16.to_be_bytes()[..], &PORT.to_be_bytes(), &16_u16.to_be_bytes(), &[0; 2], b"12345678"].concat();
    [&[0; 10][..], &GATEWAY_MAC, &GUEST_MAC, &[8, 0], &ip, &udp].concat()
}

/// A namespace behind an uplink, with a socket that takes what comes.
async fn internet() {
    let ip = clawpot_host::process::find_program("ip", None).unwrap();
    std::fs::File::options().write(true).open("/proc/sys/net/ipv4/ip_forward").unwrap().write_all(b"1").unwrap();
    let batch = "link set lo up\nlink add uplink type veth peer name world netns internet\n\
                 addr add 203.0.113.2/24 dev uplink\nlink set uplink up\n";
    run(&ip, &["netns", "add", "internet"], "").await;
    run(&ip, &["-batch", "-"], batch).await;
    let there =
        format!("link set lo up\naddr add {PUBLIC}/32 dev lo\naddr add 203.0.113.1/24 dev world\nlink set world up\n");
    run(&ip, &["-n", "internet", "-batch", "-"], &there).await;
    run(&ip, &["-batch", "-"], "route add default via 203.0.113.1\n").await;
    let socket = clawpot_host::netns::in_netns(Path::new("/run/netns/internet"), || {
        UdpSocket::bind((PUBLIC, PORT)).map_err(|error| clawpot_types::Error::io("listening", error))
    });
    let socket = socket.unwrap();
    std::thread::spawn(move || while socket.recv(&mut [0; 64]).is_ok() {});
}

async fn run(program: &Path, words: &[&str], input: &str) {
    Tool::new(program).args(words).input(input).run().await.unwrap();
}

fn figures(times: &mut [Duration]) -> Value {
    times.sort_unstable();
    let at = |percent: usize| times.get(times.len().saturating_sub(1) * percent / 100).copied().map(millis);
    json!({"n": times.len(), "p50": at(50), "p90": at(90), "min": at(0), "max": at(100)})
}

/// What this process had of the CPUs, the kernel's work for it included: hardly longer when others want them too.
fn cpu_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec.try_into().unwrap(), time.tv_nsec.try_into().unwrap())
}

/// Milliseconds, to the microsecond.
fn millis(time: Duration) -> f64 {
    f64::from(u32::try_from(time.as_micros()).unwrap_or(u32::MAX)) / 1000.0
}

/// The kernel's own memory: what a namespace costs, and little else changes while the bench runs.
fn kernel_kib() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap();
    let of = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)).map_or("0", str::trim);
    ["Slab:", "Percpu:"].map(|name| of(name).split(' ').next().unwrap().parse::<u64>().unwrap()).iter().sum()
}
