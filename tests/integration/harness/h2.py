"""A client of HTTP/2 with no manners: as much of it as it takes to send what a good client would not.

Headers are literals without Huffman coding (RFC 7541, 6.2.2); of answers only the kinds of frames are looked at.
"""

import socket
import struct
from pathlib import Path

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 7, 8
END_STREAM, END_HEADERS, ACK = 1, 4, 1
#: RST_STREAM's reason when there are too many.
REFUSED_STREAM = 7


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def _text(text: str) -> bytes:
    data = text.encode()
    # An integer of seven bits and, where these are all set, of seven more for each byte.
    length, rest = bytearray(), len(data)
    if rest < 127:
        length.append(rest)
    else:
        length.append(127)
        rest -= 127
        while rest >= 128:
            length.append(rest % 128 + 128)
            rest //= 128
        length.append(rest)
    return bytes(length) + data


def headers(path: str, more: dict[str, str] | None = None) -> bytes:
    fields = {":method": "POST", ":scheme": "http", ":path": path, ":authority": "clawpot.invalid"}
    fields |= {"content-type": "application/grpc", "te": "trailers", **(more or {})}
    return b"".join(b"\x00" + _text(name) + _text(value) for name, value in fields.items())


class Rude:
    """One connection. Streams are odd numbers, as a client's have to be."""

    def __init__(self, path: Path, preface: bool = True) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(60)
        self.socket.connect(str(path))
        if preface:
            self.socket.sendall(PREFACE + frame(SETTINGS, 0, 0))
        self._buffer = b""

    def __enter__(self) -> "Rude":
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def call(self, stream: int, path: str, more: dict[str, str] | None = None) -> None:
        """Its headers; the message is still to come."""
        self.socket.sendall(frame(HEADERS, END_HEADERS, stream, headers(path, more)))

    def data(self, stream: int, data: bytes) -> None:
        for start in range(0, len(data), 16384):
            self.socket.sendall(frame(DATA, 0, stream, data[start : start + 16384]))

    def next(self) -> tuple[int, int, bytes] | None:
        """Kind, stream and payload of the next frame; nothing when the server has closed."""
        head = self._read(9)
        if head is None:
            return None
        length, kind, stream = int.from_bytes(head[:3]), head[3], int.from_bytes(head[5:9])
        if kind == SETTINGS and not head[4] & ACK:
            self.socket.sendall(frame(SETTINGS, ACK, 0))
        return kind, stream, self._read(length) or b""

    def _read(self, count: int) -> bytes | None:
        while len(self._buffer) < count:
            try:
                data = self.socket.recv(65536)
            except ConnectionError:
                return None
            if not data:
                return None
            self._buffer += data
        taken, self._buffer = self._buffer[:count], self._buffer[count:]
        return taken

    def until(self, wanted: int, stream: int) -> bytes | None:
        """The payload of the first frame of that kind on that stream."""
        while found := self.next():
            kind, on, payload = found
            if (kind, on) == (wanted, stream):
                return payload
        return None

    def closed(self) -> bool:
        """Waits until the server has ended the connection."""
        while self.next():
            pass
        return True
