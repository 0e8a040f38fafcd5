"""A work tree of the tests' own, so that a VM of the tree they are run in is left alone."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vmlab import golden, host, machine, qemu, recipe
from vmlab.errors import Lacking

#: What devvm and ci/ are made of, and what a build reads.
PARTS = ("utils", "scripts", "ci", "tests/integration/harness")
#: Golden images stay here between runs; everything else is gone after one.
VM_DIR = Path(os.environ.get("CLAWPOT_VM_DIR", host.REPO / "target" / "vms"))
MEMORY_MIB = 1024
#: In the tests' own tree: pid and start time of the pytest that made it.
RUN = ".run"
Run = Callable[..., subprocess.CompletedProcess[str]]


def lacking() -> str:
    """Why no VM can be tried here; nothing when it can."""
    if os.geteuid() != 0:
        return "building a golden image needs root"
    wanted = recipe.PROFILES["small"]
    try:
        host.need_tools([*golden.TOOLS, "ssh", "ssh-keygen", "rsync"])
        host.need_disk(VM_DIR, wanted.room_mib + 1024, "the test VM and its golden image")
        host.need_memory(MEMORY_MIB + machine.OVERHEAD_MIB, "the test VM")
    except Lacking as error:
        return str(error).replace("\n", ";")
    return ""


#: What scripts/test takes for SKIPPED: as automake's and Meson's tests have it.
SKIPPED = 77
WITHOUT_VMS = pytest.StashKey[str]()


@pytest.fixture(scope="session")
def vm_dir(pytestconfig: pytest.Config) -> Path:
    why = lacking()
    if why:
        pytestconfig.stash[WITHOUT_VMS] = why
        pytest.skip(why)
    # The golden image may stay from an earlier run; VMs may not.
    clear_leftovers(VM_DIR)
    return VM_DIR


def clear_leftovers(state: Path) -> None:
    """VMs of runs that ended without their teardown: a time limit ends pytest at once. No one else's is touched."""
    for each in machine.all_machines(state):
        if each.record.kind == "dev" and is_dead(Path(each.record.belongs_to)):
            each.destroy()
    for stale in state.glob("test-*"):
        pid = stale.name.removeprefix("test-")
        if pid.isdigit() and qemu.start_time(int(pid)) is None:
            for build in stale.glob("golden/.build-*"):
                if booted := qemu.from_pid_file(build / "boot", golden.guest_name(build)):
                    booted.kill()
            shutil.rmtree(stale)
    sweep = [sys.executable, str(host.REPO / "ci/inner-vm"), "sweep"]
    subprocess.run(sweep, env={**os.environ, "CLAWPOT_VM_DIR": str(state)}, check=True, timeout=300)


def is_dead(tree: Path) -> bool:
    """Whether it is a tree of these tests whose run is over."""
    try:
        pid, started = (tree / RUN).read_text().split()
    except FileNotFoundError:
        # pytest removes the trees of runs before the last three.
        return not tree.exists() and re.search(r"/pytest-of-[^/]+/pytest-\d+/tree\d+$", str(tree)) is not None
    return qemu.start_time(int(pid)) != int(started)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """A run in which no VM was tried is no pass of these tests, whatever else of them passed."""
    if exitstatus == 0 and WITHOUT_VMS in session.config.stash:
        session.exitstatus = SKIPPED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if why := config.stash.get(WITHOUT_VMS, ""):
        terminalreporter.write_line(f"dev VM and inner VMs: SKIPPED: {why}")


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("tree")
    for part in PARTS:
        if (host.REPO / part).exists():
            shutil.copytree(host.REPO / part, made / part, ignore=shutil.ignore_patterns("__pycache__"))
    (made / RUN).write_text("{} {}".format(*machine.me()))
    return made


@pytest.fixture(scope="session")
def devvm(tree: Path, vm_dir: Path) -> Iterator[Run]:
    """`devvm("status")`: the program of the tests' own tree. Whatever it made is gone at the end."""

    def run(*words: str, input: str = "", check: bool = False, seconds: float = 900) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(tree / "utils/devvm"), *words]
        env = {**os.environ, "CLAWPOT_VM_DIR": str(vm_dir)}
        done = subprocess.run(command, input=input, capture_output=True, text=True, env=env, timeout=seconds, check=False)
        if check:
            assert done.returncode == 0, f"devvm {' '.join(words)}: status {done.returncode}\n{done.stdout}{done.stderr}"
        return done

    yield run
    run("destroy")
