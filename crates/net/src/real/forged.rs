//! What somebody who has got into a netns, as its root, sends on its uplink: the host's own rules stand behind those of the netns.

use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::time::{Duration, Instant};

use clawpot_core::ports::Net as _;
use clawpot_host::process::Tool;
use clawpot_types::Slot;

use super::world::{HOST, LONG, PUBLIC, inside, on_host, paths, sysctl};

const ETH_P_IP: u16 = 0x0800;
const ETH_P_IPV6: u16 = 0x86dd;
const ETH_P_8021Q: u16 = 0x8100;

/// To all on the link, of type `kind`.
fn frame(kind: u16, payload: &[u8]) -> Vec<u8> {
    let mac = [2, 0, 0, 0, 0, 0x77];
    [&[0xff; 6][..], &mac, &kind.to_be_bytes(), payload].concat()
}

/// A UDP datagram of nothing, without a checksum.
fn datagram(from: Ipv4Addr, to: Ipv4Addr) -> Vec<u8> {
    let mut packet = vec![0x45, 0, 0, 28, 0, 1, 0, 0, 64, 17, 0, 0];
    packet.extend(from.octets().into_iter().chain(to.octets()));
    let sum: u32 = packet.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    packet[10..12].copy_from_slice(&(!u16::try_from(folded).unwrap()).to_be_bytes());
    packet.extend([0, 9, 0, 9, 0, 8, 0, 0]);
    packet
}

/// A router's advertisement to all nodes. Its checksum is wrong: the rules come first.
fn advertisement() -> Vec<u8> {
    let mut packet = vec![0x60, 0, 0, 0, 0, 16, 58, 255];
    packet.extend([0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
    packet.extend([0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
    packet.extend([134, 0, 0, 0, 64, 0, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0]);
    packet
}

/// On `link` of the calling thread's namespace.
fn send(link: &str, frames: &[Vec<u8>]) {
    // SAFETY: a socket of numbers; what it gives is a new descriptor, or -1.
    let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
    assert!(fd >= 0, "{}", std::io::Error::last_os_error());
    // SAFETY: it is open, and nobody else's.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    let name = std::ffi::CString::new(link).unwrap();
    // SAFETY: all zeroes is an address; the name ends with a zero.
    let (mut to, index) = unsafe { (std::mem::zeroed::<libc::sockaddr_ll>(), libc::if_nametoindex(name.as_ptr())) };
    assert!(index > 0, "no link {link}");
    to.sll_family = u16::try_from(libc::AF_PACKET).unwrap();
    to.sll_ifindex = i32::try_from(index).unwrap();
    let size = libc::socklen_t::try_from(size_of_val(&to)).unwrap();
    for frame in frames {
        // SAFETY: the frame and the address outlive the call, which only reads them.
        let sent = unsafe {
            libc::sendto(socket.as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0, (&raw const to).cast(), size)
        };
        assert_eq!(usize::try_from(sent).ok(), Some(frame.len()), "{}", std::io::Error::last_os_error());
    }
}

/// Packets that the host's rule of this comment counted.
async fn counted(comment: &str) -> u64 {
    let said = Tool::new(paths().nft).args(["-j", "list", "ruleset"]).run().await.unwrap();
    let listed: serde_json::Value = serde_json::from_slice(&said).unwrap();
    let rules = listed["nftables"].as_array().unwrap().iter().map(|entry| &entry["rule"]);
    let mine = rules.filter(|rule| rule["chain"] == "raw_slot" && rule["comment"] == comment);
    let steps = mine.flat_map(|rule| rule["expr"].as_array().unwrap());
    steps.filter_map(|step| step["counter"]["packets"].as_u64()).sum()
}

/// Until that many were: on a busy machine the kernel looks at what was sent a moment later.
async fn come_to(comment: &str, wanted: usize) {
    let (wanted, end) = (u64::try_from(wanted).unwrap(), Instant::now() + LONG);
    loop {
        let now = counted(comment).await;
        if now >= wanted || Instant::now() > end {
            return assert_eq!(now, wanted, "{comment}");
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[test]
fn what_is_forged_inside_a_netns_ends_at_the_hosts_end() {
    on_host(|world| async move {
        let net = world.open("a").await;
        let (slot, sibling) = (Slot(7), Slot(8));
        for slot in [slot, sibling] {
            net.ensure(slot).await.unwrap();
        }
        let (own, other) = (net.seat(slot).unwrap().address, net.seat(sibling).unwrap().address);
        let end = Ipv4Addr::from_bits(own.to_bits() - 1);
        let netns = clawpot_host::netns::open(&net.seat(slot).unwrap().netns).unwrap();
        let from = |source| frame(ETH_P_IP, &datagram(source, PUBLIC));

        // Its own packets are let by, and nothing has been counted yet.
        inside(&netns, || send("up0", &[from(own)]));
        assert_eq!((counted("spoof").await, counted("not IPv4").await), (0, 0));
        let spoofed = [other, end, HOST, PUBLIC, Ipv4Addr::new(203, 0, 113, 99), Ipv4Addr::UNSPECIFIED];
        inside(&netns, || send("up0", &spoofed.map(from)));
        come_to("spoof", spoofed.len()).await;

        // The host's end speaks no IPv6; where somebody has it do so, the rules do not.
        let tagged = [&[0, 100][..], &ETH_P_IP.to_be_bytes(), &datagram(other, PUBLIC)].concat();
        // The last comes through to the rules, behind the others.
        let strange = [frame(ETH_P_IPV6, &advertisement()), frame(ETH_P_8021Q, &tagged), from(other)];
        inside(&netns, || send("up0", &strange));
        come_to("spoof", spoofed.len() + 1).await;
        assert_eq!(counted("not IPv4").await, 0, "the kernel drops it before");
        sysctl(&format!("net/ipv6/conf/{}/disable_ipv6", net.shop().site.names.slot(slot)), "0");
        inside(&netns, || send("up0", &strange));
        // What bears a tag is for a VLAN's link, of which there is none: neither rule sees it.
        come_to("spoof", spoofed.len() + 2).await;
        assert_eq!(counted("not IPv4").await, 1);
    });
}
