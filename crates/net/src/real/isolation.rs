use std::net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::time::Duration;

use clawpot_core::ports::Net as _;
use clawpot_host::netns::connect_tcp_in;
use clawpot_host::process::Tool;
use clawpot_types::Slot;
use clawpot_types::guest::{AGENT_PORT, GATEWAY_ADDRESS, MANAGEMENT_ADDRESS, MANAGEMENT_HOST_ADDRESS};

use super::world::{Guest, HOST, INTERNET, LONG, PORT, PRIVATE, PUBLIC, Servers, inside, on_host, paths};
use crate::SlotNet;
use crate::kernel::conntrack;
use crate::rules::slot::CONNECTIONS;

/// What must hold whatever the host's rules are.
fn reaches_nothing_forbidden(net: &SlotNet, guest: &Guest, slot: Slot, sibling: Slot) {
    let own = net.seat(slot).unwrap().address;
    let forbidden = [
        ("RFC 1918, 10/8", PRIVATE[0]),
        ("RFC 1918, 172.16/12", PRIVATE[1]),
        ("RFC 1918, 192.168/16", PRIVATE[2]),
        ("metadata", PRIVATE[3]),
        ("the host's uplink", HOST),
        ("the host's end", Ipv4Addr::from_bits(own.to_bits() - 1)),
        ("the resolver's other ports", net.resolver().address),
        ("a sibling", net.seat(sibling).unwrap().address),
        ("the gateway's other ports", GATEWAY_ADDRESS),
        ("the management gateway", MANAGEMENT_HOST_ADDRESS),
        ("itself by its slot address", own),
    ];
    assert_eq!(guest.which(&forbidden), [""; 0]);
}

#[test]
fn a_guest_reaches_the_world_and_the_resolver_and_nothing_else() {
    on_host(|world| async move {
        let net = world.open("a").await;
        let (slot, other) = (Slot(7), Slot(8));
        for slot in [slot, other] {
            net.ensure(slot).await.unwrap();
        }
        let address = net.seat(slot).unwrap().address.to_string();
        let resolver = net.resolver().address;
        let _resolver = Servers::start(&[(resolver, 53), (resolver, PORT)]);
        let (guest, sibling) = (Guest::start(&net, slot), Guest::start(&net, other));

        // The world sees the host, the resolver sees the slot.
        for guest in [&guest, &sibling] {
            for ip in [PUBLIC, INTERNET] {
                assert_eq!(guest.tcp(ip, PORT).as_deref(), Some("203.0.113.2"));
                assert_eq!(guest.udp(ip, PORT).as_deref(), Some("203.0.113.2"));
            }
        }
        assert_eq!(guest.udp(GATEWAY_ADDRESS, 53), Some(address.clone()));
        assert_eq!(guest.tcp(GATEWAY_ADDRESS, 53), Some(address));

        let _listening = sibling.run(|| Servers::start(&[(Ipv4Addr::UNSPECIFIED, PORT)]));
        reaches_nothing_forbidden(&net, &guest, slot, other);

        // Somebody flushes all the host's rules: the way out is gone, the walls are not.
        Tool::new(paths().nft).args(["flush", "ruleset"]).run().await.unwrap();
        reaches_nothing_forbidden(&net, &guest, slot, other);
        // The next transaction finds out and brings everybody's back; without one, the background does.
        net.ensure(Slot(9)).await.unwrap();
        assert_eq!(guest.tcp(PUBLIC, PORT).as_deref(), Some("203.0.113.2"));
        Tool::new(paths().nft).args(["flush", "ruleset"]).run().await.unwrap();
        let shop = net.shop();
        shop.table.restore_if_lost(&shop.nft, &shop.site).await.unwrap();
        assert_eq!(guest.tcp(PUBLIC, PORT).as_deref(), Some("203.0.113.2"));
        assert_eq!(sibling.tcp(PUBLIC, PORT).as_deref(), Some("203.0.113.2"));
    });
}

