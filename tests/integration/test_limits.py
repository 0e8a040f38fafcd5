"""What a client sends or holds beyond its limits: it is told which limit, others are served, and the server stays small."""

import contextlib
import grp
import resource
import select
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from harness.api import Api
from harness.cli import binaries
from harness.h2 import REFUSED_STREAM, RST_STREAM, WINDOW_UPDATE, Rude
from harness.server import Server
from harness.tools import run, until

#: clawpot-server/src/limits.rs
USER_CONNECTIONS = 512
USER_CALLS = 2048
STREAMS = 256
#: Seconds.
FIRST_REQUEST = 10
EXEC = "/clawpot.v1.VmService/Exec"
#: More than any of these tests may leave in the server, and far less than what they send and ask for.
GROWTH_MIB = 96


def rss_mib(pid: int) -> int:
    return int(Path(f"/proc/{pid}/status").read_text().split("VmRSS:")[1].split()[0]) >> 10


@contextlib.contextmanager
def unmoved(server: Server) -> Iterator[None]:
    """It lives, serves others, and has not grown."""
    pid, before = server.pid, rss_mib(server.pid)
    yield
    grown = rss_mib(pid) - before
    print(f"{grown} MiB more")
    assert grown < GROWTH_MIB
    server.cli.ls()
    assert server.process is not None and server.process.poll() is None and server.pid == pid, server.tail()


@pytest.fixture(autouse=True)
def files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 8192)), hard))


def refused(*said: str) -> Any:
    """A call that is refused for its size, with these words."""

    @contextlib.contextmanager
    def check() -> Iterator[None]:
        with pytest.raises(grpc.RpcError) as error:
            yield
        told = error.value.code(), error.value.details()
        assert told[0] == grpc.StatusCode.RESOURCE_EXHAUSTED, told
        assert all(word in told[1] for word in said), told

    return check()


