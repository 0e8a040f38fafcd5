"""What a hostile guest tries, attempt by attempt, and what stops each.

`python -m harness.attempts` writes the table into SECURITY.md; a test fails where the two differ.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

from . import frames as f
from .tools import REPO
from .world import DNS, HOST_LAN, HOST_PUBLIC, LAN, METADATA, PUBLIC

GUEST_MAC, GATEWAY_MAC = "02:ca:00:00:00:02", "02:ca:00:00:00:01"
GUEST, GATEWAY = "172.31.255.2", "172.31.255.1"
MGMT_MAC, MGMT_HOST_MAC = "02:ca:00:00:00:06", "02:ca:00:00:00:05"
MGMT, MGMT_HOST = "172.31.254.2", "172.31.254.1"
OTHER_MAC = "02:ca:00:00:00:77"

ALL_NODES_MAC, ALL_NODES = "33:33:00:00:00:01", "ff02::1"
LINK_LOCAL = "fe80::ca:ff:fe00:2"


class Layer(Enum):
    """What stops an attempt: the words for it, and the comments of the netns's counters that show it."""

    GUARD = ("frames allowed on the tap", ("mac", "guard"))
    INPUT = ("netns, input: nothing there is for guests", ("input",))
    PRIVATE = ("netns, forward: addresses denied", ("private",))
    HOST = ("netns, forward: the host's public addresses", ("host",))
    FORWARD = ("netns, forward: all else", ("forward",))
    INVALID = ("netns, connection tracking", ("invalid",))
    KERNEL = ("kernel, before any rule", ())
    NOTHING = ("nobody there to answer", ())

    @property
    def words(self) -> str:
        return self.value[0]

    @property
    def counters(self) -> tuple[str, ...]:
        return self.value[1]


@dataclass(frozen=True)
class Place:
    """Addresses that differ between runs. `ports`: (kind, port) of all that listens on the host."""

    own: str
    sibling: str
    resolver: str
    ports: tuple[tuple[str, int], ...]

    @property
    def host_ends(self) -> tuple[str, str]:
        return neighbour(self.own), neighbour(self.sibling)

    @property
    def host(self) -> tuple[str, ...]:
        """Every address of the host that a guest could think of."""
        return (HOST_PUBLIC, HOST_LAN, *self.host_ends, self.resolver)


def neighbour(address: str) -> str:
    """The host's end of a slot: the even address below the VM's."""
    head, last = address.rsplit(".", 1)
    return f"{head}.{int(last) - 1}"


Frames = Callable[[Place, bytes], list[bytes]]
Connects = Callable[[Place], list[list[object]]]


@dataclass(frozen=True)
class Attempt:
    """`counted`: packets that the layer's counters see, when that is not one per frame (fragments)."""

    what: str
    stopped: Layer
    frames: Frames = lambda _place, _mark: []
    nic: str = GUEST_MAC
    counted: int | None = None
    connects: Connects = field(default=lambda _place: [])


def good(packet: bytes) -> bytes:
    """A frame as the guest's own kernel would send it."""
    return f.ethernet(GATEWAY_MAC, GUEST_MAC, f.IPV4, packet)


def dgram(to: str, mark: bytes, port: int = 9, **header: object) -> bytes:
    return f.ip(GUEST, to, f.UDP, f.udp(GUEST, to, port, mark), **header)  # type: ignore[arg-type]


def syn(to: str, mark: bytes, port: int = 80, flags: int = f.SYN) -> bytes:
    return f.ip(GUEST, to, f.TCP, f.tcp(GUEST, to, port, mark, flags))


def echo(to: str, mark: bytes, **header: object) -> bytes:
    return f.ip(GUEST, to, f.ICMP, f.icmp(8, 0, b"\0\1\0\1", mark), **header)  # type: ignore[arg-type]


def to(*addresses: str) -> Frames:
    """UDP, TCP and ping to fixed addresses."""
    return lambda _place, mark: [good(kind(one, mark)) for one in addresses for kind in (dgram, syn, echo)]


def to_place(pick: Callable[[Place], tuple[str, ...]]) -> Frames:
    return lambda place, mark: to(*pick(place))(place, mark)


