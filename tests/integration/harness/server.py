"""One clawpot-server in the world's host."""

import contextlib
import errno
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import time
from collections import Counter
from pathlib import Path

from .cli import Cli, binaries
from .leaks import Traces
from .tools import REPO, SLOWNESS, children_of_mount, run, until, within
from .world import World

ASSETS = Path(os.environ.get("CLAWPOT_IMAGE_DIR", REPO / "assets"))
#: What VMs run on where a test names a VMM; where it does not, the server has the choice and must come to the same.
VMM = os.environ.get("CLAWPOT_TEST_VMM", "qemu")
BLOCKS = Path("/run/clawpot/blocks")
#: A Unix socket's path has at most 108 bytes.
LONGEST_SOCKET = 100
#: What `clawpot-server` keeps ready when it is told nothing.
WARM_SLOTS = 4


class Server:
    """Its own state directory, which is on the same filesystem as the images."""

    def __init__(self, world: World, state_dir: Path, *options: object, image_dir: Path = ASSETS) -> None:
        self.world = world
        self.state_dir = state_dir
        self.options = list(options)
        self.image_dir = image_dir
        # The directory itself is the server's to make.
        state_dir.parent.mkdir(parents=True, exist_ok=True)
        self.socket = state_dir / "api.sock"
        self.metrics_socket = state_dir / "metrics.sock"
        if len(str(self.metrics_socket)) > LONGEST_SOCKET:
            raise RuntimeError(f"{self.metrics_socket}: too long for a socket; set CLAWPOT_TEST_DIR to a shorter path")
        self.log = state_dir.with_suffix(".log")
        self.process: subprocess.Popen[bytes] | None = None
        self.cli = Cli(self.socket)
        self.traces = Traces(state_dir, world.host)

    def command(self, *more: object) -> list[str]:
        words = [binaries() / "clawpot-server", "--state-dir", self.state_dir, "--image-dir", self.image_dir]
        words += ["--socket", self.socket, "--metrics-socket", self.metrics_socket, *self.options, *more]
        if SLOWNESS > 1:
            # The server's own limits: a verdict of its probe must not be one on how busy the host is.
            for flag, usual in (("--probe-timeout-secs", 8), ("--boot-timeout-secs", 120)):
                words += [] if flag in words else [flag, round(within(usual))]
        if "--low-disk-percent" not in self.options:
            # How full the disk of the machine is that tests run on is no matter of theirs.
            words += ["--low-disk-percent", 1]
        return [str(word) for word in words]

    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("CLAWPOT_")}
        return {**kept, "NO_COLOR": "1", "RUST_BACKTRACE": "1", "CLAWPOT_LOG": os.environ.get("CLAWPOT_LOG", "info")}

    def start(self, *more: object, before: tuple[str, ...] = ()) -> "Server":
        """Returns when it answers. `before`: words before the command, such as `setpriv …`."""
        assert self.process is None, "already started"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*self.world.enter(), *before, *self.command(*more)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.environment(),
            )
        until(self._answers, seconds=60, what="the server's answer")
        return self

    def _answers(self) -> bool:
        assert self.process is not None
        if self.process.poll() is not None:
            raise AssertionError(f"the server ended with {self.process.returncode}:\n{self.tail()}")
        return self.socket.exists() and self.cli("host").code == 0

    def refuses(self, *more: object, before: tuple[str, ...] = (), seconds: float = 60) -> subprocess.CompletedProcess[str]:
        """A start that must fail by itself."""
        words = [*self.world.enter(), *before, *self.command(*more)]
        quiet = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "check": False}
        return subprocess.run(words, timeout=within(seconds), env=self.environment(), **quiet)

    @property
    def pid(self) -> int:
        assert self.process is not None, "not started"
        return self.process.pid

    def kill9(self) -> None:
        self._end(signal.SIGKILL, 60)

    def stop(self, seconds: float = 60) -> int:
        """Asks it to go; VMs stay. Its exit code."""
        return self._end(signal.SIGTERM, seconds)

    def _end(self, number: signal.Signals, seconds: float) -> int:
        assert self.process is not None, "not started"
        self.process.send_signal(number)
        try:
            code = self.process.wait(within(seconds))
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            self.process = None
            raise AssertionError(f"the server did not end within {seconds:g} s of {number.name}:\n{self.tail()}") from None
        self.process = None
        return code

    def edit(self, statement: str, *values: object) -> None:
        """One row of the store, as an operator with sqlite3 would, while no server runs."""
        with sqlite3.connect(self.state_dir / "state.db") as store:
            assert store.execute(statement, values).rowcount == 1
        store.close()

    def tail(self, lines: int = 40) -> str:
        with contextlib.suppress(FileNotFoundError):
            return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])
        return ""

    def steady(self) -> Counter[str]:
        """What there is, once it changes no more: slots are made ready in the background."""
        seen: list[Counter[str]] = [self.traces.now()]

        def same() -> bool:
            seen.append(self.traces.now())
            talking = [vm for vm in self.cli.ls() if vm["phase"] == "running"]
            # Counted in what was seen: one that is made a moment later would be taken for left behind.
            slots = sum(count for thing, count in seen[-1].items() if thing.startswith("netns "))
            return seen[-1] == seen[-2] and slots == len(talking) + self.warm_slots

        until(same, seconds=60, every=0.5, what=f"rest with {self.warm_slots} slots ready")
        return seen[-1]

    @property
    def warm_slots(self) -> int:
        """How many slots the server keeps ready beyond those of its VMs."""
        words = [str(word) for word in self.options]
        return int(words[words.index("--warm-slots") + 1]) if "--warm-slots" in words else WARM_SLOTS

    def settle(self, before: Counter[str], seconds: float = 60) -> Counter[str]:
        """What there is beyond `before`, once that is nothing or time is up: the end of a netns takes the kernel a moment."""
        deadline = time.monotonic() + within(seconds)
        while (left := self.traces.now() - before) and time.monotonic() < deadline:
            time.sleep(0.1)
        return left

    def vmm_pids(self, vm_id: str) -> list[int]:
        """Processes in the VM's cgroup. KVM may have put a thread of the kernel's there, which has no command line."""
        groups = [path for path in self.traces.cgroups() if vm_id in str(path) and (path / "cgroup.events").exists()]
        return [pid for path in groups for pid in _members(path) if _command_line(pid)]

    def close(self) -> list[str]:
        """Deletes every VM, ends the server, and sweeps. Returns what had to be swept away by force."""
        with contextlib.suppress(Exception):
            self._empty()
        if self.process is not None:
            with contextlib.suppress(AssertionError):
                self.stop()
        return self.sweep()

    def _empty(self) -> None:
        if self.process is None:
            if not (self.state_dir / "state.db").exists():
                return
            self.start()
        for vm in self.cli.ls():
            self.cli("rm", "--force", vm["id"])

    def sweep(self) -> list[str]:
        """Removes all that is left of the server, whatever it is, and tells what VMs should not have left."""
        traces = self.traces
        left = [f"process {pid} {name}" for pid, name in traces.processes() if name != "clawpot-edge"]
        for pid, _ in traces.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        until(lambda: not traces.processes(), what="the end of the server's processes")
        if traces.instance:
            left += self._sweep_names(traces)
        for point in sorted(children_of_mount(self.state_dir), reverse=True):
            left.append(f"mount {point}")
            run("umount", "-l", point, check=False)
        self._release_block()
        shutil.rmtree(self.state_dir, ignore_errors=True)
        return left

    def _sweep_names(self, traces: Traces) -> list[str]:
        left = []
        for name in traces.netns_names():
            run("ip", "netns", "del", name, check=False)
            # What was mounted in a namespace of mounts that is gone leaves its name.
            Path("/run/netns", name).unlink(missing_ok=True)
        # A namespace of the world that is gone has taken its links with it.
        with contextlib.suppress(RuntimeError):
            for name in traces.links():
                run("ip", "-n", self.world.host, "link", "del", name, check=False)
        for path in sorted(traces.cgroups(), key=lambda path: -len(path.parts)):
            if re.search(r"/[a-z0-9]{16}-\d+$", str(path)):
                left.append(f"cgroup {path}")
        for path in sorted({*traces.cgroups(), *(path.parent for path in traces.cgroups())}, key=lambda p: -len(p.parts)):
            with contextlib.suppress(OSError):
                path.rmdir()
        return left

    def _release_block(self) -> None:
        """The claim of a server that is never started again."""
        if not BLOCKS.exists():
            return
        for claim in BLOCKS.iterdir():
            with contextlib.suppress(OSError, UnicodeDecodeError):
                if claim.is_file() and str(self.state_dir) in claim.read_text(encoding="utf-8"):
                    claim.unlink()


def _members(group: Path) -> list[int]:
    try:
        return [int(line) for line in (group / "cgroup.procs").read_text().split()]
    except OSError as error:
        # The server takes the group away while it is looked at: before it was opened, or when it was open.
        if error.errno not in (errno.ENOENT, errno.ENODEV):
            raise
        return []


def _command_line(pid: int) -> bytes:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path("/proc", str(pid), "cmdline").read_bytes()
    return b""