@pytest.mark.parametrize(
    ("service", "method", "fields", "most"),
    [
        ("VmService", "CreateVm", {"request_id": "a" * (300 << 10)}, 256 << 10),
        ("VmService", "GetVm", {"vm": "a" * (80 << 10)}, 64 << 10),
        ("VmService", "ListVms", {"labels": {str(n): "a" * 1000 for n in range(80)}}, 64 << 10),
        ("VmService", "DeleteVm", {"vm": "a" * (9 << 20)}, 64 << 10),
        ("EventService", "ListEvents", {"vm": "a" * (80 << 10)}, 64 << 10),
        ("ImageService", "TagImage", {"image": "a", "name": "a" * (5 << 20)}, 64 << 10),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_message(server: Server, service: str, method: str, fields: dict[str, object], most: int) -> None:
    with unmoved(server), Api(server.socket) as api, refused(f"{method}: a message of", f"at most {most}"):
        api.call(service, method, **fields)


def test_many_messages_that_are_too_large(server: Server) -> None:
    with unmoved(server), Api(server.socket) as api:
        for _ in range(40):
            with refused("GetVm: a message of"):
                api.call("VmService", "GetVm", vm="a" * (8 << 20))


def _start(argv: list[bytes]) -> dict[str, object]:
    return {"start": {"vm": "web", "exec_id": "a" * 16, "argv": argv, "stdin": True}}


def test_messages_of_an_exec(server: Server, vm: str) -> None:
    assert vm == "web"
    piece = {"stdin": {"data": b"x" * (140 << 10)}}
    with unmoved(server), Api(server.socket) as api:
        with refused("Exec: a message of", "at most 8388608"):
            list(api.stream("VmService", "Exec", iter([_start([b"true", b"x" * (9 << 20)])])))
        with refused("Exec: a message of", "at most 135168"):
            list(api.stream("VmService", "Exec", iter([_start([b"cat"]), piece])))
    assert server.cli.sh(vm, "echo served").ok().text == "served\n"


def test_a_piece_of_an_archive(server: Server) -> None:
    frames = [{"start": {"name": "toolarge"}}, {"data": b"x" * (600 << 10)}]
    with unmoved(server), Api(server.socket) as api, refused("ImportImage: a message of", "at most 524288"):
        list(api.stream("ImageService", "ImportImage", iter(frames)))
    assert "toolarge" not in [image["name"] for image in server.cli("image", "ls", "-o", "json").ok().json]


def test_headers(server: Server) -> None:
    with unmoved(server), Api(server.socket) as api:
        with refused("GetHost: headers of", "at most 16384"):
            api.call("HostService", "GetHost", metadata=[("x-long", "a" * (20 << 10))])
        # HTTP/2's own limit, at which nothing is read any more.
        with pytest.raises(grpc.RpcError):
            api.call("HostService", "GetHost", metadata=[("x-longer", "a" * (100 << 10))])
        with Rude(server.socket) as rude:
            rude.call(1, EXEC, {f"x-{n}": "a" * 1000 for n in range(16)})
            assert rude.next() is not None


def test_streams_of_one_connection(server: Server) -> None:
    with unmoved(server), Rude(server.socket) as rude:
        for number in range(STREAMS + 8):
            rude.call(2 * number + 1, EXEC)
        for number in range(STREAMS, STREAMS + 8):
            assert rude.until(RST_STREAM, 2 * number + 1) == struct.pack(">I", REFUSED_STREAM)
        server.cli.ls()


def test_large_messages_at_once(server: Server) -> None:
    """Of 8 MiB each, of which only the beginning comes: 128 MiB for one user."""
    with unmoved(server), Rude(server.socket) as rude:
        # The server's windows hold once its settings have come.
        rude.until(WINDOW_UPDATE, 0)
        for number in range(40):
            rude.call(2 * number + 1, EXEC)
            rude.data(2 * number + 1, struct.pack(">BI", 0, 8 << 20) + b"x" * (200 << 10))
        with Api(server.socket) as api:

            def full() -> bool:
                try:
                    list(api.stream("VmService", "Exec", iter([_start([b"true", b"x" * (1 << 20)])])))
                except grpc.RpcError as error:
                    return "bytes of large messages: uid=0 has" in error.details()
                return False

            until(full, what="a large message to be one too many")
            # Small ones go on.
            api.call("VmService", "ListVms")


@pytest.fixture
def doors(make_server: Callable[..., Server]) -> Iterator[Server]:
    """Where others than root get in: members of the group of nobody."""
    with tempfile.TemporaryDirectory(dir="/tmp") as place:
        group = grp.getgrgid(65534).gr_name
        server = make_server("limits", "--warm-slots", "0", "--group", group)
        server.socket = server.cli.socket = Path(place, "api.sock")
        Path(place).chmod(0o755)
        yield server.start()


def _as(uid: int, *words: object) -> list[str]:
    return [*map(str, ["setpriv", "--reuid", uid, "--regid", 65534, "--clear-groups", *words])]


#: Becomes another user, opens connections and sends nothing. It does so itself: Python may lie where only root can look.
SILENT = """
import os, resource, socket, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
os.setgroups([])
os.setgid(65534)
os.setuid(int(sys.argv[2]))
held = []
for _ in range(int(sys.argv[3])):
    held.append(socket.socket(socket.AF_UNIX))
    held[-1].connect(sys.argv[1])
print("held", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def silent(server: Server, uid: int, count: int) -> Iterator[None]:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    words = [sys.executable, "-c", SILENT, str(server.socket), str(uid), str(count)]
    with subprocess.Popen(words, **pipes) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == b"held\n"
            yield
        finally:
            process.kill()


def test_connections_that_say_nothing_keep_nobody_out_and_end(doors: Server) -> None:
    clawpot = shutil.copy(binaries() / "clawpot", doors.socket.parent)
    socket = ["--socket", doors.socket]

    def ls(uid: int) -> subprocess.CompletedProcess[str]:
        words = _as(uid, clawpot, "ls", *socket)
        return subprocess.run(words, capture_output=True, text=True, check=False, timeout=60, cwd="/")

    def looked_in_time() -> bool:
        """Before they were put out, or it shows nothing."""
        began = time.monotonic()
        with unmoved(doors), silent(doors, 65534, USER_CONNECTIONS + 20):
            assert doors.cli.ls() == []
            assert ls(65533).returncode == 0, "another user"
            mine = ls(65534)
            if time.monotonic() - began > FIRST_REQUEST:
                return False
            assert mine.returncode == 1 and "at most 512 for one user" in mine.stderr, mine
            # They are still there, and have been put out.
            until(lambda: ls(65534).returncode == 0, every=0.5, what="room for the same user")
        return True

    assert ls(65534).returncode == 0
    until(looked_in_time, seconds=120, what="a look before they are put out")


def test_others_together_leave_root_its_connections(doors: Server) -> None:
    with contextlib.ExitStack() as held:
        for uid in (65534, 65533, 65532):
            held.enter_context(silent(doors, uid, USER_CONNECTIONS))
        with unmoved(doors):
            assert doors.cli.ls() == []


def test_calls_under_way(doors: Server) -> None:
    def full() -> bool:
        done = doors.cli("ls")
        return done.code == 1 and "calls under way: uid=0 has 2048: at most 2048 for one user" in done.stderr

    clawpot = shutil.copy(binaries() / "clawpot", doors.socket.parent)
    with unmoved(doors):
        with contextlib.ExitStack() as held:
            for _ in range(USER_CALLS // STREAMS + 1):
                rude = held.enter_context(Rude(doors.socket))
                for number in range(STREAMS):
                    rude.call(2 * number + 1, EXEC)
            until(full, what="a call to be one too many", every=0.2)
            run(*_as(65534, clawpot, "ls", "--socket", doors.socket))
        until(lambda: doors.cli("ls").code == 0, what="room, once they have gone")


def test_connections_to_metrics(server: Server) -> None:
    """16 for one user, and closed when there are more."""

    def ended(rudes: list[Rude]) -> list[Rude]:
        # Nothing is said there: who can be read has been closed.
        return [rude for rude in rudes if select.select([rude.socket], [], [], 0)[0]]

    with unmoved(server), contextlib.ExitStack() as held:
        rudes = [held.enter_context(Rude(server.metrics_socket, preface=False)) for _ in range(20)]
        until(lambda: len(ended(rudes)) >= 4, what="the end of those that are too many")
        assert len(ended(rudes)) == 4