def sender(address: str | Callable[[Place], str]) -> Frames:
    def build(place: Place, mark: bytes) -> list[bytes]:
        own = address if isinstance(address, str) else address(place)
        return [good(f.ip(own, PUBLIC, f.UDP, f.udp(own, PUBLIC, 9, mark)))]

    return build


def link(target: str, source: str = GUEST_MAC, address: str = PUBLIC) -> Frames:
    return lambda _place, mark: [f.ethernet(target, source, f.IPV4, dgram(address, mark))]


def plain(kind: int, payload: Callable[[bytes], bytes], target: str = GATEWAY_MAC, source: str = GUEST_MAC) -> Frames:
    return lambda _place, mark: [f.ethernet(target, source, kind, payload(mark))]


def asks(operation: int, one: tuple[str, str], wanted: tuple[str, str], target: str = f.BROADCAST) -> Frames:
    return plain(f.ARP, lambda mark: f.arp(operation, one, wanted, mark), target)


def six(packet: Callable[[bytes], bytes], target: str = ALL_NODES_MAC) -> Frames:
    return plain(f.IPV6, packet, target)


def tunnel(protocol: int, head: bytes, inner: Callable[[bytes], bytes], address: str = PUBLIC) -> Frames:
    return lambda _place, mark: [good(f.ip(GUEST, address, protocol, head + inner(mark)))]


def flags(value: int) -> Frames:
    return lambda _place, mark: [good(syn(PUBLIC, mark, flags=value))]


def spoilt(**lies: object) -> Frames:
    return lambda _place, mark: [good(dgram(PUBLIC, mark, **lies))]


def cut(address: str, cuts: list[tuple[int, int]], ident: int, protocol: int = f.UDP) -> Frames:
    """A datagram of 96 bytes in fragments; the mark stands in each eight-byte pair of its first 72."""

    def build(_place: Place, mark: bytes) -> list[bytes]:
        data = (mark.ljust(24, b".") * 4)[:88]
        whole = f.udp(GUEST, address, 9, data) if protocol == f.UDP else f.tcp(GUEST, address, 80, data[:76])
        return [good(one) for one in f.pieces(GUEST, address, protocol, whole, cuts, ident)]

    return build


def router_advertisement(_mark: bytes) -> bytes:
    prefix = struct.pack("!BBBBIII", 3, 4, 64, 0xC0, 3600, 3600, 0) + bytes.fromhex("20010db8" + "00" * 12)
    rest = struct.pack("!BBHII", 64, 0, 1800, 0, 0) + prefix + b"\x01\x01" + f.mac(GUEST_MAC) + _mark
    return f.icmp6(LINK_LOCAL, ALL_NODES, 134, rest)


def neighbour_advertisement(mark: bytes) -> bytes:
    return f.icmp6(LINK_LOCAL, ALL_NODES, 136, b"\x20\0\0\0" + bytes(16) + b"\x02\x01" + f.mac(GUEST_MAC) + mark)


def management(packet: Callable[[bytes], bytes], target: str = MGMT_HOST_MAC, source: str = MGMT_MAC) -> Frames:
    return plain(f.IPV4, packet, target, source)


def from_management(address: str, protocol: int = f.TCP, source: str = MGMT) -> Callable[[bytes], bytes]:
    build = f.tcp if protocol == f.TCP else f.udp
    return lambda mark: f.ip(source, address, protocol, build(source, address, 80, mark))


def redirect(mark: bytes) -> bytes:
    inner = dgram(PUBLIC, b"")[:28]
    return f.ip(GUEST, GATEWAY, f.ICMP, f.icmp(5, 1, bytes([93, 184, 216, 77]), inner + mark))


def too_big(mark: bytes) -> bytes:
    inner = f.ip(PUBLIC, "203.0.113.5", f.UDP, f.udp(PUBLIC, "203.0.113.5", 9, b""))
    return f.ip(GUEST, PUBLIC, f.ICMP, f.icmp(3, 4, struct.pack("!HH", 0, 68), inner + mark))


def route_option(kind: int, via: str) -> bytes:
    return bytes([kind, 7, 4]) + bytes(map(int, via.split(".")))


def bare_ip(mark: bytes) -> bytes:
    return dgram(PUBLIC, mark)


