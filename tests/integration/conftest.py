"""What tests share: one world, one server and one VM for all that does them no harm."""

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from harness import sweep
from harness.server import ASSETS, VMM, Server
from harness.tools import within
from harness.world import World

HERE = Path(__file__).resolve().parent
#: What is kept of a test that failed.
REPORTS = HERE / "report"
#: Every server that lives, for the reports of failures.
LIVING: list[Server] = []


def pytest_sessionstart(session: pytest.Session) -> None:
    del session
    # A time limit from outside ends the run in order, and nothing is left.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sweep.sweep()
    if os.geteuid() != 0:
        pytest.exit("these tests make network namespaces and VMs: run them as root (sudo -E uv run pytest)", 2)
    needed = [tool for tool in ("ip", "nft", "nsenter", "ss", "setpriv", "unshare") if not shutil.which(tool)]
    if needed:
        pytest.exit(f"missing: {', '.join(needed)}; install iproute2 nftables util-linux", 2)
    if not (ASSETS / "boot.json").exists() or not (ASSETS / "manifests/debian.json").exists():
        pytest.exit(f"no kernel or image in {ASSETS}: scripts/install-vm-assets.sh and scripts/setup-rootfs.sh", 2)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    del call
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined]
    if not report.failed:
        return
    kept = REPORTS / item.nodeid.replace("/", "_").replace("::", ".").translate({ord(c): "_" for c in " []'\""})
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir(parents=True)
    for server in LIVING:
        if server.log.exists():
            shutil.copy(server.log, kept / server.log.name)
        if server.process and server.process.poll() is None:
            for name, words in {"ls": ("ls", "-o", "json"), "events": ("events", "-o", "json")}.items():
                # A server that hangs is no reason to end the run with an error of this function's.
                with contextlib.suppress(subprocess.TimeoutExpired):
                    (kept / f"{server.state_dir.name}-{name}.json").write_bytes(server.cli(*words, timeout=20).stdout)
        for console in server.state_dir.glob("logs/*/*"):
            # It goes when its VM is gone, which may be now.
            with contextlib.suppress(FileNotFoundError):
                shutil.copy(console, kept / f"{server.state_dir.name}-{console.parent.name}-{console.name}")
        report.sections.append((f"end of {server.log.name}", server.tail(25)))
    report.sections.append(("kept", str(kept)))


@pytest.fixture(scope="session", autouse=True)
def _collected(request: pytest.FixtureRequest, record_testsuite_property: Callable[[str, object], None]) -> None:
    """In the JUnit report: whoever reads it can tell a run that was cut short (scripts/lib/firecracker_lane.py)."""
    record_testsuite_property("collected", len(request.session.items))


@pytest.fixture(scope="session")
def workdir() -> Iterator[Path]:
    """On the filesystem of the images."""
    root = Path(os.environ.get("CLAWPOT_TEST_DIR", HERE / ".work"))
    path = root / str(os.getpid())
    path.mkdir(parents=True)
    if path.stat().st_dev != ASSETS.stat().st_dev:
        path.rmdir()
        pytest.exit(f"{root} and {ASSETS} are on different filesystems: set CLAWPOT_TEST_DIR", 2)
    yield path
    shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):
        # Another run may be in it.
        root.rmdir()


@pytest.fixture(scope="session")
def world() -> Iterator[World]:
    made = World()
    made.start()
    yield made
    made.close()


@pytest.fixture(scope="session")
def _servers() -> Iterator[list[str]]:
    """Names of what had to be swept away, over all servers."""
    swept: list[str] = []
    yield swept
    assert not swept, "servers left behind:\n" + "\n".join(swept)


def _made(world: World, workdir: Path, swept: list[str]) -> Iterator[Callable[..., Server]]:
    mine: list[Server] = []

    def make(name: str, *options: object, image_dir: Path = ASSETS) -> Server:
        server = Server(world, workdir / name, *options, image_dir=image_dir)
        mine.append(server)
        LIVING.append(server)
        return server

    yield make
    for server in mine:
        swept += [f"{server.state_dir.name}: {thing}" for thing in server.close()]
        LIVING.remove(server)


@pytest.fixture(scope="session")
def session_server(world: World, workdir: Path, _servers: list[str]) -> Iterator[Callable[..., Server]]:
    yield from _made(world, workdir, _servers)


@pytest.fixture
def make_server(world: World, workdir: Path, _servers: list[str]) -> Iterator[Callable[..., Server]]:
    """`make_server("name", "--flag", …)`: a server of the test's own, not yet started, gone after it."""
    yield from _made(world, workdir, _servers)


@pytest.fixture(scope="session")
def _main(session_server: Callable[..., Server]) -> Server:
    # A guest's patience is the server's to have: an orderly end in an emulator on a busy host is one all the same.
    server = session_server("main", "--stop-grace-ms", round(within(60) * 1000)).start()
    found = server.cli("host", "-o", "json").ok().json
    # Passing on another VMM than the one that was asked for would be no pass.
    assert "CLAWPOT_TEST_VMM" not in os.environ or found["vmm"] == VMM, found["vmm_reason"]
    return server


@pytest.fixture
def server(_main: Server) -> Server:
    """The server that all tests share; running, whatever the test before did."""
    if _main.process is None or _main.process.poll() is not None:
        _main.process = None
        _main.start()
    return _main


def _running(server: Server, name: str) -> str:
    """Name of a VM that runs."""
    found = [vm for vm in server.cli.ls() if vm["name"] == name]
    if found and found[0]["phase"] != "running":
        server.cli("rm", name).ok()
        found = []
    if not found:
        server.cli("create", "--wait", "--name", name, "debian").ok()
    return name


@pytest.fixture
def vm(server: Server) -> str:
    """A VM that all tests share: leave it running."""
    return _running(server, "web")


@pytest.fixture
def sibling(server: Server) -> str:
    """Another one on the same server, for tests of two, and of what stops or breaks a VM."""
    return _running(server, "sibling")
