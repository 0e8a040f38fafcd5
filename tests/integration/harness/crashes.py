"""A server that dies at named points of what it does (crates/failpoint), and VMs' lives in which it does so again and again."""

import contextlib
import json
import os
import random
import signal
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .cli import binaries
from .server import ASSETS, VMM, Server
from .tools import run, until, within
from .world import World

#: From an order to a server's death: a guest's boot on a busy machine is among them.
DEATH = within(60)
#: Points that are passed in the background, after the command that led there has ended: a spare disk, limits of version 1.
AFTERMATH = within(1)
#: What a life consists of. `create sized` is for a disk of a size that no disk had before.
VERBS = ("create sized", "create", "stop", "start", "delete")
#: What an odd one consists of: its VMM dies and its policy starts it again, somebody moves the VMM out of its cgroup and back,
#: its time to live is over.
ODD = ("create", "break", "lose", "find", "expire", "delete")
#: A server that dies there has not written down who its VMM is: one that then dies or is moved was never known, and is started
#: again under the same number. Not in an odd life, which is about those that are known.
UNKNOWN = ("host.child_born", "host.spawned", "vmm.forked")


def program() -> Path:
    path = binaries() / "failpoints" / "clawpot-server"
    assert path.exists(), f"no {path}: scripts/test and `make crash-cycles` build it (scripts/lib/build.sh)"
    return path


def all_points() -> list[str]:
    return run(program(), "failpoints").split()


class Mortal(Server):
    """A server built with failpoints."""

    def __init__(self, world: World, state_dir: Path, *options: object, image_dir: Path = ASSETS) -> None:
        edge = binaries() / "clawpot-edge"
        super().__init__(world, state_dir, "--vmm", VMM, "--edge", edge, *options, image_dir=image_dir)
        self.orders = state_dir.with_name(f"{state_dir.name}-failpoints")
        self.orders.mkdir(parents=True, exist_ok=True)

    def command(self, *more: object) -> list[str]:
        return [str(program()), *super().command(*more)[1:]]

    def environment(self) -> dict[str, str]:
        return {**super().environment(), "CLAWPOT_FAILPOINTS": str(self.orders)}

    def arm(self, point: str, nth: int) -> None:
        half = self.orders / "armed.new"
        half.write_text(f"{point} {nth}\n")
        half.rename(self.orders / "armed")

    def disarm(self) -> bool:
        """Whether it still was armed."""
        try:
            (self.orders / "armed").unlink()
        except FileNotFoundError:
            return False
        return True

    def hits(self) -> list[str]:
        """Every point passed so far, by all servers in this directory."""
        path = self.orders / "hits"
        return path.read_text().split() if path.exists() else []

    def passed(self) -> int:
        """How far it is: bytes of what they are written into."""
        path = self.orders / "hits"
        return path.stat().st_size if path.exists() else 0

    def helped(self) -> bool:
        """Whether a program works for it right now. VMMs and the resolver have cgroups of their own."""
        with contextlib.suppress(OSError):
            own = Path(f"/proc/{self.pid}/cgroup").read_text()
            children = [path.read_text().split() for path in Path(f"/proc/{self.pid}/task").glob("*/children")]
            return any(_group(pid) == own for pids in children for pid in pids)
        return False

    def died(self) -> bool:
        return self.process is not None and self.process.poll() is not None


def _group(pid: str) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cgroup").read_text()
    return ""


@dataclass
class Tally:
    """What was done and found, over all lives."""

    deaths: Counter[str] = field(default_factory=Counter)
    #: Orders whose hit did not come: what is done in the background is not always done at the same time.
    missed: Counter[str] = field(default_factory=Counter)
    passed: set[str] = field(default_factory=set)
    lives: int = 0
    wrong: list[str] = field(default_factory=list)

    def told(self) -> str:
        return (
            f"{self.lives} lives, {self.deaths.total()} deaths at {len(self.deaths)} points, {self.missed.total()} missed, "
            f"{len(self.wrong)} wrong"
        )