def six_to(address: str) -> Callable[[bytes], bytes]:
    return lambda mark: f.ipv6(LINK_LOCAL, address, 59, mark)


def every_port(addresses: Callable[[Place], tuple[str, ...]]) -> Connects:
    """Less the resolver, as guests are to reach it."""

    def build(place: Place) -> list[list[object]]:
        every = [[kind, one, port] for one in addresses(place) for kind, port in place.ports]
        return [one for one in every if one[1:] != [GATEWAY, DNS]]

    return build


ME, GATE = (GUEST_MAC, GUEST), (GATEWAY_MAC, GATEWAY)
NOBODY = "00:00:00:00:00:00"

SOURCES = [
    Attempt("source address: a stranger's", Layer.GUARD, sender("203.0.113.7")),
    Attempt("source address: the sibling's slot", Layer.GUARD, sender(lambda place: place.sibling)),
    Attempt("source address: its own slot, as the host knows it", Layer.GUARD, sender(lambda place: place.own)),
    Attempt("source address: the host's end of its slot", Layer.GUARD, sender(lambda place: place.host_ends[0])),
    Attempt("source address: its gateway's", Layer.GUARD, sender(GATEWAY)),
    Attempt("source address: the resolver's", Layer.GUARD, sender(lambda place: place.resolver)),
    Attempt("source address: the host's", Layer.GUARD, sender(HOST_PUBLIC)),
    Attempt("source address: 127.0.0.1", Layer.GUARD, sender("127.0.0.1")),
    Attempt("source address: 0.0.0.0", Layer.GUARD, sender("0.0.0.0")),
    Attempt("source address: its management NIC's", Layer.GUARD, sender(MGMT)),
    Attempt("source MAC: a stranger's", Layer.GUARD, link(GATEWAY_MAC, OTHER_MAC)),
    Attempt("source MAC: the gateway's", Layer.GUARD, link(GATEWAY_MAC, GATEWAY_MAC)),
    Attempt("destination MAC: a stranger's", Layer.GUARD, link(OTHER_MAC)),
    Attempt("destination MAC: its own, which is every sibling's", Layer.GUARD, link(GUEST_MAC)),
]

