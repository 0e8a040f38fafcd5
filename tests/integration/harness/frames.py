"""Ethernet frames, byte by byte: good ones, and such as no honest kernel sends."""

import ipaddress
import socket
import struct

TCP, UDP, ICMP = 6, 17, 1
IPV4, IPV6, ARP, RARP, VLAN, QINQ = 0x0800, 0x86DD, 0x0806, 0x8035, 0x8100, 0x88A8
BROADCAST = "ff:ff:ff:ff:ff:ff"
SYN, FIN, ACK = 2, 1, 16

MORE = 0x2000


def mac(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


def checksum(data: bytes) -> int:
    if len(data) % 2:
        data += b"\0"
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def ethernet(to: str, sender: str, kind: int, payload: bytes) -> bytes:
    return (mac(to) + mac(sender) + struct.pack("!H", kind) + payload).ljust(60, b"\0")


def ip(
    sender: str,
    to: str,
    protocol: int,
    payload: bytes,
    *,
    ident: int = 0,
    fragment: int = 0,
    ttl: int = 64,
    options: bytes = b"",
    words: int | None = None,
    length: int | None = None,
    spoil: int = 0,
) -> bytes:
    """`fragment`: flags and offset in units of eight bytes. `words`, `length`, `spoil`: lies about the header."""
    options = options.ljust(-(-len(options) // 4) * 4, b"\0")
    size = 20 + len(options)
    first = 0x40 | (size // 4 if words is None else words)
    total = size + len(payload) if length is None else length
    fields = [first, 0, total, ident, fragment, ttl, protocol]
    ends = socket.inet_aton(sender) + socket.inet_aton(to)
    bare = struct.pack("!BBHHHBBH", *fields, 0) + ends + options
    return struct.pack("!BBHHHBBH", *fields, checksum(bare) ^ spoil) + ends + options + payload


def _summed(sender: str, to: str, protocol: int, packet: bytes, at: int) -> bytes:
    """With the checksum over the pseudo header put in at `at`."""
    pseudo = socket.inet_aton(sender) + socket.inet_aton(to) + struct.pack("!BBH", 0, protocol, len(packet))
    return packet[:at] + struct.pack("!H", checksum(pseudo + packet)) + packet[at + 2 :]


def udp(sender: str, to: str, port: int, data: bytes, source: int = 40000) -> bytes:
    return _summed(sender, to, UDP, struct.pack("!HHHH", source, port, 8 + len(data), 0) + data, 6)


def tcp(sender: str, to: str, port: int, data: bytes, flags: int = SYN, source: int = 40000) -> bytes:
    head = struct.pack("!HHIIBBHHH", source, port, 1000, 0, 5 << 4, flags, 64240, 0, 0)
    return _summed(sender, to, TCP, head + data, 16)


def icmp(kind: int, code: int, rest: bytes, data: bytes) -> bytes:
    packet = struct.pack("!BBH", kind, code, 0) + rest + data
    return packet[:2] + struct.pack("!H", checksum(packet)) + packet[4:]


def crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ 0x82F63B78 * (crc & 1)
    return crc ^ 0xFFFFFFFF


def sctp(data: bytes) -> bytes:
    """The start of an association; `data` in a parameter that receivers skip."""
    parameter = struct.pack("!HH", 0xC0FF, 4 + len(data)) + data.ljust(-(-len(data) // 4) * 4, b"\0")
    chunk = struct.pack("!BBHIIHHI", 1, 0, 20 + len(parameter), 1, 65536, 1, 1, 1) + parameter
    head = struct.pack("!HHI", 40000, 9, 0)
    return head + struct.pack("<I", crc32c(head + bytes(4) + chunk)) + chunk


def arp(operation: int, sender: tuple[str, str], wanted: tuple[str, str], mark: bytes) -> bytes:
    """Each end: MAC and address. The mark follows what ARP reads."""
    ends = b"".join(mac(one) + socket.inet_aton(address) for one, address in (sender, wanted))
    return struct.pack("!HHBBH", 1, IPV4, 6, 4, operation) + ends + mark


def ipv6(sender: str, to: str, following: int, payload: bytes, hops: int = 255) -> bytes:
    ends = ipaddress.IPv6Address(sender).packed + ipaddress.IPv6Address(to).packed
    return struct.pack("!IHBB", 6 << 28, len(payload), following, hops) + ends + payload


def icmp6(sender: str, to: str, kind: int, rest: bytes) -> bytes:
    """A whole packet; the checksum covers a pseudo header."""
    body = struct.pack("!BBH", kind, 0, 0) + rest
    pseudo = ipaddress.IPv6Address(sender).packed + ipaddress.IPv6Address(to).packed + struct.pack("!II", len(body), 58)
    return ipv6(sender, to, 58, body[:2] + struct.pack("!H", checksum(pseudo + body)) + body[4:])


def tag(number: int, inner: int, payload: bytes) -> bytes:
    """What follows the type of a tagged frame."""
    return struct.pack("!HH", number, inner) + payload


def pieces(sender: str, to: str, protocol: int, whole: bytes, cuts: list[tuple[int, int]], ident: int) -> list[bytes]:
    """IP fragments of `whole`, each from one offset to another; the last is the one that ends where the whole does."""
    found = []
    for begin, end in cuts:
        flags = MORE if end < len(whole) else 0
        found.append(ip(sender, to, protocol, whole[begin:end], ident=ident, fragment=flags | begin // 8))
    return found
