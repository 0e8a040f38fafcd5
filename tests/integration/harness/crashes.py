"""A server that dies at named points of what it does (crates/failpoint), and VMs' lives in which it does so again and again."""

import random
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from .cli import binaries
from .server import VMM, Server
from .tools import run, until, within
from .world import World

#: From an order to a server's death: a guest's boot on a busy machine is among them.
DEATH = within(60)
#: Points that are passed in the background, after the command that led there has ended: a spare disk, limits of version 1.
AFTERMATH = within(1)
#: What each life consists of. `create sized` is for a disk of a size that no disk had before.
VERBS = ("create sized", "create", "stop", "start", "delete")


def program() -> Path:
    path = binaries() / "failpoints" / "clawpot-server"
    assert path.exists(), f"no {path}: scripts/test and `make crash-cycles` build it (scripts/lib/build.sh)"
    return path


def all_points() -> list[str]:
    return run(program(), "failpoints").split()


class Mortal(Server):
    """A server built with failpoints."""

    def __init__(self, world: World, state_dir: Path, *options: object) -> None:
        super().__init__(world, state_dir, "--vmm", VMM, "--edge", binaries() / "clawpot-edge", *options)
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

    def died(self) -> bool:
        return self.process is not None and self.process.poll() is not None


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
        self.token = ""
        #: What each verb passes when nothing goes wrong: points in order.
        self.known: dict[str, list[str]] = {}
        self.before = server.start().steady()

    # One verb.

    def words(self, verb: str) -> list[str]:
        if verb == "create sized":
            self.size += 1
        if verb.startswith("create"):
            return ["create", "--name", self.name, "--disk", f"{self.size}M", "debian"]
        return {"stop": ["stop", self.name], "start": ["start", "--no-wait", self.name], "delete": ["rm", self.name]}[verb]

    def do(self, verb: str, death: tuple[str, int] | None, again: tuple[str, int] | None = None) -> None:
        """`death`: at which point and which hit; `again`: the same for the server that comes up after it."""
        server = self.server
        if death:
            server.arm(*death)
        process = server.cli.start(*self.words(verb))
        try:
            if death:
                self.await_death(process, *death, again=again)
            errors = process.communicate(timeout=within(90))[1].decode()
        except BaseException:
            process.kill()
            process.communicate()
            raise
        assert process.returncode == 0, f"{verb}: exit {process.returncode}: {errors}"
        self.check(verb)

    def await_death(self, process: subprocess.Popen[bytes], point: str, nth: int, again: tuple[str, int] | None) -> None:
        server, deadline, done, passed = self.server, time.monotonic() + DEATH, None, 0
        while not server.died():
            now = time.monotonic()
            # From the last point that was passed: on a busy machine what is done in the background takes longer.
            if process.poll() is not None and (done is None or passed != server.passed()):
                done, passed = now, server.passed()
            # Hello is said long after the command has ended, if at all.
            patience = DEATH if "guest" in point else AFTERMATH
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
        found = self.server.cli.ls()
        if verb == "delete":
            assert found == [], found
            return
        (vm,) = found
        # A second incarnation of what was asked for once would be a machine that was lost on the way.
        expected = 2 if verb == "start" else 1
        if verb == "stop":
            assert (vm["phase"], vm["incarnation"]) == ("stopped", expected), vm
            assert not self.server.vmm_pids(vm["id"])
            return
        vm_id = vm["id"]
        until(lambda: self.boots(vm_id), seconds=30, what=f"a machine after {verb}")
        assert self.server.cli.inspect(vm_id)["incarnation"] == expected, self.server.cli.inspect(vm_id)

    def boots(self, vm_id: str) -> bool:
        vm = self.server.cli.inspect(vm_id)
        assert vm["phase"] not in ("failed", "quarantined"), vm
        return vm["phase"] in ("booting", "running") and bool(self.server.vmm_pids(vm_id))

    # Whole lives.

    def live(self, deaths: Callable[[str], tuple[str, int] | None], *, sized: bool, booted: bool, doubly: float = 0) -> None:
        """`booted`: guests come up, and what one wrote is there after the next start."""
        story = []
        try:
            for verb in VERBS:
                if verb == ("create" if sized else "create sized"):
                    continue
                death = deaths(verb)
                again = self.pick(verb) if death and self.random.random() < doubly else None
                story.append(f"{verb} {death} {again or ''}" if death else verb)
                self.do(verb, death, again)
                if verb != "delete":
                    self.visit(verb, booted)
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
        """What is passed on the way, from two lives without a death: the second takes a spare disk."""
        for sized, boots in ((True, False), (False, booted)):
            marks: list[tuple[str, int]] = []

            def mark(verb: str, marks: list[tuple[str, int]] = marks) -> None:
                self.rest()
                marks.append((verb, len(self.server.hits())))

            self.live(mark, sized=sized, booted=boots)
            hits = self.server.hits()
            ends = [at for _, at in marks[1:]] + [len(hits)]
            for (verb, begin), end in zip(marks, ends, strict=True):
                self.known[verb] = hits[begin:end]

    def rest(self) -> None:
        """Until nothing more is passed."""
        before = -1
        while before != self.server.passed():
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