LINKS = [
    Attempt("broadcast frame, 255.255.255.255", Layer.GUARD, link(f.BROADCAST, address="255.255.255.255")),
    Attempt(
        "DHCP discover",
        Layer.GUARD,
        plain(
            f.IPV4,
            lambda mark: f.ip("0.0.0.0", "255.255.255.255", f.UDP, f.udp("0.0.0.0", "255.255.255.255", 67, mark, 68)),
            f.BROADCAST,
        ),
    ),
    Attempt("multicast frame: mDNS", Layer.GUARD, link("01:00:5e:00:00:fb", address="224.0.0.251")),
    Attempt(
        "multicast frame: IGMP report",
        Layer.GUARD,
        plain(
            f.IPV4,
            lambda mark: f.ip(GUEST, "224.0.0.22", 2, b"\x16\0\0\0\xe0\0\0\xfb" + mark, ttl=1, options=b"\x94\4\0\0"),
            "01:00:5e:00:00:16",
        ),
    ),
    Attempt("ARP: who has its own slot's address", Layer.GUARD, lambda p, m: asks(1, ME, (NOBODY, p.own))(p, m)),
    Attempt("ARP: who has the sibling", Layer.GUARD, lambda p, m: asks(1, ME, (NOBODY, p.sibling))(p, m)),
    Attempt("ARP: who has the host's end", Layer.GUARD, lambda p, m: asks(1, ME, (NOBODY, p.host_ends[0]))(p, m)),
    Attempt("ARP: gratuitous, the gateway is here", Layer.GUARD, asks(1, (GUEST_MAC, GATEWAY), (NOBODY, GATEWAY))),
    Attempt("ARP: reply, the gateway is here", Layer.GUARD, asks(2, (GUEST_MAC, GATEWAY), GATE, GATEWAY_MAC)),
    Attempt(
        "ARP: reply, the sibling is here",
        Layer.GUARD,
        lambda p, m: asks(2, (GUEST_MAC, p.sibling), GATE, GATEWAY_MAC)(p, m),
    ),
    Attempt("ARP: sender's MAC is not the frame's", Layer.GUARD, asks(1, (OTHER_MAC, GUEST), (NOBODY, GATEWAY))),
    Attempt("RARP", Layer.GUARD, plain(f.RARP, lambda mark: f.arp(3, ME, ME, mark), f.BROADCAST)),
    Attempt("IPv6: router advertisement", Layer.GUARD, six(router_advertisement)),
    Attempt("IPv6: neighbour advertisement", Layer.GUARD, six(neighbour_advertisement)),
    Attempt("IPv6: link-local, to all nodes", Layer.GUARD, six(six_to(ALL_NODES))),
    Attempt("IPv6: link-local, to the gateway", Layer.GUARD, six(six_to("fe80::1"), GATEWAY_MAC)),
    Attempt("IPv6: to a public address", Layer.GUARD, six(six_to("2001:db8::1"), GATEWAY_MAC)),
    Attempt("IPv6 in a frame that says IPv4", Layer.GUARD, plain(f.IPV4, six_to("2001:db8::1"))),
    Attempt("VLAN 100 (802.1Q)", Layer.GUARD, plain(f.VLAN, lambda m: f.tag(100, f.IPV4, bare_ip(m)))),
    Attempt("VLAN 0, priority only", Layer.GUARD, plain(f.VLAN, lambda m: f.tag(7 << 13, f.IPV4, bare_ip(m)))),
    Attempt(
        "VLAN 0 around another source address",
        Layer.GUARD,
        plain(
            f.VLAN,
            lambda m: f.tag(0, f.IPV4, f.ip("203.0.113.7", PUBLIC, f.UDP, f.udp("203.0.113.7", PUBLIC, 9, m))),
        ),
    ),
    Attempt("VLAN 0 around IPv6", Layer.GUARD, plain(f.VLAN, lambda m: f.tag(0, f.IPV6, router_advertisement(m)))),
    Attempt(
        "VLAN in VLAN (QinQ, 802.1ad)",
        Layer.GUARD,
        plain(f.QINQ, lambda m: f.tag(5, f.VLAN, f.tag(6, f.IPV4, bare_ip(m)))),
    ),
    Attempt("MPLS", Layer.GUARD, plain(0x8847, lambda m: b"\0\1\1\x40" + bare_ip(m))),
    Attempt("PPPoE", Layer.GUARD, plain(0x8864, lambda m: b"\x11\0\0\1\0\x40\0\x21" + bare_ip(m))),
    Attempt("LLDP", Layer.GUARD, plain(0x88CC, lambda m: b"\2\7\4" + bytes(6) + m, "01:80:c2:00:00:0e")),
    Attempt("spanning tree (802.3)", Layer.GUARD, plain(60, lambda m: b"\x42\x42\3" + m, "01:80:c2:00:00:00")),
    Attempt("EAPOL", Layer.GUARD, plain(0x888E, lambda m: b"\1\1\0\0" + m, "01:80:c2:00:00:03")),
    Attempt("IPv4 in an 802.3 frame with SNAP", Layer.GUARD, plain(72, lambda m: b"\xaa\xaa\3\0\0\0\x08\0" + bare_ip(m))),
    Attempt("IPv4 frame with less than a header", Layer.GUARD, plain(f.IPV4, lambda m: b"\x45" + m[:9] + b"\0" * 36 + m)),
]