#[test]
fn a_slot_that_is_cut_off_reaches_nobody_whatever_becomes_of_the_hosts_rules() {
    on_host(|world| async move {
        let net = world.open("a").await;
        let (slot, other) = (Slot(7), Slot(8));
        net.ensure_cut_off(slot).await.unwrap();
        net.ensure_cut_off(slot).await.unwrap();
        net.ensure(other).await.unwrap();
        assert_eq!(net.look(slot).await.unwrap(), Some(()));
        assert_eq!(net.left(slot).await.unwrap(), Some(()));
        let resolver = net.resolver().address;
        let _resolver = Servers::start(&[(resolver, 53), (resolver, PORT)]);
        let (guest, talker) = (Guest::start(&net, slot), Guest::start(&net, other));
        assert!(talker.tcp(PUBLIC, PORT).is_some(), "the world is there");
        let silent = |net: &SlotNet| {
            reaches_nothing_forbidden(net, &guest, slot, other);
            assert!(guest.hears_nothing_of(PUBLIC, PORT) && guest.hears_nothing_of(INTERNET, PORT));
            assert!(guest.hears_nothing_of(GATEWAY_ADDRESS, 53));
        };
        silent(&net);
        // What lets others talk is no concern of it, neither anew nor flushed.
        net.ensure(Slot(9)).await.unwrap();
        silent(&net);
        Tool::new(paths().nft).args(["flush", "ruleset"]).run().await.unwrap();
        silent(&net);
        // Nor does a server forget it that starts anew.
        drop(net);
        let net = world.open("a").await;
        assert_eq!(net.look(slot).await.unwrap(), Some(()));
        silent(&net);
        net.remove(slot).await.unwrap();
        assert_eq!(net.left(slot).await.unwrap(), None);
        net.ensure(slot).await.unwrap();
        let again = Guest::start(&net, slot);
        assert!(again.tcp(PUBLIC, PORT).is_some(), "the next VM of the slot is as any");
    });
}

#[test]
fn a_guest_cannot_fill_the_hosts_table_of_connections() {
    on_host(|world| async move {
        let net = world.open("a").await;
        net.ensure(Slot(0)).await.unwrap();
        let guest = Guest::start(&net, Slot(0));
        let most = usize::try_from(CONNECTIONS).unwrap();
        let mut open = 0;
        // Of those that a busy machine's cable loses there is none.
        for _ in 0..5 {
            guest.run(|| {
                let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
                for port in 20_000..26_000 {
                    drop(socket.send_to(b"?", (PUBLIC, port)));
                    // No faster than the test's own cable carries them.
                    if port % 50 == 0 {
                        std::thread::sleep(Duration::from_millis(6));
                    }
                }
            });
            std::thread::sleep(Duration::from_millis(300));
            open = conntrack::forget(&[net.seat(Slot(0)).unwrap().address].into()).unwrap();
            assert!(open <= most + 16, "{open}");
            if open > most / 2 {
                return;
            }
        }
        panic!("{open}: of so few it cannot be told");
    });
}

#[test]
fn the_host_reaches_a_guest_and_other_instances_do_not() {
    on_host(|world| async move {
        let (net, foreign) = (world.open("a").await, world.open("b").await);
        net.ensure(Slot(0)).await.unwrap();
        foreign.ensure(Slot(0)).await.unwrap();
        let (guest, stranger) = (Guest::start(&net, Slot(0)), Guest::start(&foreign, Slot(0)));
        let _listening = guest.run(|| Servers::start(&[(Ipv4Addr::UNSPECIFIED, PORT)]));
        let address = net.seat(Slot(0)).unwrap().address;
        let stream = TcpStream::connect_timeout(&(address, PORT).into(), LONG).unwrap();
        let seen = std::io::read_to_string(stream).unwrap();
        assert_eq!(seen, GATEWAY_ADDRESS.to_string(), "the guest sees its gateway only");
        assert!(stranger.hears_nothing_of(address, PORT));
        assert!(stranger.reaches(PUBLIC, PORT));

        // One goes, the other does not notice.
        drop(guest);
        net.remove(Slot(0)).await.unwrap();
        net.give_up().await.unwrap();
        assert!(stranger.reaches(PUBLIC, PORT));
    });
}

