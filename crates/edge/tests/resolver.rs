//! The real process, with a name server of the test's own as the host's. Needs root, says so and passes otherwise; all of it
//! happens in a network namespace that the test makes.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking, as tests do")]

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use clawpot_edge::{Kept, Resolver};
use clawpot_host::cgroup::Cgroups;
use clawpot_host::process::{Tool, User, find_program};
use hickory_proto::op::{Edns, Message, MessageType, Query, ResponseCode};
use hickory_proto::rr::rdata::{A, SOA, TXT};
use hickory_proto::rr::{Name, RData, Record, RecordType};

const ADDRESS: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 99);
const FIRST: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 1);
const SECOND: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 2);
const NOBODY: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 9);
/// Takes queries and never answers.
const SILENT: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 8);

const USER: User = User { uid: 1_999_999_999, gid: 1_999_999_999 };

struct World {
    root: tempfile::TempDir,
    resolver: Resolver,
    /// The names have moved meanwhile: the host's resolvers answer otherwise than before.
    moved: Arc<AtomicBool>,
    _silent: UdpSocket,
}

/// Runs a test on a host of its own.
fn on_host<F: Future<Output = ()>>(name: &'static str, test: impl FnOnce(Arc<World>) -> F + Send + 'static) {
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: needs root");
        return;
    }
    let host = std::thread::spawn(move || {
        // SAFETY: a network namespace only.
        unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) }.unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let ip = find_program("ip", None).unwrap();
        runtime.block_on(Tool::new(ip).args(["link", "set", "lo", "up"]).run()).unwrap();
        let world = Arc::new(runtime.block_on(async { World::new(name) }));
        let resolver = world.resolver.clone();
        let ended = std::panic::catch_unwind(AssertUnwindSafe(|| runtime.block_on(test(world))));
        // Also after a failure: the process outlives whoever started it.
        runtime.block_on(resolver.remove()).unwrap();
        assert!(!resolver.cgroup.exists().unwrap());
        if let Err(panic) = ended {
            std::panic::resume_unwind(panic);
        }
    });
    if let Err(panic) = host.join() {
        std::panic::resume_unwind(panic);
    }
}