PACKETS = [
    Attempt("gateway's MAC, but 255.255.255.255", Layer.INPUT, link(GATEWAY_MAC, address="255.255.255.255")),
    Attempt("gateway's MAC, but a multicast address", Layer.KERNEL, link(GATEWAY_MAC, address="224.0.0.251")),
    Attempt("fragments: one of the middle alone", Layer.KERNEL, cut(PUBLIC, [(24, 72)], 101)),
    Attempt("fragments: the first alone", Layer.KERNEL, cut(PUBLIC, [(0, 72)], 102)),
    Attempt("fragments: the last alone", Layer.KERNEL, cut(PUBLIC, [(24, 96)], 103)),
    Attempt("fragments: overlapping", Layer.KERNEL, cut(PUBLIC, [(0, 72), (24, 72), (24, 96)], 104)),
    Attempt(
        "fragments: beyond 64 KiB",
        Layer.KERNEL,
        lambda _p, m: [
            good(f.ip(GUEST, PUBLIC, f.UDP, m.ljust(64, b"."), ident=105, fragment=0x1FFF)),
            good(f.ip(GUEST, PUBLIC, f.UDP, m.ljust(64, b"."), ident=105, fragment=f.MORE)),
        ],
    ),
    Attempt(
        "fragments: a tiny first one, TCP to the metadata service",
        Layer.PRIVATE,
        cut(METADATA, [(0, 8), (8, 96)], 106, f.TCP),
        counted=1,
    ),
    Attempt("fragments: whole, to the LAN", Layer.PRIVATE, cut(LAN, [(0, 48), (48, 96)], 107), counted=1),
    Attempt("IP header: bad checksum", Layer.KERNEL, spoilt(spoil=0x1234)),
    Attempt("IP header: shorter than it can be", Layer.KERNEL, spoilt(words=4)),
    Attempt("IP header: longer than the packet", Layer.KERNEL, spoilt(words=15, length=40)),
    Attempt("IP header: more bytes than came", Layer.KERNEL, spoilt(length=1400)),
    Attempt("IP option: loose source route by the LAN", Layer.KERNEL, spoilt(options=route_option(131, LAN))),
    Attempt("IP option: strict source route by the LAN", Layer.KERNEL, spoilt(options=route_option(137, LAN))),
    Attempt("TTL 1: the netns answers, nothing goes on", Layer.KERNEL, spoilt(ttl=1)),
    Attempt("UDP: bad checksum", Layer.INVALID, lambda _p, m: [good(f.ip(GUEST, PUBLIC, f.UDP, f.udp(GUEST, LAN, 9, m)))]),
    Attempt("TCP: SYN and FIN", Layer.INVALID, flags(f.SYN | f.FIN)),
    Attempt("TCP: no flags", Layer.INVALID, flags(0)),
    Attempt("TCP: FIN, PSH and URG (Christmas tree)", Layer.INVALID, flags(0x29)),
    Attempt(
        "TCP: in the middle of a connection that is not, to the LAN",
        Layer.PRIVATE,
        lambda _p, m: [good(syn(LAN, m, flags=f.ACK))],
    ),
    Attempt("ICMP: fragmentation needed, of a connection that is not", Layer.INVALID, lambda _p, m: [good(too_big(m))]),
    Attempt("ICMP: redirect", Layer.INPUT, lambda _p, m: [good(redirect(m))]),
    Attempt("tunnel: GRE", Layer.FORWARD, tunnel(47, b"\0\0\x08\0", lambda m: dgram(LAN, m))),
    Attempt("tunnel: IPIP", Layer.FORWARD, tunnel(4, b"", lambda m: dgram(METADATA, m))),
    Attempt("tunnel: 6in4", Layer.FORWARD, tunnel(41, b"", six_to("2001:db8::1"))),
    Attempt("tunnel: ESP", Layer.FORWARD, tunnel(50, b"\0\0\1\0\0\0\0\1", lambda m: m)),
    Attempt("tunnel: AH", Layer.FORWARD, tunnel(51, b"\x11\4\0\0\0\0\1\0\0\0\0\1" + bytes(12), lambda m: m)),
    Attempt("tunnel: L2TP", Layer.FORWARD, tunnel(115, bytes(8), lambda m: m)),
    Attempt("SCTP", Layer.FORWARD, tunnel(132, b"", f.sctp)),
    Attempt("tunnel: IPIP to the gateway", Layer.INPUT, tunnel(4, b"", lambda m: dgram(LAN, m), GATEWAY)),
    Attempt(
        "tunnel: VXLAN to the host's end",
        Layer.PRIVATE,
        lambda p, m: [good(dgram(p.host_ends[0], b"\x08" + bytes(7) + f.ethernet(f.BROADCAST, ME[0], f.ARP, m), 4789))],
    ),
]

