"""Nothing that a hostile guest forges gets out: seen from outside, by sniffers in every namespace around it.

What is tried is `harness/attempts.py`; SECURITY.md has it as a table.
"""

import json
import os
import re
import secrets
import select
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from harness import attempts as a
from harness import world as w
from harness.server import Server
from harness.tools import until, within
from harness.world import World

HOSTILE = Path(__file__).with_name("guest") / "hostile.py"
SNIFFER = Path(a.__file__).with_name("sniffer.py")

#: Numbers of the controls, above those of all attempts.
FIRST_CONTROL = 9000
#: The guest's last packet.
LAST = 9998
#: For the other VM's own packet, which shows that its sniffers see.
SIBLINGS_CONTROL = 9999

#: How long the guest waits for the host's rules to be flushed before it begins, seconds.
DELAY = within(4)

#: The guest's own NICs, as its netns has them: where everything it sends comes out.
TAPS = ("tap0", "mgmt0")


@dataclass(frozen=True)
class Stage:
    """Two VMs, and the names of what is around them."""

    server: Server
    world: World
    vm: str
    vmm: str
    sibling: str
    place: a.Place
    netns: str
    siblings_netns: str

    @property
    def attempts(self) -> list[tuple[int, a.Attempt]]:
        """What this guest can try, each with its number: one that is reached by vsock has no management NIC."""
        nics = {a.GUEST_MAC} if self.vmm == "firecracker" else {a.GUEST_MAC, a.MGMT_MAC}
        return [(number, one) for number, one in enumerate(a.ATTEMPTS) if one.nic in nics]

    @property
    def watched(self) -> dict[str, str]:
        return {
            "slot": self.netns,
            "sibling": self.siblings_netns,
            "host": self.world.host,
            "internet": self.world.internet,
        }

    @property
    def link(self) -> str:
        """The host's end of the VM's veth; it is called as its netns is."""
        return self.netns


@dataclass
class Seen:
    """`places`: for each mark, "namespace link in|out"."""

    answer: dict[str, Any]
    counted: Counter[str]
    places: dict[int, set[str]] = field(default_factory=dict)

    def of(self, number: int) -> set[str]:
        return self.places.get(number, set())


@pytest.fixture
def stage(server: Server, world: World, vm: str, sibling: str) -> Stage:
    inspected = server.cli.inspect(vm)
    own, other = inspected["address"], server.cli.inspect(sibling)["address"]
    names = {
        entry["local"]: link["ifname"]
        for link in json.loads(world.run("ip", "-4", "-j", "addr"))
        for entry in link["addr_info"]
    }
    resolver = [
        entry["local"]
        for link in json.loads(world.run("ip", "-4", "-j", "addr", "show", "dev", "lo"))
        for entry in link["addr_info"]
        if entry.get("label") == f"lo:cp{server.traces.instance}"
    ]
    lines = world.run("ss", "-lntuH").splitlines()
    ports = sorted({(line.split()[0], int(line.split()[4].rsplit(":", 1)[1])) for line in lines})
    assert {("tcp", w.HTTP), ("tcp", w.ECHO)} <= set(ports), "the host listens, or there is nothing to reach"
    # What nobody listens on is tried too: a mistake there would be answered by a reset.
    place = a.Place(own, other, resolver[0], (*ports, ("tcp", 22)))
    server.cli.sh(sibling, "python3 -m http.server 80 >/dev/null 2>&1 </dev/null & sleep 0.3", "--timeout", "120s")
    found = Stage(server, world, vm, inspected["vmm"], sibling, place, names[a.neighbour(own)], names[a.neighbour(other)])
    until(lambda: world.get(f"http://{other}/"), seconds=60, what="the sibling's web server")
    return found


