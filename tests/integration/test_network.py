"""A guest reaches public addresses and names, and nothing else; nothing reaches a guest."""

import json
import socket
import time

import pytest

from harness import world as w
from harness.server import Server
from harness.tools import until, within
from harness.world import World

#: Tries each "kind address port" for so many seconds and prints what came of it: "open", "refused", "silence" …
PROBE = r"""
import errno, json, socket, sys
patience = float(sys.argv[1])
def tcp(address, port):
    with socket.create_connection((address, port), timeout=patience) as s:
        s.sendall(b"ping")
        return "open" if port != 7 or s.recv(4) == b"ping" else "other"
def udp(address, port):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.settimeout(patience)
        s.connect((address, port))
        s.send(b"ping")
        return "open" if s.recv(4) == b"ping" else "other"
found = {}
for target in sys.argv[2:]:
    kind, address, port = target.split()
    try:
        found[target] = {"tcp": tcp, "udp": udp}[kind](address, int(port))
    except TimeoutError:
        found[target] = "silence"
    except OSError as error:
        found[target] = errno.errorcode.get(error.errno, str(error))
print(json.dumps(found))
"""


#: For what must answer, however busy the host is, seconds.
ANSWERS = within(60)


def _probe(server: Server, vm: str, *targets: str, patience: float = 3) -> dict[str, str]:
    done = server.cli("exec", vm, "--", "python3", "-c", PROBE, patience, *targets).ok()
    found: dict[str, str] = json.loads(done.text)
    return found


@pytest.mark.firecracker
def test_names_and_public_addresses(server: Server, vm: str) -> None:
    script = f"curl -sS -m 60 http://{w.PUBLIC_NAME}/; getent ahostsv4 {w.PUBLIC_NAME} | head -n 1"
    page, name = server.cli.sh(vm, script).ok().text.splitlines()
    # Seen from outside it is the host that asks.
    assert page == f"from {w.HOST_PUBLIC} to {w.PUBLIC}"
    assert name.split()[0] == w.PUBLIC
    found = _probe(server, vm, f"tcp {w.PUBLIC} {w.ECHO}", f"udp {w.PUBLIC} {w.ECHO}", patience=ANSWERS)
    assert set(found.values()) == {"open"}, found


def test_a_name_that_is_not_there_is_told_at_once(server: Server, vm: str) -> None:
    # A resolver that hears nothing asks again after so long, and then again; 30 s is the longest that it takes.
    done = server.cli("exec", "-e", "RES_OPTIONS=timeout:30", vm, "--", "getent", "hosts", "no-such-name.public-place.net")
    assert done.code == 2 and done.seconds < within(29), done


def test_a_megabyte_comes_through_whole(server: Server, vm: str) -> None:
    done = server.cli.sh(vm, f"curl -sS -m 60 http://{w.PUBLIC}/bytes/8000000 | wc -c").ok()
    assert done.text.strip() == "8000000"


@pytest.mark.firecracker
def test_a_guest_reaches_nothing_else(server: Server, world: World, vm: str, sibling: str) -> None:
    one, other = server.cli.inspect(vm)["address"], server.cli.inspect(sibling)["address"]
    gateway, resolver = _gateway(server, vm), _resolver(server, world)
    _serve(server, world, sibling)
    forbidden = [
        *[f"tcp {address} {port}" for address in (w.HOST_PUBLIC, w.HOST_LAN) for port in (w.HTTP, w.ECHO)],
        *[f"tcp {_neighbour(address)} {w.HTTP}" for address in (one, other)],
        *[f"tcp {address} {w.HTTP}" for address in (gateway, resolver, one, other, w.LAN, w.METADATA)],
        *[f"udp {w.name_servers()[0]} {w.ECHO}", f"tcp {w.name_servers()[0]} {w.HTTP}"],
        f"tcp 127.0.0.1 {w.HTTP}",
        f"tcp {w.PUBLIC} 9",
    ]
    # That they are there, the host knows.
    for address in (w.HOST_PUBLIC, w.LAN, w.METADATA):
        assert world.get(f"http://{address}/"), address
    found = _probe(server, vm, *forbidden)
    assert not [target for target, came in found.items() if came in ("open", "other")], found
    # What is forbidden is refused where that can be said, not left to time out.
    assert found[f"tcp {w.LAN} {w.HTTP}"] != "silence", found
    # A name that leads to the LAN leads nowhere.
    assert server.cli.sh(vm, f"curl -sS -m 5 http://{w.LAN_NAME}/").code != 0