class Lives:
    """One VM after the other on one server: create, stop, start, delete, each with or without a death."""

    def __init__(self, server: Mortal, tally: Tally, seed: int) -> None:
        self.server = server
        self.tally = tally
        self.random = random.Random(seed)
        self.name = "mortal"
        self.size = 1024
        self.restart = "never"
        self.token = ""
        #: Machines that the VM has had.
        self.machines = 0
        #: Its VMM, while somebody has moved it.
        self.moved: list[int] = []
        #: What each verb passes when nothing goes wrong: points in order.
        self.known: dict[str, list[str]] = {}
        self.before = server.start().steady()

    # One verb.

    def words(self, verb: str) -> list[str]:
        """Of the command; none where it is not a client who acts."""
        if verb == "create sized":
            self.size += 1
        if verb.startswith("create"):
            return ["create", "--name", self.name, "--disk", f"{self.size}M", "--restart", self.restart, "debian"]
        return {
            "stop": ["stop", self.name],
            "start": ["start", "--no-wait", self.name],
            "expire": ["ttl", self.name, "1s"],
            "delete": ["rm", self.name],
        }.get(verb, [])

    def provoke(self, verb: str) -> None:
        """What others than clients do."""
        if verb in ("create", "create sized"):
            self.machines, self.moved = 1, []
        elif verb in ("start", "break"):
            self.machines += 1
        vm_id = self.record().get("id", "")
        if verb == "break":
            for pid in self.server.vmm_pids(vm_id):
                os.kill(pid, signal.SIGKILL)
        elif verb in ("lose", "find"):
            (group,) = [
                path for path in self.server.traces.cgroups() if vm_id in path.name and (path / "cgroup.events").exists()
            ]
            # A group in between that passes controllers on may hold no process.
            top = next(path for path in group.parents if path.is_mount())
            self.moved = self.moved or self.server.vmm_pids(vm_id)
            for pid in self.moved:
                ((top if verb == "lose" else group) / "cgroup.procs").write_text(str(pid))

    def record(self) -> dict[str, Any]:
        """As the store has it, whether or not a server lives; empty when there is none."""
        with sqlite3.connect(self.server.state_dir / "state.db", timeout=60) as store:
            rows = store.execute("SELECT value FROM kv WHERE key LIKE 'vms/%'").fetchall()
        store.close()
        found = [json.loads(value) for (value,) in rows]
        return next((record for record in found if record["name"] == self.name), {})

    def reached(self, verb: str) -> bool:
        """Whether what nobody is told of has happened."""
        if verb not in ("break", "lose", "find", "expire"):
            return True
        record = self.record()
        up = record["phase"] in ("booting", "running") and record["incarnation"] == self.machines
        return {"lose": record["phase"] == "quarantined", "expire": record["phase"] == "stopped"}.get(verb, up)

    def do(self, verb: str, death: tuple[str, int] | None, again: tuple[str, int] | None = None) -> None:
        """`death`: at which point and which hit; `again`: the same for the server that comes up after it."""
        server = self.server
        if death:
            server.arm(*death)
        self.provoke(verb)
        words = self.words(verb)
        process = server.cli.start(*words) if words else None
        try:
            if death:
                over = lambda: (process is None or process.poll() is not None) and self.reached(verb)  # noqa: E731
                self.await_death(over, *death, again=again)
            errors = process.communicate(timeout=within(150))[1].decode() if process else ""
            if process and death and process.returncode and ": connecting" in errors:
                # It died of something else's doing before this client had reached it: nothing was asked for.
                process = server.cli.start(*words)
                errors = process.communicate(timeout=within(150))[1].decode()
        except BaseException:
            if process:
                process.kill()
                process.communicate()
            raise
        assert process is None or process.returncode == 0, f"{verb}: exit {process.returncode}: {errors}"
        self.check(verb)

    def await_death(self, over: Callable[[], bool], point: str, nth: int, again: tuple[str, int] | None) -> None:
        server, deadline, done, passed = self.server, time.monotonic() + DEATH, None, 0
        while not server.died():
            now = time.monotonic()
            # From the last point that was passed: on a busy machine what is done in the background takes longer.
            if (done is None and over()) or (done is not None and (passed != server.passed() or server.helped())):
                done, passed = now, server.passed()
            # Hello is said long after the command has ended, if at all. What did not come in time may take longer here.
            missed = sum(times for order, times in list(self.tally.missed.items()) if order.startswith(f"{point} "))
            patience = DEATH if "guest" in point else AFTERMATH * 2 ** min(missed, 4)
            if now > deadline or (done and now > done + patience):
                if server.disarm():
                    self.tally.missed[f"{point} {nth}"] += 1
                    return
                deadline = now + 5
            time.sleep(0.01)
        assert server.process is not None
        assert server.process.returncode == -signal.SIGKILL, f"it ended with {server.process.returncode}: {server.tail()}"
        assert server.hits()[-1] == point, f"{point} was armed, it died at {server.hits()[-1]}"
        self.tally.deaths[point] += 1
        server.process = None
        if again:
            self.start_doomed(*again)
        server.start()

    def start_doomed(self, point: str, nth: int) -> None:
        """The one that comes up dies too, if its way leads there."""
        server = self.server
        server.arm(point, nth)
        try:
            server.start()
            until(server.died, seconds=1)
        except AssertionError:
            # Either it answers and lives, or it died before it answered.
            pass
        if not server.disarm():
            until(server.died, what="its death")
            self.tally.deaths[point] += 1
            server.process = None
            return
        server.kill9()

    def check(self, verb: str) -> None:
        until(lambda: self.reached(verb), what=f"the end of {verb}")
        found = self.server.cli.ls()
        if verb == "delete":
            assert found == [], found
            return
        (vm,) = found
        vm_id, pids = vm["id"], self.server.vmm_pids(vm["id"])
        # One more machine than was asked for would be one that was lost on the way.
        assert vm["incarnation"] == self.machines, vm
        if verb in ("stop", "expire"):
            assert vm["phase"] == "stopped" and not pids, vm
            assert self.record()["exit"]["reason"] == {"stop": "stopped", "expire": "ttl_over"}[verb], vm
        elif verb == "lose":
            assert vm["phase"] == "quarantined" and not pids, vm
            assert all(Path(f"/proc/{pid}/exe").exists() for pid in self.moved), vm
        else:
            until(lambda: self.boots(vm_id), what=f"a machine after {verb}")
            assert self.server.cli.inspect(vm_id)["incarnation"] == self.machines, self.server.cli.inspect(vm_id)
            assert verb != "find" or self.server.vmm_pids(vm_id) == self.moved, self.moved

    def boots(self, vm_id: str) -> bool:
        vm = self.server.cli.inspect(vm_id)
        assert vm["phase"] not in ("failed", "quarantined"), vm
        return vm["phase"] in ("booting", "running") and bool(self.server.vmm_pids(vm_id))

    # Whole lives.

    def live(
        self,
        deaths: Callable[[str], tuple[str, int] | None],
        *,
        sized: bool = False,
        booted: bool = False,
        odd: bool = False,
        doubly: float = 0,
    ) -> None:
        """`booted`: guests come up, and what one wrote is there after the next start. Not in an odd life."""
        story = []
        self.restart = "on-failure" if odd else "never"
        left_out = "create" if sized else "create sized"
        try:
            for verb in ODD if odd else [verb for verb in VERBS if verb != left_out]:
                death = None if odd and verb == "create" and self.known.get("break") else deaths(verb)
                again = self.pick(verb) if death and self.random.random() < doubly else None
                story.append(f"{verb} {death} {again or ''}" if death else verb)
                self.do(verb, death, again)
                if verb != "delete":
                    self.visit(verb, booted and not odd)
            left = self.server.settle(self.before)
            assert not left, f"left behind: {dict(left)}"
        except AssertionError as wrong:
            self.tally.wrong.append(f"{self.server.state_dir.name}: {'; '.join(story)}\n    {wrong}")
            raise
        finally:
            self.tally.passed.update(self.server.hits())
            self.tally.lives += 1

    def visit(self, verb: str, booted: bool) -> None:
        if not booted or verb == "stop":
            return
        cli = self.server.cli
        cli("wait", self.name).ok()
        if verb == "start":
            assert cli.sh(self.name, "cat /root/token").ok().text.strip() == self.token
        else:
            self.token = f"{self.random.getrandbits(64):x}"
            cli.sh(self.name, f"echo {self.token} > /root/token; sync").ok()

    def learn(self, *, booted: bool) -> None:
        """What is passed on the way, from three lives without a death: the second takes a spare disk, the third is odd."""
        for sized, boots, odd in ((True, False, False), (False, booted, False), (False, False, True)):
            marks: list[tuple[str, int]] = []

            def mark(verb: str, marks: list[tuple[str, int]] = marks) -> None:
                self.rest()
                marks.append((verb, len(self.server.hits())))

            self.live(mark, sized=sized, booted=boots, odd=odd)
            hits = self.server.hits()
            ends = [at for _, at in marks[1:]] + [len(hits)]
            for (verb, begin), end in zip(marks, ends, strict=True):
                # What every life has is learnt from one in which the guest had time to boot.
                if not odd or verb not in self.known:
                    self.known[verb] = [hit for hit in hits[begin:end] if not odd or hit not in UNKNOWN]

    def rest(self) -> None:
        """Until nothing more is passed."""
        before = -1
        while before != self.server.passed() or self.server.helped():
            before = self.server.passed()
            time.sleep(AFTERMATH)

    def pick(self, verb: str) -> tuple[str, int]:
        """Any hit of the verb's, each as likely as the other."""
        hits = self.known[verb]
        at = self.random.randrange(len(hits))
        return hits[at], hits[: at + 1].count(hits[at])


def together(workers: list[Callable[[], None]]) -> None:
    """Each in a thread of its own, to its end."""
    threads = [threading.Thread(target=worker) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