#[test]
fn a_slots_settings_are_its_own() {
    on_host(|world| async move {
        let net = world.open("a").await;
        let setting = |key: &str| std::fs::read_to_string(format!("/proc/sys/net/{key}")).unwrap().trim().to_owned();
        let host = setting("ipv4/conf/all/arp_announce");
        assert_ne!(host, "2", "a host that differs from its slots");
        net.ensure(Slot(1)).await.unwrap();
        let wanted = [
            ("ipv4/ip_forward".to_owned(), "1"),
            ("ipv4/conf/all/send_redirects".to_owned(), "0"),
            ("ipv4/conf/tap0/send_redirects".to_owned(), "0"),
            ("ipv4/conf/up0/rp_filter".to_owned(), "1"),
            ("ipv4/conf/mgmt0/arp_announce".to_owned(), "2"),
            ("ipv6/conf/all/disable_ipv6".to_owned(), "1"),
            ("ipv6/conf/tap0/disable_ipv6".to_owned(), "1"),
        ];
        let fd = clawpot_host::netns::open(&net.seat(Slot(1)).unwrap().netns).unwrap();
        for (key, value) in wanted {
            assert_eq!(inside(&fd, || setting(&key)), value, "{key}");
        }
        let end = net.shop().site.names.slot(Slot(1));
        assert_eq!(setting(&format!("ipv4/conf/{end}/arp_announce")), "2");
        assert_eq!(setting(&format!("ipv6/conf/{end}/disable_ipv6")), "1");
        assert_eq!(setting("ipv4/conf/all/arp_announce"), host);
    });
}

#[test]
fn the_management_link_carries_the_hosts_connections_only() {
    on_host(|world| async move {
        let net = world.open("a").await;
        net.ensure(Slot(3)).await.unwrap();
        let guest = Guest::start(&net, Slot(3));
        let _agent = guest.run(|| Servers::start(&[(MANAGEMENT_ADDRESS, AGENT_PORT), (MANAGEMENT_ADDRESS, PORT)]));
        let netns = net.seat(Slot(3)).unwrap().netns;
        let dial = |port| {
            let netns = netns.clone();
            async move { connect_tcp_in(&netns, SocketAddrV4::new(MANAGEMENT_ADDRESS, port), LONG).await }
        };
        dial(AGENT_PORT).await.unwrap();
        dial(PORT).await.unwrap();
        assert_eq!(dial(PORT + 1).await.unwrap_err().kind(), clawpot_types::Kind::Unavailable, "refused by the guest");

        let fd = clawpot_host::netns::open(&netns).unwrap();
        // Listening in the netns is no use to anybody: nothing new comes in.
        let _listener = inside(&fd, || TcpListener::bind((MANAGEMENT_HOST_ADDRESS, PORT)).unwrap());
        assert!(guest.hears_nothing_of(MANAGEMENT_HOST_ADDRESS, PORT));
        // A captured VMM, which is not root, opens no connection from in here.
        for (ip, port) in [(MANAGEMENT_ADDRESS, AGENT_PORT), (PUBLIC, PORT)] {
            let connected = inside(&fd, || {
                become_user(net.seat(Slot(3)).unwrap().uid);
                TcpStream::connect_timeout(&(ip, port).into(), Duration::from_millis(200)).is_ok()
            });
            assert!(!connected, "{ip}");
        }
    });
}

/// The calling thread only.
fn become_user(uid: u32) {
    // SAFETY: numbers only; the raw call changes this thread alone, which is about to end.
    assert_eq!(unsafe { libc::syscall(libc::SYS_setresuid, uid, uid, uid) }, 0);
}

#[test]
fn the_tap_is_its_users_alone() {
    on_host(|world| async move {
        let net = world.open("a").await;
        net.ensure(Slot(3)).await.unwrap();
        let fd = clawpot_host::netns::open(&net.seat(Slot(3)).unwrap().netns).unwrap();
        let uid = net.seat(Slot(3)).unwrap().uid;
        for (who, may) in [(uid, true), (uid + 1, false)] {
            let attached = inside(&fd, || {
                // The device node may be root's here, as a descriptor it is not: that is what a jail passes on.
                let tun = crate::kernel::tap::open().unwrap();
                // SAFETY: as above.
                assert_eq!(unsafe { libc::syscall(libc::SYS_setresgid, who, who, who) }, 0);
                become_user(who);
                crate::kernel::tap::attach(&tun, "tap0").is_ok()
            });
            assert_eq!(attached, may, "uid {who}");
        }
    });
}

#[test]
fn ip_netns_knows_the_names() {
    on_host(|world| async move {
        let net = world.open("a").await;
        net.ensure(Slot(3)).await.unwrap();
        let Ok(ip) = clawpot_host::process::find_program("ip", None) else { return };
        let said = Tool::new(ip).args(["netns", "list"]).run().await.unwrap();
        let name = format!("cp{}-3", world.instance("a"));
        assert!(String::from_utf8_lossy(&said).contains(&name));
        assert_eq!(net.seat(Slot(3)).unwrap().netns, Path::new("/run/netns").join(name));
    });
}
