//! A VM's `CONNECT` socket, with a server in a network namespace in the guest's place. Needs root and `ip`; says so when
//! skipped.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

mod common;

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use clawpot_core::MachineId;
use clawpot_host::netns::in_netns;
use clawpot_host::process::find_program;
use clawpot_host::{connect, unix};
use clawpot_types::Error;
use clawpot_vmm::relay::{Guest, Relays};
use common::{Netns, Place, needs_root};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixStream};

struct World {
    place: Place,
    netns: Netns,
    id: MachineId,
    relays: Relays,
    /// Longer than a socket's address may be.
    socket: PathBuf,
    exit: Option<tokio::sync::oneshot::Sender<()>>,
}

impl World {
    async fn new() -> Option<Self> {
        if !needs_root() {
            return None;
        }
        if let Err(error) = find_program("ip", None) {
            eprintln!("SKIPPED: {}", error.chain());
            return None;
        }
        let (place, netns) = (Place::new(), Netns::new().await);
        let dir = place.file(&"long".repeat(50));
        std::fs::create_dir(&dir).unwrap();
        let id = place.machine().id;
        let mut world = Self { socket: dir.join("v.sock"), place, netns, id, relays: Relays::default(), exit: None };
        world.serve();
        Some(world)
    }

    fn serve(&mut self) {
        let (exit, exited) = tokio::sync::oneshot::channel();
        let guest = Guest { netns: self.netns.path.clone(), address: Ipv4Addr::LOCALHOST };
        let exited = async {
            exited.await.ok();
        };
        self.relays.serve(&self.id, &self.socket, guest, exited).unwrap();
        self.exit = Some(exit);
    }

    /// Something in the guest that listens, and where.
    fn listen(&self) -> (TcpListener, u32) {
        let listening = in_netns(&self.netns.path, || {
            std::net::TcpListener::bind("127.0.0.1:0").map_err(|error| Error::io("listening", error))
        });
        let listener = listening.unwrap();
        listener.set_nonblocking(true).unwrap();
        let listener = TcpListener::from_std(listener).unwrap();
        let port = listener.local_addr().unwrap().port();
        (listener, port.into())
    }

    async fn dial(&self) -> UnixStream {
        unix::connect(&self.socket).await.unwrap()
    }

    async fn connect(&self, port: u32) -> UnixStream {
        let mut client = self.dial().await;
        connect::connect(&mut client, port).await.unwrap();
        client
    }

    async fn pair(&self, listener: &TcpListener, port: u32) -> (UnixStream, TcpStream) {
        let (client, accepted) = tokio::join!(self.connect(port), listener.accept());
        (client, accepted.unwrap().0)
    }

    /// TCP sockets in the namespace that are not listeners.
    fn sockets(&self) -> usize {
        let table = in_netns(&self.netns.path, || {
            std::fs::read_to_string("/proc/thread-self/net/tcp").map_err(|error| Error::io("reading", error))
        });
        table.unwrap().lines().skip(1).filter(|line| line.split_whitespace().nth(3) != Some("0A")).count()
    }

    async fn end(self) {
        self.relays.finish(&self.id).await;
        self.relays.finish(&self.id).await;
        assert!(unix::connect(&self.socket).await.is_err());
        drop(self.place);
    }
}

fn noise(len: usize, seed: u32) -> Vec<u8> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state.to_be_bytes()[0]
    };
    (0..len).map(|_| next()).collect()
}