DESTINATIONS = [
    Attempt("to the host's ends of both slots", Layer.PRIVATE, to_place(lambda place: place.host_ends)),
    Attempt("to the sibling's slot", Layer.PRIVATE, to_place(lambda place: (place.sibling,))),
    Attempt("to the resolver, other ports than 53", Layer.PRIVATE, to_place(lambda place: (place.resolver,))),
    Attempt("to the host's public address", Layer.HOST, to(HOST_PUBLIC)),
    Attempt("to the host's LAN address", Layer.PRIVATE, to(HOST_LAN)),
    Attempt("to a neighbour on the host's LAN", Layer.PRIVATE, to(LAN)),
    Attempt("to 169.254.169.254", Layer.PRIVATE, to(METADATA)),
    Attempt("to RFC 1918: 10/8, 172.16/12, 192.168/16", Layer.PRIVATE, to("10.9.9.9", "172.16.3.3", "192.168.5.5")),
    Attempt("to shared addresses (CGNAT), 100.64/10", Layer.PRIVATE, to("100.64.0.1")),
    Attempt("to 0/8", Layer.PRIVATE, to("0.1.2.3")),
    Attempt("to 240/4", Layer.PRIVATE, to("240.0.0.1")),
    Attempt("to 192.0.0/24 and 198.18/15", Layer.PRIVATE, to("192.0.0.8", "198.18.0.1")),
    Attempt("to 127.0.0.1", Layer.KERNEL, to("127.0.0.1")),
    Attempt("to its own address, and so to each sibling's", Layer.FORWARD, to(GUEST)),
    Attempt("to its own slot's address", Layer.INPUT, to_place(lambda place: (place.own,))),
    Attempt(
        "to the gateway, other ports than 53",
        Layer.INPUT,
        lambda _p, m: [good(kind(GATEWAY, m, port)) for kind in (dgram, syn) for port in (22, 80, 8080)],
    ),
    Attempt("to its management NIC, by the other one", Layer.FORWARD, to(MGMT)),
    Attempt("to the other side of its management NIC, by the other one", Layer.INPUT, to(MGMT_HOST)),
]

MANAGEMENT = [
    Attempt(
        "management NIC: TCP to the other side, every port of the host's",
        Layer.INPUT,
        lambda place, mark: [
            f.ethernet(MGMT_HOST_MAC, MGMT_MAC, f.IPV4, f.ip(MGMT, MGMT_HOST, f.TCP, f.tcp(MGMT, MGMT_HOST, port, mark)))
            for port in sorted({22, 80, 10051, *(port for _, port in place.ports)})
        ],
        MGMT_MAC,
    ),
    Attempt(
        "management NIC: in the middle of a connection that is not",
        Layer.INPUT,
        management(lambda m: f.ip(MGMT, MGMT_HOST, f.TCP, f.tcp(MGMT, MGMT_HOST, 40000, m, f.ACK, source=10051))),
        MGMT_MAC,
    ),
    Attempt("management NIC: UDP to the other side", Layer.GUARD, management(from_management(MGMT_HOST, f.UDP)), MGMT_MAC),
    Attempt("management NIC: to a public address", Layer.GUARD, management(from_management(PUBLIC)), MGMT_MAC),
    Attempt("management NIC: to the metadata service", Layer.GUARD, management(from_management(METADATA)), MGMT_MAC),
    Attempt("management NIC: to the LAN", Layer.GUARD, management(from_management(LAN)), MGMT_MAC),
    Attempt(
        "management NIC: to the sibling",
        Layer.GUARD,
        lambda p, m: management(from_management(p.sibling))(p, m),
        MGMT_MAC,
    ),
    Attempt("management NIC: to the other gateway", Layer.GUARD, management(from_management(GATEWAY)), MGMT_MAC),
    Attempt(
        "management NIC: the other NIC's source address",
        Layer.GUARD,
        management(from_management(MGMT_HOST, source=GUEST)),
        MGMT_MAC,
    ),
    Attempt(
        "management NIC: another source MAC",
        Layer.GUARD,
        management(from_management(MGMT_HOST), source=GUEST_MAC),
        MGMT_MAC,
    ),
    Attempt(
        "management NIC: broadcast",
        Layer.GUARD,
        management(from_management("255.255.255.255", f.UDP), f.BROADCAST),
        MGMT_MAC,
    ),
    Attempt(
        "management NIC: ARP, the other side is here",
        Layer.GUARD,
        plain(
            f.ARP,
            lambda mark: f.arp(2, (MGMT_MAC, MGMT_HOST), (MGMT_HOST_MAC, MGMT_HOST), mark),
            MGMT_HOST_MAC,
            MGMT_MAC,
        ),
        MGMT_MAC,
    ),
    Attempt(
        "management NIC: IPv6 router advertisement",
        Layer.GUARD,
        plain(f.IPV6, router_advertisement, ALL_NODES_MAC, MGMT_MAC),
        MGMT_MAC,
    ),
    Attempt(
        "management NIC: VLAN",
        Layer.GUARD,
        plain(f.VLAN, lambda m: f.tag(0, f.IPV4, from_management(MGMT_HOST)(m)), MGMT_HOST_MAC, MGMT_MAC),
        MGMT_MAC,
    ),
]

