"""What answers in a namespace: HTTP on 80, echo on 7 (TCP and UDP), DNS on 53 at the addresses given as arguments."""

import socket
import socketserver
import struct
import sys
import threading

NAMES = {b"www.public-place.net": "93.184.216.34", b"printer.lan-place.net": "192.168.77.1"}
NXDOMAIN = 3


class Threads(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True


class ThreadsUdp(socketserver.ThreadingUDPServer):
    allow_reuse_address = True
    daemon_threads = True


class Http(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        path = self.rfile.readline(8192).split(b" ")[1]
        while self.rfile.readline(8192).strip():
            pass
        if path.startswith(b"/bytes/"):
            body = b"x" * int(path.removeprefix(b"/bytes/"))
        else:
            # Who asked, as seen here.
            body = f"from {self.client_address[0]} to {self.request.getsockname()[0]}\n".encode()
        self.wfile.write(b"HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)


class Echo(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        while data := self.request.recv(65536):
            self.request.sendall(data)


class EchoUdp(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        data, sock = self.request
        sock.sendto(data, self.client_address)


def answer(query: bytes) -> bytes:
    """To a query for one name: A records of NAMES, nothing for other types, NXDOMAIN for other names."""
    ident, _, questions = struct.unpack_from("!HHH", query)
    labels, at = [], 12
    while length := query[at]:
        labels.append(query[at + 1 : at + 1 + length].lower())
        at += 1 + length
    question = query[12 : at + 5]
    kind = struct.unpack_from("!H", query, at + 1)[0]
    address = NAMES.get(b".".join(labels))
    records = b""
    if address and kind == 1:
        records = struct.pack("!HHHIH", 0xC00C, 1, 1, 60, 4) + socket.inet_aton(address)
    flags = 0x8180 | (0 if address else NXDOMAIN)
    return struct.pack("!HHHHHH", ident, flags, questions, 1 if records else 0, 0, 0) + question + records


class Dns(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        query, sock = self.request
        sock.sendto(answer(query), self.client_address)


class DnsTcp(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        while len(head := self.rfile.read(2)) == 2:
            reply = answer(self.rfile.read(struct.unpack("!H", head)[0]))
            self.wfile.write(struct.pack("!H", len(reply)) + reply)


def main() -> None:
    servers: list[socketserver.BaseServer] = [Threads(("0.0.0.0", 7), Echo)]
    for address in sys.argv[1:]:
        # Bound to the address itself, so that the answer comes from where the question went.
        servers += [ThreadsUdp((address, 53), Dns), Threads((address, 53), DnsTcp)]
    if sys.argv[1:]:
        servers.append(ThreadsUdp((sys.argv[1], 7), EchoUdp))
    for server in servers:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    # Last: whoever sees port 80 open may count on the others.
    Threads(("0.0.0.0", 80), Http).serve_forever()


if __name__ == "__main__":
    main()