#[tokio::test]
async fn bytes_go_both_ways_and_each_way_ends_by_itself() {
    let Some(world) = World::new().await else { return };
    let (listener, port) = world.listen();
    let mut client = world.dial().await;
    // In pieces, and the first bytes for the guest right behind.
    for piece in ["CONN", &format!("ECT {port}"), "\nearly"] {
        client.write_all(piece.as_bytes()).await.unwrap();
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let (guest, from) = listener.accept().await.unwrap();
    let mut answer = [0; 9];
    client.read_exact(&mut answer).await.unwrap();
    let SocketAddr::V4(from) = from else { panic!("not IPv4") };
    assert_eq!(std::str::from_utf8(&answer).unwrap(), format!("OK {}\n", from.port()), "the host's end is named");

    let (up, down) = (noise(24 << 20, 1), noise(24 << 20, 2));
    let (mut guest_reads, mut guest_writes) = guest.into_split();
    let (mut client_reads, mut client_writes) = client.into_split();
    let started = Instant::now();
    let (mut sent, mut received) = (Vec::new(), Vec::new());
    let told = async {
        client_writes.write_all(&up).await.unwrap();
        client_writes.shutdown().await.unwrap();
    };
    let heard = async {
        guest_reads.read_to_end(&mut sent).await.unwrap();
        // The client has ended its way; ours goes on.
        guest_writes.write_all(&down).await.unwrap();
        guest_writes.shutdown().await.unwrap();
    };
    tokio::join!(told, heard, async { client_reads.read_to_end(&mut received).await.unwrap() });
    eprintln!("48 MiB within {:?}", started.elapsed());
    assert!(sent.strip_prefix(b"early").unwrap() == up && received == down);

    // The guest ends its way first.
    let (mut client, mut guest) = world.pair(&listener, port).await;
    guest.write_all(b"bye").await.unwrap();
    guest.shutdown().await.unwrap();
    let mut text = String::new();
    client.read_to_string(&mut text).await.unwrap();
    client.write_all(b"good bye").await.unwrap();
    drop(client);
    guest.read_to_string(&mut text).await.unwrap();
    assert_eq!(text, "byegood bye");
    world.end().await;
}

#[tokio::test]
async fn what_leads_nowhere_is_closed_without_a_word() {
    let Some(world) = World::new().await else { return };
    let (listener, port) = world.listen();
    drop(listener);
    let long = "CONNECT 1".repeat(10);
    for line in ["CONNECT 0", "CONNECT 65536", "CONNECT -1", "CONNECT 4294967296", "GET / HTTP/1.1", "", &long] {
        let mut client = world.dial().await;
        client.write_all(format!("{line}\n").as_bytes()).await.unwrap();
        assert_eq!(client.read(&mut [0; 8]).await.unwrap_or(0), 0, "{line}");
    }
    let mut client = world.dial().await;
    assert!(connect::connect(&mut client, port).await.is_err(), "nobody listens there");
    world.end().await;
}

#[tokio::test]
async fn a_client_that_says_nothing_is_closed() {
    let Some(world) = World::new().await else { return };
    let mut client = world.dial().await;
    client.write_all(b"CONNECT 1").await.unwrap();
    // From here on time stands still but for the relay's own patience.
    tokio::time::pause();
    let started = tokio::time::Instant::now();
    assert_eq!(client.read(&mut [0; 8]).await.unwrap_or(0), 0);
    assert_eq!(started.elapsed().as_secs(), 5);
    tokio::time::resume();
    world.end().await;
}

#[tokio::test]
async fn connections_are_counted() {
    let Some(world) = World::new().await else { return };
    let (listener, port) = world.listen();
    let mut open = Vec::new();
    for _ in 0..128 {
        open.push(world.pair(&listener, port).await);
    }
    let mut one_more = world.dial().await;
    assert!(connect::connect(&mut one_more, port).await.is_err());
    // Both sides of one go, and there is room again.
    drop(open.pop());
    common::until("room", async || {
        let mut client = world.dial().await;
        connect::connect(&mut client, port).await.is_ok()
    })
    .await;
    world.end().await;
}

#[tokio::test]
async fn a_side_that_goes_is_noticed() {
    let Some(world) = World::new().await else { return };
    let (listener, port) = world.listen();
    // What a client wrote before it went reaches the guest. That one says nothing and never closes; the connection is not
    // kept for it.
    let (mut client, mut guest) = world.pair(&listener, port).await;
    let said = noise(200_000, 3);
    client.write_all(&said).await.unwrap();
    drop(client);
    let mut heard = Vec::new();
    guest.read_to_end(&mut heard).await.unwrap();
    assert!(heard == said);
    let started = Instant::now();
    common::until("the end of the connection", async || world.sockets() == 0).await;
    eprintln!("ended after {:?}", started.elapsed());
    guest.write_all(b"anybody there?").await.unwrap_err();

    // The guest's side breaks.
    let (mut client, guest) = world.pair(&listener, port).await;
    guest.set_zero_linger().unwrap();
    drop(guest);
    assert_eq!(client.read(&mut [0; 8]).await.unwrap_or(0), 0);
    world.end().await;
}

#[tokio::test]
async fn it_ends_with_its_machine_and_holds_nothing() {
    let Some(mut world) = World::new().await else { return };
    let (listener, port) = world.listen();
    let (mut client, guest) = world.pair(&listener, port).await;
    let (_unread, silent) = world.pair(&listener, port).await;
    silent.try_write(&vec![7; 4 << 20]).unwrap();
    world.relays.finish(&world.id).await;
    assert_eq!(client.read(&mut [0; 8]).await.unwrap_or(0), 0);
    drop((guest, silent));
    // The kernel may have the last words of a connection still to deliver. One that lingers does so for a minute.
    let soon = Instant::now() + Duration::from_secs(15);
    while world.sockets() > 0 {
        assert!(Instant::now() < soon, "a socket outlives its machine and holds the namespace");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }

    // Another daemon serves it again, though the old one's file is there.
    assert!(world.socket.exists());
    world.relays = Relays::default();
    world.serve();
    world.pair(&listener, port).await;
    // Again: the same goes on.
    let exit = world.exit.take();
    world.serve();
    let (mut client, _guest) = world.pair(&listener, port).await;
    // The VMM is gone, and nobody has removed the machine yet.
    exit.unwrap().send(()).unwrap();
    assert_eq!(client.read(&mut [0; 8]).await.unwrap_or(0), 0);
    common::until("the end", async || unix::connect(&world.socket).await.is_err()).await;
    world.end().await;
}
