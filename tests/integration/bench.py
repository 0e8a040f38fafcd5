"""What a create, an exec and a delete cost on this machine: a table, and JSON in bench/results-<vmm>.json.

Every figure says which VMM it is of: a QEMU figure is never set beside a Firecracker one. Baselines are taken in the same
run: the same machine booted by hand, and a raw connection to the same agent.

    uv run python bench.py [--rounds N] [--out FILE]
"""

import argparse
import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.cli import binaries
from harness.server import ASSETS, Server
from harness.tools import REPO, run
from harness.world import World

#: The agent's address on the management NIC, the host's end, and the MACs: crates/types/src/guest.rs.
AGENT = "172.31.254.2:10051"
HOST_END = "172.31.254.1/30"
HOST_MAC = "02:ca:00:00:00:05"
GATEWAY_MAC = "02:ca:00:00:00:01"

#: VMs that live at once, to see what one more costs.
DENSITY = 4
WARM_EXECS = 30
WARM_TURNS = 10


@dataclass
class Figure:
    """Samples of one thing, in one unit."""

    name: str
    unit: str
    samples: list[float]
    digits: int = 1

    def rank(self, share: float) -> float:
        """The nearest-rank percentile."""
        ordered = sorted(self.samples)
        return ordered[max(0, -(-int(share * len(ordered) * 1000) // 1000) - 1)]

    @property
    def p50(self) -> float:
        return statistics.median(self.samples)

    def row(self) -> list[str]:
        figures = [self.p50, self.rank(0.99), min(self.samples), max(self.samples)]
        return [self.name, *[f"{figure:.{self.digits}f}" for figure in figures], str(len(self.samples)), self.unit]

    def json(self) -> dict[str, Any]:
        spread = {"p50": self.p50, "p99": self.rank(0.99), "min": min(self.samples), "max": max(self.samples)}
        return {"name": self.name, "unit": self.unit, "n": len(self.samples), **spread}


@dataclass
class Bench:
    server: Server
    world: World
    rounds: int
    figures: list[Figure] = field(default_factory=list)
    targets: list[dict[str, Any]] = field(default_factory=list)
    #: Only QEMU's command line can be started by hand.
    hand: "Hand | None" = None

    def add(self, name: str, unit: str, samples: list[float], digits: int = 1) -> Figure:
        figure = Figure(name, unit, samples, digits)
        self.figures.append(figure)
        return figure

    def target(self, what: str, measured: float, limit: float, unit: str) -> None:
        self.targets.append({"what": what, "measured": measured, "limit": limit, "unit": unit, "met": measured <= limit})

    def client(self, *argv: object, before: list[str] | None = None) -> Any:
        words = [*(before or []), binaries() / "clawpot-bench", *argv]
        return json.loads(run(*words, seconds=600))

    def cpu_ms(self) -> float:
        """CPU time that the server's process has used, its ended threads too; the clock is clock_getcpuclockid(3)'s."""
        return time.clock_gettime((~self.server.pid << 3) | 2) * 1000

    def resident_kib(self) -> int:
        status = Path(f"/proc/{self.server.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0])

    # What is measured, in order.

    def adoption(self) -> None:
        """On fakes, with the real store: what a server with many VMs costs when it comes up."""
        samples = json.loads(run(binaries() / "examples" / "adoption", seconds=600))
        taken = self.add("500 VMs adopted (fakes, real store)", "ms", samples)
        self.target("500 VMs adopted, slowest", max(taken.samples), 1000, "ms")

    def first(self) -> None:
        """The first VM of all formats the disk template and reads the image to verify it: once in a server's life."""
        self.server.cli("create", "--wait", "--name", "first", "debian").ok()
        vm = self.server.cli.inspect("first")
        if vm["vmm"] == "qemu":
            self.hand = Hand.like(self.server, vm["id"])
        self.server.cli("rm", "first").ok()

    def idle(self) -> None:
        time.sleep(2)
        idle = self.resident_kib() / 1024
        self.add("server RSS, idle, no VM", "MiB", [idle])
        self.target("server RSS idle", idle, 40, "MiB")
        began = self.cpu_ms()
        time.sleep(5)
        self.add("server CPU, idle, no VM", "ms/s", [(self.cpu_ms() - began) / 5], 2)

    def lives(self) -> None:
        """One after the other, and between them the same machine by hand: both meet the same load of this host."""
        lives, by_hand = [], []
        for number in range(self.rounds):
            lives += self.client("creates", "--socket", self.server.socket, "--rounds", 1)
            if self.hand:
                by_hand.append(self.hand.boot(number))
        for key, name in (
            ("accepted", "create → accepted (on disk)"),
            ("running", "create → running (seen by the client)"),
            ("first_output", "create → first output"),
            ("deleted", "delete → gone"),
        ):
            self.add(name, "ms", [life[key] / 1000 for life in lives])
        timings = [life["timings"] for life in lives]
        ready = [sum(one[phase] for phase in ("accepted", "preparing", "booting")) / 1000 for one in timings]
        self.add("create → agent ready (the record's)", "ms", ready)
        taken = [(one["accepted"] + one["preparing"]) / 1000 for one in timings]
        own = self.add("server's own time in a create (accepted + preparing)", "ms", taken)
        self.target("server's own time in a create, p50", own.p50, 15, "ms")
        for name in sorted({name for one in timings for name in one}):
            self.add(f"phase {name}", "ms", [one[name] / 1000 for one in timings if name in one])
        if by_hand:
            hand = self.add("the same machine by hand: QEMU's start → agent answers", "ms", by_hand)
            ratio = statistics.median(one["booting"] / 1000 for one in timings) / hand.p50
            self.target("boot to agent ready, against by hand, p50", ratio, 1.3, "×")

    def dense(self) -> None:
        spent, resident = [], []
        for number in range(DENSITY):
            began = self.cpu_ms()
            self.server.cli("create", "--wait", "--name", f"bench-{number}", "debian").ok()
            spent.append(self.cpu_ms() - began)
            time.sleep(1)
            resident.append(self.resident_kib())
        self.add("server's CPU in a create, until running", "ms", spent)
        each = (resident[-1] - resident[0]) / (DENSITY - 1)
        self.add(f"server RSS with {DENSITY} VMs", "MiB", [resident[-1] / 1024])
        self.add("server RSS, one VM more", "KiB", [each], 0)
        self.target("server RSS, one VM more", each, 300, "KiB")
        began = self.cpu_ms()
        time.sleep(5)
        self.add(f"server CPU, {DENSITY} idle VMs", "ms/s", [(self.cpu_ms() - began) / 5], 2)

    def execs(self) -> None:
        """In turns with raw round trips, so that both meet the same load."""
        vm = self.server.cli.inspect("bench-0")
        # One VM under measurement, and no other to share the CPUs with.
        for number in range(1, DENSITY):
            self.server.cli("rm", f"bench-{number}").ok()
        trips, raw = [], []
        for _ in range(WARM_TURNS):
            trips += self.client("execs", "--socket", self.server.socket, "--vm", vm["id"], "--rounds", WARM_EXECS)
            if vm["vmm"] == "qemu":
                (pid,) = self.server.vmm_pids(vm["id"])
                inside = ["nsenter", f"--net=/proc/{pid}/ns/net", "--"]
                raw += self.client("raw", "--address", AGENT, "--rounds", WARM_EXECS, before=inside)
        self.add("warm exec of /bin/true", "ms", [trip["total"] / 1000 for trip in trips], 2)
        self.add("… of which spawn → exit in the guest", "ms", [trip["spawn_to_exit"] / 1000 for trip in trips], 2)
        ours = self.add("… the rest", "ms", [(trip["total"] - trip["spawn_to_exit"]) / 1000 for trip in trips], 2)
        relay = [trip["relay"] / 1000 for trip in trips]
        self.add("the same way without a process (attach to no exec)", "ms", relay, 2)
        if raw:
            self.add("raw TCP connect to the guest", "ms", [trip["connect"] / 1000 for trip in raw], 2)
            trip = self.add("raw connect + HTTP/2 ping", "ms", [trip["total"] / 1000 for trip in raw], 2)
            self.target("warm exec less spawn → exit, against raw connect + round trip, p50", ours.p50 / trip.p50, 1.5, "×")


@dataclass
class Hand:
    """A machine that the server made, to be started again without it."""

    argv: list[str]
    files: Path

    @classmethod
    def like(cls, server: Server, vm_id: str) -> "Hand":
        (pid,) = server.vmm_pids(vm_id)
        argv = Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").decode().split("\0")
        files = server.state_dir.parent / "hand"
        files.mkdir()
        # Read-only files are shared, as in the server's own machines; the disk is a new VM's.
        for path in Path(f"/proc/{pid}/cwd").resolve().iterdir():
            if path.is_file() and path.name != "disk":
                (files / path.name).hardlink_to(path)
        (template,) = server.state_dir.glob("templates/*[0-9].ext4")
        run("cp", "--sparse=always", template, files / "disk")
        return cls(argv, files)

    def boot(self, number: int) -> float:
        """Milliseconds from QEMU's start to the agent's first answer."""
        netns = f"cpt-hand-{os.getpid()}"
        directory = self.files.with_name(f"hand-{number}")
        directory.mkdir()
        for path in self.files.iterdir():
            if path.name == "disk":
                run("cp", "--sparse=always", path, directory / path.name)
            else:
                (directory / path.name).hardlink_to(path)
        run("ip", "netns", "add", netns)
        try:
            for tap, mac in (("tap0", GATEWAY_MAC), ("mgmt0", HOST_MAC)):
                run("ip", "-n", netns, "tuntap", "add", "dev", tap, "mode", "tap", "vnet_hdr")
                run("ip", "-n", netns, "link", "set", tap, "address", mac)
                run("ip", "-n", netns, "link", "set", tap, "up")
            run("ip", "-n", netns, "addr", "add", HOST_END, "dev", "mgmt0")
            return self._boot(directory, ["nsenter", f"--net=/run/netns/{netns}", "--"])
        finally:
            run("ip", "netns", "del", netns)
            shutil.rmtree(directory)

    def _boot(self, directory: Path, inside: list[str]) -> float:
        answers = [*inside, str(binaries() / "clawpot-bench"), "answers", "--address", AGENT]
        log = directory / "qemu.log"
        wait = subprocess.Popen(answers, stdout=subprocess.PIPE)
        began = time.monotonic()
        with log.open("wb") as said:
            argv = [*inside, *_own_taps(self.argv)]
            qemu = subprocess.Popen(argv, cwd=directory, stdin=subprocess.DEVNULL, stdout=said, stderr=said)
        try:
            assert wait.wait(120) == 0 and qemu.poll() is None, log.read_text(errors="replace")[-2000:]
            return (time.monotonic() - began) * 1000
        finally:
            for process in (wait, qemu):
                process.kill()
                process.wait()


def _own_taps(argv: list[str]) -> list[str]:
    """QEMU's words with taps and QMP's socket opened by name instead of handed over as descriptors."""
    taps = iter(("tap0", "mgmt0"))
    words = []
    for word in argv:
        if ",fd=" in word:
            parts = [part for part in word.split(",") if not part.startswith("fd=")]
            named = [f"ifname={next(taps)}", "script=no", "downscript=no"] if parts[0] == "tap" else ["path=qmp.sock"]
            word = ",".join([*parts, *named])
        words.append(word)
    return words


def _table(bench: Bench, host: dict[str, Any]) -> str:
    header = ["", "p50", "p99", "min", "max", "n", ""]
    rows = [header, *[figure.row() for figure in bench.figures]]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = [f"{host['vmm']} {host['vmm_version']} ({host['vmm_reason']}), {os.cpu_count()} CPUs", ""]
    for row in rows:
        cells = [row[0].ljust(widths[0]), *[cell.rjust(width) for cell, width in zip(row[1:6], widths[1:6], strict=True)]]
        lines.append(" ".join([*cells, row[6]]).rstrip())
    lines.append("")
    for target in bench.targets:
        verdict = "met   " if target["met"] else "MISSED"
        lines.append(f"{verdict} {target['what']}: {target['measured']:.2f} {target['unit']} (limit {target['limit']})")
    return "\n".join(lines)


def _measured(world: World, server: Server, rounds: int, tell: Callable[[str], None]) -> tuple[Bench, dict[str, Any]]:
    bench = Bench(server, world, rounds)
    host = server.cli("host", "-o", "json").ok().json
    for what in (bench.adoption, bench.first, bench.idle, bench.lives, bench.dense, bench.execs):
        tell(what.__name__)
        what()
    return bench, host


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8, help="creates, one after the other")
    parser.add_argument("--out", type=Path, help="where the JSON goes instead")
    arguments = parser.parse_args()
    workdir = Path(os.environ.get("CLAWPOT_TEST_DIR", REPO / "tests/integration/.work")) / f"bench-{os.getpid()}"
    workdir.mkdir(parents=True)
    world = World()
    server = Server(world, workdir / "server", "--vmm", os.environ.get("CLAWPOT_VMM", "auto"), image_dir=ASSETS)
    began = time.monotonic()
    try:
        world.start()
        server.start()
        tell = lambda what: print(f"… {what} ({time.monotonic() - began:.0f} s)", file=sys.stderr)  # noqa: E731
        bench, host = _measured(world, server, arguments.rounds, tell)
    except BaseException:
        print(server.tail(), file=sys.stderr)
        raise
    finally:
        left = server.close()
        world.close()
        shutil.rmtree(workdir, ignore_errors=True)
    print(_table(bench, host))
    out = arguments.out or REPO / "bench" / f"results-{host['vmm']}.json"
    out.parent.mkdir(exist_ok=True)
    commit = run("git", "-C", REPO, "rev-parse", "HEAD", check=False).strip() or None
    about = {"vmm": host["vmm"], "vmm_version": host["vmm_version"], "vmm_reason": host["vmm_reason"]}
    about |= {
        "cpus": os.cpu_count(),
        "load": os.getloadavg()[1],
        "kernel": platform.release(),
        "commit": commit,
        "server_version": host["version"],
    }
    about |= {"date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}
    results = {**about, "figures": [figure.json() for figure in bench.figures], "targets": bench.targets}
    out.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    print(f"\n{out.relative_to(REPO) if out.is_relative_to(REPO) else out}")
    if left:
        print("left behind by the server:\n" + "\n".join(left), file=sys.stderr)
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
