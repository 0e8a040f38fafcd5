"""A host and an internet: two network namespaces with a wire between them.

The server under test runs in `host`, where forwarding is on; this machine's own addresses, routes, rules and sysctls are not
touched. `internet` has a public address, a neighbour on the host's LAN, a metadata service, and the machine's name servers.
"""

import ipaddress
import os
import subprocess
import sys
from pathlib import Path

from .tools import run, until

#: Not in any range that guests are denied; it exists only in these namespaces.
PUBLIC = "93.184.216.34"
HOST_PUBLIC = "93.184.216.1"
LAN = "192.168.77.1"
HOST_LAN = "192.168.77.2"
METADATA = "169.254.169.254"
#: A name that the name servers there know, and one that leads to the LAN.
PUBLIC_NAME = "www.public-place.net"
LAN_NAME = "printer.lan-place.net"
HTTP = 80
ECHO = 7
DNS = 53


def name_servers() -> list[str]:
    """The machine's that are IPv4, which the server's resolver will ask; without any it asks its own host (resolv.conf(5))."""
    lines = Path("/etc/resolv.conf").read_text(encoding="utf-8").splitlines()
    words = [line.split() for line in lines]
    found = [parts[1] for parts in words if len(parts) > 1 and parts[0] == "nameserver" and ":" not in parts[1]]
    # One that is there twice can be listened on once.
    return list(dict.fromkeys(found)) or ["127.0.0.1"]


class World:
    """Made by `start`, gone after `close`."""

    def __init__(self) -> None:
        self.host = f"cpt-host-{os.getpid()}"
        self.internet = f"cpt-net-{os.getpid()}"
        self._services: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        try:
            self._wire()
            self._serve()
        except BaseException:
            self.close()
            raise

    def enter(self, netns: str | None = None) -> list[str]:
        """Words before a command that is to run there. Unlike `ip netns exec` this keeps the machine's mounts."""
        return ["nsenter", f"--net=/run/netns/{netns or self.host}", "--"]

    def run(self, *argv: object, netns: str | None = None, check: bool = True, stdin: str | None = None) -> str:
        return run(*self.enter(netns), *argv, check=check, stdin=stdin)

    def get(self, url: str, netns: str | None = None, patience: float = 30) -> str:
        """What a web server answers there; nothing when it does not within `patience` seconds."""
        script = f"import urllib.request as u; print(u.urlopen('{url}', timeout={patience}).read().decode(), end='')"
        return self.run(sys.executable, "-c", script, netns=netns, check=False)

    def _wire(self) -> None:
        host, internet = self.host, self.internet
        for name in (host, internet):
            run("ip", "netns", "add", name)
            run("ip", "-n", name, "link", "set", "lo", "up")
        for link, ours, theirs in (("wan0", HOST_PUBLIC, PUBLIC), ("lan0", HOST_LAN, LAN)):
            run("ip", "-n", host, "link", "add", link, "type", "veth", "peer", "name", link, "netns", internet)
            for netns, address in ((host, ours), (internet, theirs)):
                run("ip", "-n", netns, "addr", "add", f"{address}/24", "dev", link)
                run("ip", "-n", netns, "link", "set", link, "up")
        run("ip", "-n", host, "route", "add", "default", "via", PUBLIC)
        run("ip", "-n", internet, "addr", "add", f"{METADATA}/32", "dev", "lo")
        for server in name_servers():
            if not ipaddress.ip_address(server).is_loopback:
                run("ip", "-n", internet, "addr", "add", f"{server}/32", "dev", "lo", check=False)
        self.run("sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")

    def _serve(self) -> None:
        loopback = [server for server in name_servers() if ipaddress.ip_address(server).is_loopback]
        others = [server for server in name_servers() if server not in loopback]
        self._services.append(self._service(self.internet, [PUBLIC, *others]))
        # The host listens too: what guests must not reach has to be there.
        self._services.append(self._service(self.host, loopback))
        for netns in (self.host, self.internet):
            until(lambda netns=netns: f":{HTTP} " in self.run("ss", "-ltnH", netns=netns), what=f"services in {netns}")

    def _service(self, netns: str, dns: list[str]) -> subprocess.Popen[bytes]:
        script = Path(__file__).with_name("internet.py")
        return subprocess.Popen([*self.enter(netns), sys.executable, str(script), *dns], stdin=subprocess.DEVNULL)

    def close(self) -> None:
        for service in self._services:
            service.kill()
            service.wait()
        self._services.clear()
        for name in (self.host, self.internet):
            run("ip", "netns", "del", name, check=False)