@contextmanager
def _sniffing(netns: str, nonce: str) -> Iterator[subprocess.Popen[str]]:
    words = ["nsenter", f"--net=/run/netns/{netns}", "--", sys.executable, str(SNIFFER), nonce, str(LAST)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdout.readline() == "ready\n"
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def _counters(netns: str) -> Counter[str]:
    """Packets by the comment of the rule that counted them."""
    words = ["nsenter", f"--net=/run/netns/{netns}", "--", "nft", "-j", "list", "ruleset"]
    listed = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
    found: Counter[str] = Counter()
    for rule in (entry["rule"] for entry in listed["nftables"] if "rule" in entry):
        for step in rule["expr"]:
            if "counter" in step and "comment" in rule:
                found[rule["comment"]] += step["counter"]["packets"]
    return found


def _plan(stage: Stage, nonce: str, *, delay: float) -> dict[str, Any]:
    def mark(number: int) -> bytes:
        return f"cpm:{nonce}:{number:04d};".encode()

    sent: list[list[str]] = []
    for number, attempt in stage.attempts:
        sent += [[attempt.nic, frame.hex()] for frame in attempt.frames(stage.place, mark(number))]
    for number, control in enumerate(a.CONTROLS.values(), FIRST_CONTROL):
        sent += [[a.GUEST_MAC, frame.hex()] for frame in control(stage.place, mark(number))]
    connects = [target for _, attempt in stage.attempts for target in attempt.connects(stage.place)]
    # Without the host's rules nobody answers these.
    allowed = [] if delay else [["tcp", w.PUBLIC, w.ECHO], ["udp", a.GATEWAY, w.DNS], ["tcp", a.GATEWAY, w.DNS]]
    last = [a.GUEST_MAC, a.good(a.dgram(w.PUBLIC, mark(LAST))).hex()]
    limits = {"delay": delay, "patience": within(2), "long": within(60)}
    return {**limits, "frames": sent, "connects": connects, "open": allowed, "last": last}


class TooSlowError(Exception):
    """The guest began before the host's rules were gone."""


def _attack_without_rules(stage: Stage) -> Seen:
    """Everything once, with the host's rules gone and the server stopped, so that nobody brings them back."""
    try:
        return _attack(stage, DELAY)
    except TooSlowError:
        _until_rules_are_back(stage)
        return _attack(stage, 5 * DELAY)


def _until_rules_are_back(stage: Stage) -> None:
    table = f"table inet clawpot-{stage.server.traces.instance}"
    until(lambda: table in stage.world.run("nft", "list", "tables"), what="the table's return")


def _attack(stage: Stage, delay: float = 0) -> Seen:
    """Everything once. `delay`: so much later, without the host's rules."""
    nonce = secrets.token_hex(2)
    before = _counters(stage.netns)
    script = HOSTILE.read_text(encoding="utf-8")
    with ExitStack() as open_things:
        sniffers = {name: open_things.enter_context(_sniffing(netns, nonce)) for name, netns in stage.watched.items()}
        _siblings_packet(stage, nonce)
        plan = json.dumps(_plan(stage, nonce, delay=delay)) + "\n"
        guest = stage.server.cli.start("exec", "-i", stage.vm, "--", "python3", "-c", script, stdin=subprocess.PIPE)
        open_things.callback(guest.kill)
        assert guest.stdin and guest.stdout
        guest.stdin.write(plan.encode())
        guest.stdin.close()
        guest.stdin = None
        assert guest.stdout.readline() == b"ready\n"
        over = sniffers["slot"]
        if delay:
            _without_rules(stage, over, guest, delay)
        else:
            _over(over, guest)
        out, errors = guest.communicate(timeout=within(90))
        assert guest.returncode == 0, errors.decode()
        seen = Seen(json.loads(out), _counters(stage.netns) - before)
        for name, sniffer in sniffers.items():
            said, _ = sniffer.communicate("", timeout=within(60))
            for number, places in json.loads(said.splitlines()[-1]).items():
                seen.places.setdefault(int(number), set()).update(f"{name} {place}" for place in places)
    return seen


def _siblings_packet(stage: Stage, nonce: str) -> None:
    mark = f"cpm:{nonce}:{SIBLINGS_CONTROL:04d};"
    script = f"import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'{mark}', ('{w.PUBLIC}', 9))"
    stage.server.cli("exec", stage.sibling, "--", "python3", "-c", script).ok()


def _without_rules(stage: Stage, over: subprocess.Popen[str], guest: subprocess.Popen[bytes], delay: float) -> None:
    """From here until the attack is over. The server sleeps through it; what the guest says waits for it."""
    began = time.monotonic()
    os.kill(stage.server.pid, signal.SIGSTOP)
    try:
        stage.world.run("nft", "flush", "ruleset")
        if time.monotonic() - began > delay - 1:
            raise TooSlowError
        _over(over, guest)
        # Another server there may have brought back its own.
        table = f"table inet clawpot-{stage.server.traces.instance} "
        assert table not in stage.world.run("nft", "list", "ruleset"), "somebody brought the rules back too early"
    finally:
        os.kill(stage.server.pid, signal.SIGCONT)


def _over(sniffer: subprocess.Popen[str], guest: subprocess.Popen[bytes]) -> None:
    """Returns when the guest has sent its last packet."""
    assert sniffer.stdout
    end = time.monotonic() + within(120)
    while not select.select([sniffer.stdout], [], [], 1)[0]:
        if guest.poll():
            assert guest.stderr
            raise AssertionError(f"the attack ended with {guest.returncode}: {guest.stderr.read().decode()}")
        assert time.monotonic() < end, "the attack does not end"
    assert sniffer.stdout.readline() == "over\n", "the sniffer ended before the attack"


def _judge(stage: Stage, seen: Seen, *, translated: bool = True) -> None:
    assert not seen.answer["refused"], seen.answer["refused"]
    _controls(stage, seen, translated=translated)
    escaped = {}
    for number, attempt in stage.attempts:
        places = seen.of(number)
        if attempt.frames(stage.place, b""):
            tap = "mgmt0" if attempt.nic == a.MGMT_MAC else "tap0"
            assert f"slot {tap} in" in places, f"{attempt.what}: was not sent: {places}"
        elsewhere = {place for place in places if not place.startswith(tuple(f"slot {tap} " for tap in TAPS))}
        if elsewhere:
            escaped[attempt.what] = sorted(elsewhere)
    assert not escaped, json.dumps(escaped, indent=1)
    came = seen.answer["connects"]
    reached = [
        f"{attempt.what}: {' '.join(map(str, target))}"
        for _, attempt in stage.attempts
        for target in attempt.connects(stage.place)
        if came[" ".join(map(str, target))] == "open"
    ]
    assert not reached, reached


def _controls(stage: Stage, seen: Seen, *, translated: bool) -> None:
    """What is allowed is seen on its whole way, so a sniffer that sees nothing of the rest is not blind."""
    way = {"slot tap0 in", "slot up0 out", f"host {stage.link} in", "host wan0 out", "internet wan0 in"}
    for number, what in enumerate(a.CONTROLS, FIRST_CONTROL):
        assert way <= seen.of(number), f"{what}: seen at {sorted(seen.of(number))} only"
    assert {"sibling tap0 in", "sibling up0 out"} <= seen.of(SIBLINGS_CONTROL), seen.of(SIBLINGS_CONTROL)
    if translated:
        came = seen.answer["connects"]
        open_ones = [f"tcp {w.PUBLIC} {w.ECHO}", f"udp {a.GATEWAY} {w.DNS}", f"tcp {a.GATEWAY} {w.DNS}"]
        assert all(came[one] == "open" for one in open_ones), [came[one] for one in open_ones]


def _count(stage: Stage, seen: Seen) -> None:
    """Each layer stopped at least what the table says it stops."""
    expected: Counter[a.Layer] = Counter()
    for _, attempt in stage.attempts:
        frames = len(attempt.frames(stage.place, b"")) if attempt.counted is None else attempt.counted
        expected[attempt.stopped] += frames
    for layer, packets in expected.items():
        if layer.counters:
            counted = sum(seen.counted[comment] for comment in layer.counters)
            assert counted >= packets, f"{layer.words}: {counted} packets counted, {packets} sent: {seen.counted}"


def _neighbours(stage: Stage) -> str:
    """Whom the guest's netns and the host take for whom, less what comes and goes by itself."""
    lines = stage.world.run("ip", "-4", "neigh", netns=stage.netns).splitlines()
    lines += [line for line in stage.world.run("ip", "-4", "neigh").splitlines() if stage.link in line]
    return "\n".join(sorted(lines))


def test_nothing_gets_out(stage: Stage) -> None:
    before = _neighbours(stage)
    seen = _attack(stage)
    _judge(stage, seen)
    _count(stage, seen)
    assert _neighbours(stage) == before, "forged ARP was believed"
    assert "PERMANENT" in before, before


def test_nothing_gets_out_when_the_hosts_rules_are_gone(stage: Stage) -> None:
    seen = _attack_without_rules(stage)
    _judge(stage, seen, translated=False)
    # Without its rules the host does not translate, but the walls are the netns's own.
    _count(stage, seen)
    # And after the server has brought them back.
    _until_rules_are_back(stage)
    _judge(stage, _attack(stage))


def test_a_flood_of_arp_is_held_to_its_rate(stage: Stage) -> None:
    """Each question is allowed, and answered at the host's cost."""
    question = [a.GUEST_MAC, a.ARP_QUESTION(stage.place, b"").pop().hex()]
    plan = {
        "delay": 0,
        "patience": 1,
        "frames": [question] * a.ARP_FLOOD,
        "connects": [],
        "open": [],
        "long": 60,
        "last": question,
    }
    before, began = _counters(stage.netns), time.monotonic()
    script = HOSTILE.read_text(encoding="utf-8")
    stdin = json.dumps(plan).encode() + b"\n"
    done = stage.server.cli("exec", "-i", stage.vm, "--", "python3", "-c", script, stdin=stdin).ok()
    assert '"refused": []' in done.text, done
    # 20 a second, and as many at once as it has in hand when it begins.
    passed = 20 * (time.monotonic() - began + 1)
    dropped = (_counters(stage.netns) - before)["guard"]
    assert dropped > 0 and dropped >= a.ARP_FLOOD - passed, f"{dropped} of {a.ARP_FLOOD} dropped, {passed:.0f} may pass"


def test_the_table_of_attempts_is_in_security_md() -> None:
    assert a.written() == a.table(), "run `python -m harness.attempts` in tests/integration"
    names = [attempt.what for attempt in a.ATTEMPTS]
    assert len(set(names)) == len(names)
    assert not [name for name in names if re.search(r"[|\n]", name)]