CONNECTIONS = [
    Attempt(
        "connect to every listening port of the host, by every address it has",
        Layer.PRIVATE,
        connects=every_port(lambda place: (*place.host[:-1], GATEWAY, MGMT_HOST)),
    ),
    Attempt(
        "connect to the resolver's address at every port that others of the host listen on",
        Layer.PRIVATE,
        connects=lambda place: [[kind, place.resolver, port] for kind, port in place.ports if port != DNS],
    ),
    Attempt(
        "connect to a sibling's listening port, by every address it has",
        Layer.PRIVATE,
        # Its own two are the same as this guest's: frames to those are above.
        connects=lambda place: [["tcp", one, port] for one in (place.sibling, place.host_ends[1]) for port in (80, 10051)],
    ),
    Attempt(
        "connect to 169.254.169.254, to the LAN",
        Layer.PRIVATE,
        connects=lambda _place: [["tcp", one, port] for one in (METADATA, LAN) for port in (80, 7)],
    ),
    Attempt(
        "connect to the API: a Unix socket, so by vsock if at all",
        Layer.NOTHING,
        connects=lambda _place: [["vsock", cid, port] for cid in (0, 1, 2) for port in (1, 52, 10051)],
    ),
]

ATTEMPTS = [*SOURCES, *LINKS, *PACKETS, *DESTINATIONS, *MANAGEMENT, *CONNECTIONS]

#: One allowed question for the gateway, of which a guest may ask some; and what many of them are stopped by.
ARP_QUESTION: Frames = asks(1, ME, (NOBODY, GATEWAY))
ARP_FLOOD = 500
FLOODS = {f"ARP: {ARP_FLOOD} allowed questions at once": "frames allowed on the tap: 20 of these a second"}

#: What has to get through, or seeing nothing of the rest proves nothing.
CONTROLS: dict[str, Frames] = {
    "UDP": lambda _p, m: [good(dgram(PUBLIC, m))],
    "TCP": lambda _p, m: [good(syn(PUBLIC, m))],
    "ping": lambda _p, m: [good(echo(PUBLIC, m))],
    "good fragments": cut(PUBLIC, [(0, 48), (48, 96)], 201),
    "a tiny first fragment: looked at when it is whole": cut(PUBLIC, [(0, 8), (8, 96)], 202, f.TCP),
    # As the first packet of any other: whom it reaches knows of no such connection either.
    "TCP in the middle of a connection that is not": lambda _p, m: [good(syn(PUBLIC, m, port=81, flags=f.ACK))],
    "record route": spoilt(options=b"\x07\x07\x04" + bytes(4)),
}

BEGIN, END = "<!-- attempts: written by `python -m harness.attempts` -->", "<!-- end of attempts -->"
SECURITY = REPO / "SECURITY.md"


def table() -> str:
    every = {**{attempt.what: attempt.stopped.words for attempt in ATTEMPTS}, **FLOODS}
    rows = "\n".join(f"| {what} | {stopped} |" for what, stopped in every.items())
    return f"{BEGIN}\n| attempt | stopped by |\n|---|---|\n{rows}\n{END}"


def written() -> str:
    """The table as SECURITY.md has it."""
    text = SECURITY.read_text(encoding="utf-8")
    return text[text.index(BEGIN) : text.index(END) + len(END)]


if __name__ == "__main__":
    SECURITY.write_text(SECURITY.read_text(encoding="utf-8").replace(written(), table()), encoding="utf-8")