impl World {
    fn new(name: &str) -> Self {
        let root = tempfile::tempdir().unwrap();
        // Its user must be able to get at resolv.conf, as it can at the host's.
        std::fs::set_permissions(root.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        let group = format!("clawpot-edge-test/{}-{name}", std::process::id());
        let moved = Arc::new(AtomicBool::new(false));
        serve_names(FIRST, Ipv4Addr::new(192, 0, 2, 1), &moved);
        serve_names(SECOND, Ipv4Addr::new(192, 0, 2, 2), &moved);
        let resolver = Resolver {
            program: env!("CARGO_BIN_EXE_clawpot-edge").into(),
            user: USER,
            address: ADDRESS,
            cgroup: Cgroups::find().unwrap().group(&group).unwrap(),
            log: root.path().join("resolver.log"),
            resolv_conf: root.path().join("resolv.conf"),
        };
        let world = Self { root, resolver, moved, _silent: UdpSocket::bind((SILENT, 53)).unwrap() };
        world.resolv_conf(&format!("nameserver {FIRST}\n"));
        world
    }

    fn resolv_conf(&self, text: &str) {
        clawpot_host::fs::replace(&self.resolver.resolv_conf, text.as_bytes(), 0o644).unwrap();
    }

    fn log(&self) -> String {
        std::fs::read_to_string(&self.resolver.log).unwrap()
    }

    fn pid(&self) -> u32 {
        let members = self.resolver.cgroup.members().unwrap();
        assert_eq!(members.len(), 1, "{}", self.log());
        members[0].pid
    }
}

/// The host's resolver: knows `host.test` (as `answer`), `long.test` (much), and nothing else.
fn serve_names(at: Ipv4Addr, answer: Ipv4Addr, moved: &Arc<AtomicBool>) {
    let (udp, tcp) = (UdpSocket::bind((at, 53)).unwrap(), TcpListener::bind((at, 53)).unwrap());
    let moved = Arc::clone(moved);
    let reply = move |bytes: &[u8], room: usize| {
        let answer = if moved.load(Ordering::Relaxed) { Ipv4Addr::new(192, 0, 2, 99) } else { answer };
        let query = Message::from_vec(bytes).unwrap();
        let mut reply = Message::response(query.metadata.id, query.metadata.op_code);
        reply.metadata.recursion_available = true;
        reply.add_queries(query.queries.clone());
        let question = query.queries[0].clone();
        let name = question.name().clone();
        match (name.to_lowercase().to_ascii().as_str(), question.query_type()) {
            ("host.test.", RecordType::A) => {
                reply.add_answer(Record::from_rdata(name, 60, RData::A(A(answer))));
            }
            ("host.test.", _) => {}
            ("long.test.", RecordType::TXT) => {
                for n in 0..20 {
                    let text = format!("{n:0200}");
                    reply.add_answer(Record::from_rdata(name.clone(), 60, RData::TXT(TXT::new(vec![text]))));
                }
            }
            _ => {
                reply.metadata.response_code = ResponseCode::NXDomain;
                let zone = Name::from_ascii("test.").unwrap();
                let soa = SOA::new(zone.clone(), zone.clone(), 1, 60, 60, 60, 60);
                reply.add_authority(Record::from_rdata(zone, 60, RData::SOA(soa)));
            }
        }
        let bytes = reply.to_vec().unwrap();
        if bytes.len() > room { reply.truncate().to_vec().unwrap() } else { bytes }
    };
    let by_udp = reply.clone();
    std::thread::spawn(move || {
        let mut bytes = [0; 4096];
        while let Ok((length, from)) = udp.recv_from(&mut bytes) {
            udp.send_to(&by_udp(&bytes[..length], 1232), from).unwrap();
        }
    });
    std::thread::spawn(move || {
        while let Ok((mut stream, _)) = tcp.accept() {
            let reply = reply.clone();
            std::thread::spawn(move || {
                while let Some(question) = read_frame(&mut stream) {
                    write_frame(&mut stream, &reply(&question, usize::MAX));
                }
            });
        }
    });
}

fn read_frame(stream: &mut TcpStream) -> Option<Vec<u8>> {
    let mut length = [0; 2];
    stream.read_exact(&mut length).ok()?;
    let mut bytes = vec![0; usize::from(u16::from_be_bytes(length))];
    stream.read_exact(&mut bytes).ok()?;
    Some(bytes)
}

fn write_frame(stream: &mut TcpStream, bytes: &[u8]) {
    let length = u16::try_from(bytes.len()).unwrap().to_be_bytes();
    stream.write_all(&[&length[..], bytes].concat()).unwrap();
}

fn query(name: &str, kind: RecordType) -> Message {
    let mut query = Message::query();
    query.metadata.recursion_desired = true;
    query.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
    query
}

/// From one of the guests.
fn ask_from(source: Ipv4Addr, query: &Message, patience: Duration) -> Option<Message> {
    let socket = UdpSocket::bind((source, 0)).unwrap();
    socket.set_read_timeout(Some(patience)).unwrap();
    socket.send_to(&query.to_vec().unwrap(), (ADDRESS, 53)).unwrap();
    let mut bytes = [0; 4096];
    let (length, from) = socket.recv_from(&mut bytes).ok()?;
    assert_eq!(from, SocketAddr::new(IpAddr::V4(ADDRESS), 53));
    let reply = Message::from_vec(&bytes[..length]).unwrap();
    assert_eq!((reply.metadata.id, reply.metadata.message_type), (query.metadata.id, MessageType::Response));
    Some(reply)
}

async fn ask(query: &Message) -> Message {
    let query = query.clone();
    let asked = tokio::task::spawn_blocking(move || ask_from(Ipv4Addr::LOCALHOST, &query, Duration::from_secs(60)));
    asked.await.unwrap().expect("an answer")
}

async fn ask_tcp(queries: Vec<Message>) -> Vec<Message> {
    let asked = tokio::task::spawn_blocking(move || {
        let mut stream = TcpStream::connect((ADDRESS, 53)).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let mut one = |query: Message| {
            write_frame(&mut stream, &query.to_vec().unwrap());
            Message::from_vec(&read_frame(&mut stream).unwrap()).unwrap()
        };
        queries.into_iter().map(&mut one).collect()
    });
    asked.await.unwrap()
}

fn addresses(reply: &Message) -> Vec<Ipv4Addr> {
    let address = |record: &Record| match record.data {
        RData::A(A(address)) => Some(address),
        _ => None,
    };
    reply.answers.iter().filter_map(address).collect()
}

#[test]
fn answers_as_the_hosts_resolver_does() {
    on_host("answers", |world| async move {
        assert_eq!(world.resolver.ensure().await.unwrap(), Kept::Started);

        let found = ask(&query("HoSt.test.", RecordType::A)).await;
        assert_eq!(addresses(&found), [Ipv4Addr::new(192, 0, 2, 1)]);
        assert!(found.metadata.recursion_available && found.metadata.recursion_desired);
        assert_eq!(found.queries[0].name().to_ascii(), "HoSt.test.", "the question as it was asked");
        world.moved.store(true, Ordering::Relaxed);
        let again = ask(&query("host.test.", RecordType::A)).await;
        assert_eq!(addresses(&again), [Ipv4Addr::new(192, 0, 2, 1)], "from the cache");

        let nothing = ask(&query("host.test.", RecordType::AAAA)).await;
        assert_eq!((nothing.metadata.response_code, nothing.answers.len()), (ResponseCode::NoError, 0));
        let unknown = ask(&query("nobody.test.", RecordType::A)).await;
        assert_eq!(unknown.metadata.response_code, ResponseCode::NXDomain);
        assert_eq!(unknown.authorities.len(), 1);

        // Too long for UDP, whole by TCP; and a second question on the same connection.
        let mut long = query("long.test.", RecordType::TXT);
        let mut edns = Edns::new();
        edns.set_max_payload(4096);
        long.set_edns(edns);
        let cut = ask(&long).await;
        assert!(cut.metadata.truncation && cut.answers.is_empty());
        let whole = ask_tcp(vec![long, query("host.test.", RecordType::A)]).await;
        assert_eq!((whole[0].answers.len(), whole[1].answers.len()), (20, 1));

        for (bad, code) in [
            (query("test.", RecordType::AXFR), ResponseCode::NotImp),
            (query("test.", RecordType::ANY), ResponseCode::NotImp),
            (Message::query(), ResponseCode::FormErr),
        ] {
            assert_eq!(ask(&bad).await.metadata.response_code, code);
        }
    });
}

#[test]
fn nonsense_gets_no_answer_and_does_no_harm() {
    on_host("nonsense", |world| async move {
        world.resolver.ensure().await.unwrap();
        let said = tokio::task::spawn_blocking(|| {
            let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
            socket.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
            let mut reply = query("host.test.", RecordType::A);
            reply.metadata.message_type = MessageType::Response;
            for bytes in [&b""[..], b"x", &[0xff; 11], &[0xff; 600], &reply.to_vec().unwrap()] {
                socket.send_to(bytes, (ADDRESS, 53)).unwrap();
            }
            let silent = socket.recv(&mut [0; 512]).is_err();
            socket.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
            // A header of a question and then nothing that it promises: a number to answer to.
            socket.send_to(&[1, 2, 1, 0, 0, 9, 0, 0, 0, 0, 0, 0], (ADDRESS, 53)).unwrap();
            let mut bytes = [0; 512];
            let length = socket.recv(&mut bytes).unwrap();
            // By TCP: longer than a question can be, and half of one.
            let mut stream = TcpStream::connect((ADDRESS, 53)).unwrap();
            stream.write_all(&[0xff, 0xff, 0]).unwrap();
            assert_eq!(stream.read(&mut [0; 1]).unwrap_or(0), 0);
            (silent, Message::from_vec(&bytes[..length]).unwrap())
        });
        let (silent, reply) = said.await.unwrap();
        assert!(silent);
        assert_eq!((reply.metadata.id, reply.metadata.response_code), (0x0102, ResponseCode::FormErr));
        assert_eq!(addresses(&ask(&query("host.test.", RecordType::A)).await).len(), 1);
    });
}

#[test]
fn follows_resolv_conf() {
    on_host("follows", |world| async move {
        world.resolver.ensure().await.unwrap();
        assert_eq!(addresses(&ask(&query("host.test.", RecordType::A)).await), [Ipv4Addr::new(192, 0, 2, 1)]);
        world.resolv_conf(&format!("# moved\nnameserver {SECOND}\n"));
        tokio::time::sleep(Duration::from_millis(1100)).await;
        assert_eq!(addresses(&ask(&query("host.test.", RecordType::A)).await), [Ipv4Addr::new(192, 0, 2, 2)]);

        // Names nobody: those known are kept, and it says so.
        world.resolv_conf("search example\n");
        tokio::time::sleep(Duration::from_millis(1100)).await;
        assert_eq!(ask(&query("other.test.", RecordType::A)).await.metadata.response_code, ResponseCode::NXDomain);
        assert!(world.log().contains("those known are kept"), "{}", world.log());

        // Nobody there: told so, and soon.
        world.resolv_conf(&format!("nameserver {NOBODY}\n"));
        tokio::time::sleep(Duration::from_millis(1100)).await;
        let start = Instant::now();
        assert_eq!(ask(&query("host.test.", RecordType::A)).await.metadata.response_code, ResponseCode::ServFail);
        // That it is before a guest asks again is by its own limit (`PATIENCE`); here a busy machine takes its time too.
        assert!(start.elapsed() < Duration::from_secs(30), "{:?}", start.elapsed());
    });
}

#[test]
fn one_guest_does_not_take_it_from_the_others() {
    on_host("limits", |world| async move {
        world.resolver.ensure().await.unwrap();
        ask(&query("host.test.", RecordType::A)).await;
        world.resolv_conf(&format!("nameserver {SILENT}\n"));
        tokio::time::sleep(Duration::from_millis(1100)).await;
        let codes = Arc::new(Mutex::new(Vec::new()));
        let greedy = tokio::task::spawn_blocking(move || {
            let socket = UdpSocket::bind((Ipv4Addr::new(127, 0, 1, 1), 0)).unwrap();
            for n in 0..2000 {
                let bytes = query(&format!("n{n}.test."), RecordType::A).to_vec().unwrap();
                socket.send_to(&bytes, (ADDRESS, 53)).unwrap();
            }
            socket
        })
        .await
        .unwrap();
        // While all those wait for an answer that does not come, another guest is heard.
        let codes_of = Arc::clone(&codes);
        tokio::task::spawn_blocking(move || {
            let refused = query("test.", RecordType::AXFR);
            // As a guest's resolver does, since the kernel drops what the greedy one's flood leaves no room for.
            let mut again =
                (0..60).map(|_| ask_from(Ipv4Addr::new(127, 0, 1, 2), &refused, Duration::from_millis(500)));
            let reply = again.find_map(|reply| reply).unwrap();
            codes_of.lock().unwrap().push(reply.metadata.response_code);
        })
        .await
        .unwrap();
        assert_eq!(*codes.lock().unwrap(), [ResponseCode::NotImp]);
        let open = std::fs::read_dir(format!("/proc/{}/fd", world.pid())).unwrap().count();
        assert!(open < 200, "{open} descriptors");
        drop(greedy);
    });
}

#[test]
fn has_no_privilege_and_is_kept_replaced_and_removed() {
    on_host("kept", |world| async move {
        let mut resolver = world.resolver.clone();
        let own = world.root.path().join("clawpot-edge");
        install(&resolver.program, &own);
        resolver.program = own.clone();
        assert_eq!(resolver.ensure().await.unwrap(), Kept::Started);
        assert_eq!(resolver.ensure().await.unwrap(), Kept::Running);
        let first = world.pid();
        let status = std::fs::read_to_string(format!("/proc/{first}/status")).unwrap();
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
            line.split_whitespace().map(str::to_owned).collect::<Vec<_>>()
        };
        assert_eq!(field("Uid:"), vec![USER.uid.to_string(); 4]);
        assert_eq!(field("Gid:"), vec![USER.gid.to_string(); 4]);
        assert_eq!(field("Groups:"), Vec::<String>::new());
        for caps in ["CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"] {
            assert_eq!(field(caps), ["0000000000000000"], "{caps}");
        }
        assert_eq!(field("NoNewPrivs:"), ["1"]);

        // An upgrade puts another file in its place.
        install(&world.resolver.program, &own);
        assert_eq!(resolver.ensure().await.unwrap(), Kept::Started);
        assert_ne!(world.pid(), first);
        // Its address moved with the instance's block.
        resolver.address = Ipv4Addr::new(127, 0, 0, 98);
        assert_eq!(resolver.ensure().await.unwrap(), Kept::Started);
        // It was killed.
        resolver.cgroup.kill().unwrap();
        resolver.cgroup.empty().await.unwrap();
        assert_eq!(resolver.ensure().await.unwrap(), Kept::Started);
        resolver.remove().await.unwrap();
        resolver.remove().await.unwrap();
        assert!(!resolver.cgroup.exists().unwrap());

        // Somebody else has the port of all addresses: said, with what to do.
        let taken = UdpSocket::bind((Ipv4Addr::new(127, 0, 0, 98), 53)).unwrap();
        let error = resolver.ensure().await.unwrap_err();
        assert_eq!(error.kind(), clawpot_types::Kind::FailedPrecondition);
        assert!(error.next_step().is_some());
        drop(taken);
    });
}

fn install(from: &Path, to: &PathBuf) {
    let temp = to.with_extension("new");
    clawpot_host::fs::clone_file(from, &temp).unwrap();
    std::fs::set_permissions(&temp, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    std::fs::rename(temp, to).unwrap();
}