def _serve(server: Server, world: World, vm: str) -> None:
    """A server on the guest's port 80, once it answers the host, which may ask it: who does not reach it is kept from it."""
    server.cli.sh(vm, "python3 -m http.server 80 >/dev/null 2>&1 </dev/null & sleep 0.1", "--timeout", "120s").ok()
    address = server.cli.inspect(vm)["address"]
    until(lambda: world.get(f"http://{address}/"), seconds=60, what=f"the web server of {vm}")


def _gateway(server: Server, vm: str) -> str:
    """The guest's default route: /proc/net/route has it in hexadecimal, last byte first."""
    script = "while read -r _ to via _; do [ $to != 00000000 ] || echo $via; done < /proc/net/route"
    return socket.inet_ntoa(bytes.fromhex(server.cli.sh(vm, script).ok().text.split()[0])[::-1])


def _resolver(server: Server, world: World) -> str:
    """The resolver's address on the host's loopback."""
    lines = world.run("ip", "-4", "-o", "addr", "show", "dev", "lo").splitlines()
    found = [line.split()[3].split("/")[0] for line in lines if "127.0.0.1" not in line and str(server.traces.instance) in line]
    return found[0] if found else "127.0.0.53"


def _neighbour(address: str) -> str:
    """The host's end of a slot: the even address below the VM's."""
    head, last = address.rsplit(".", 1)
    return f"{head}.{int(last) - 1}"


@pytest.mark.firecracker
def test_nobody_outside_reaches_a_guest(server: Server, world: World, vm: str) -> None:
    address = server.cli.inspect(vm)["address"]
    _serve(server, world, vm)
    # From there the host is reached, and by way of it the guest would be.
    assert world.get(f"http://{w.HOST_PUBLIC}/", netns=world.internet)
    world.run("ip", "route", "add", f"{address}/32", "via", w.HOST_PUBLIC, netns=world.internet)
    try:
        assert world.get(f"http://{address}/", netns=world.internet, patience=3) == ""
    finally:
        world.run("ip", "route", "del", f"{address}/32", netns=world.internet)


def test_a_slot_is_silent_without_its_elements(server: Server, world: World, vm: str) -> None:
    """Losing the host's table costs connectivity, never isolation; the server puts it back when it starts."""
    table = f"clawpot-{server.traces.instance}"
    world.run("nft", "delete", "table", "inet", table)
    found = _probe(server, vm, f"tcp {w.LAN} {w.HTTP}", f"tcp {w.METADATA} {w.HTTP}")
    assert "open" not in found.values(), found
    assert server.cli.sh(vm, "echo still here").ok().text == "still here\n"
    server.stop()
    server.start()
    assert _probe(server, vm, f"tcp {w.PUBLIC} {w.ECHO}", patience=ANSWERS) == {f"tcp {w.PUBLIC} {w.ECHO}": "open"}


def test_names_are_resolved_while_no_server_runs(server: Server, world: World, vm: str) -> None:
    """The resolver survives the daemon."""
    script = f"echo up; sleep 3; getent ahostsv4 {w.PUBLIC_NAME} | head -n 1"
    process = server.cli.start("exec", vm, "--", "sh", "-c", script)
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    server.kill9()
    try:
        time.sleep(5)
    finally:
        server.start()
    out, errors = process.communicate(timeout=within(60))
    assert out.decode().split()[:1] == [w.PUBLIC], errors


@pytest.mark.parametrize("kind", ["inet", "ip"])
def test_other_peoples_rules_stay(server: Server, world: World, kind: str) -> None:
    world.run("nft", "add", "table", kind, "somebody")
    try:
        server.stop()
        server.start()
        assert f"table {kind} somebody" in world.run("nft", "list", "tables")
    finally:
        world.run("nft", "delete", "table", kind, "somebody")
