"""What CI runs, run here: inner VMs, their orphans, the package, the one command, and the pipeline's own files."""

import contextlib
import io
import json
import os
import re
import socket
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import MEMORY_MIB, Run
from vmlab import host

REPO = host.REPO
HERE = Path(__file__).parent


def shell(*words: object, seconds: float = 1400, **env: object) -> subprocess.CompletedProcess[str]:
    command = [str(word) for word in words]
    full = {**os.environ, **{name: str(value) for name, value in env.items()}}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=seconds, env=full, stdin=subprocess.DEVNULL, check=False, cwd=HERE
    )


@pytest.fixture
def inner(vm_dir: Path) -> Iterator[Run]:
    """`inner("list")`: ci/inner-vm. What the test leaves is swept away, and the test fails for it."""

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return shell(REPO / "ci/inner-vm", *words, CLAWPOT_VM_DIR=vm_dir)

    before = run("list").stdout
    yield run
    after = run("list").stdout
    for line in set(after.splitlines()) - set(before.splitlines()):
        run("destroy", line.split()[0])
    assert after == before, "inner VMs left behind"


def test_an_inner_vm_is_offline_and_gone_with_its_run(inner: Run, tmp_path: Path) -> None:
    (tmp_path / "greeting").write_text("from outside\n")
    with tarfile.open(tmp_path / "payload.tar", "w") as tar:
        tar.add(tmp_path / "greeting", "greeting")
    run = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    words = [
        "--payload",
        str(tmp_path / "payload.tar"),
        "--owner",
        str(run.pid),
        "--memory",
        str(MEMORY_MIB),
        "--label",
        "a test",
    ]
    launched = inner("launch", *words)
    try:
        assert launched.returncode == 0, launched.stderr
        id = launched.stdout.strip()
        assert inner("run", id, "cat /work/clawpot/greeting").stdout == "from outside\n"
        assert inner("run", id, "exit 5").returncode == 5
        with listener() as port:
            greeted = "timeout 20 bash -c 'read -r said </dev/tcp/{}/{}; echo $said'"
            # The same command has an answer where one can be had: of the VM's own sshd.
            assert "SSH" in inner("run", id, greeted.format("127.0.0.1", 22)).stdout
            # 10.0.2.2 is this machine as the VM sees it; a dev VM reaches it.
            assert inner("run", id, greeted.format("10.0.2.2", port)).stdout.strip() == ""
        assert inner("sweep").stderr == "0 orphaned inner VMs\n"
        assert inner("collect", id, str(tmp_path / "kept")).returncode == 0
        assert "clawpot-vm: ready" in (tmp_path / "kept/console.log").read_text(errors="replace")
        assert (tmp_path / "kept/inner/journal.log").stat().st_size > 0
        assert inner("list").stdout.split(maxsplit=2)[2].strip() == "a test"
    finally:
        run.kill()
        run.wait()
    swept = inner("sweep").stderr
    assert f"{id} of a test is gone: its run (pid {run.pid}) has ended" in swept
    assert inner("list").stdout == ""


@contextlib.contextmanager
def listener() -> Iterator[int]:
    """A port on loopback that greets whoever comes."""

    def greet() -> None:
        with contextlib.suppress(OSError):
            while True:
                with server.accept()[0] as link:
                    link.sendall(b"hello\n")

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=greet, daemon=True).start()
        yield int(server.getsockname()[1])


def test_what_cannot_be_launched_is_said_before_an_image_is_built(inner: Run) -> None:
    for words, said in {
        ("--payload", "/nowhere/package.tar"): "/nowhere/package.tar is not a file",
        ("--memory", "12"): "MiB, at least 512",
        ("--cpus", "none"): "a number from 1 to 64",
    }.items():
        done = inner("launch", *words)
        assert done.returncode != 0 and said in done.stderr and "golden" not in done.stderr, done


def test_inner_vms_alone_are_ours(inner: Run, vm_dir: Path) -> None:
    """A dev VM in the same directory is not touched, whoever's name is given."""
    id = "0" * 12
    record = {"id": id, "kind": "dev", "golden": str(vm_dir), "profile": "small", "cpus": 1, "memory_mib": 512}
    record |= {"belongs_to": "someone", "owner": [1, 1], "created": 1, "version": 1}
    directory = vm_dir / "vms" / id
    directory.mkdir(parents=True, exist_ok=True)
    try:
        (directory / "vm.json").write_text(json.dumps(record))
        assert inner("destroy", id).returncode == 1
        assert inner("run", id, "true").returncode == 1
        assert inner("sweep").stderr == "0 orphaned inner VMs\n"
        assert (directory / "vm.json").exists()
    finally:
        for path in directory.iterdir():
            path.unlink()
        directory.rmdir()


def built() -> str:
    """Why there is nothing to pack here; nothing when there is."""
    target = Path(os.environ.get("CARGO_TARGET_DIR", REPO / "target"))
    images = Path(os.environ.get("CLAWPOT_IMAGE_DIR", REPO / "assets"))
    needed = [
        target / "debug/clawpot-server",
        target / "debug/clawpot",
        target / "debug/clawpot-edge",
        target / "debug/clawpot-unpack",
    ]
    missing = [str(path) for path in [*needed, images / "boot.json", images / "manifests/debian.json"] if not path.exists()]
    return f"not built: {', '.join(missing)}" if missing else ""


#: A test that fails in the inner VM: what it leaves must come out all the same.
FAILING = b"def test_that_fails():\n    assert 'inside' == 'outside'\n"


def test_the_integration_step_brings_out_what_a_failure_left(inner: Run, tmp_path: Path, vm_dir: Path) -> None:
    """As Buildkite runs it, but with tests that need no guest: guests in an inner VM are the Firecracker lane's."""
    del inner
    if why := built():
        pytest.skip(why)
    package = tmp_path / "package.tar"
    done = shell(REPO / "ci/package", "--no-build", "--out", package)
    assert done.returncode == 0, done.stdout + done.stderr
    with tarfile.open(package, "a") as tar:
        entry = tarfile.TarInfo("tests/integration/test_that_fails.py")
        entry.size = len(FAILING)
        tar.addfile(entry, io.BytesIO(FAILING))
    words = ["--package", package, "--artifacts", tmp_path / "artifacts"]
    tests = ["test_that_fails.py", "test_server.py", "-k", "that_fails or no_such_image or no_root"]
    # The services of the tests' world take their time in an emulated machine beside other work.
    done = shell(REPO / "ci/run-local", *words, "--", *tests, CLAWPOT_VM_DIR=vm_dir, CLAWPOT_TEST_SLOWNESS=6)
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(r"1 failed, [1-9]\d* passed", done.stdout), done.stdout
    report = (tmp_path / "artifacts/report/junit.xml").read_text()
    assert 'failures="1"' in report
    assert "outside" in report
    assert "clawpot-vm: ready" in (tmp_path / "artifacts/console.log").read_text(errors="replace")
    assert (tmp_path / "artifacts/inner/journal.log").stat().st_size > 0


def test_the_cache_gives_back_what_was_saved(tmp_path: Path) -> None:
    env = {
        "CLAWPOT_CI_CACHE": tmp_path / "cache",
        "CARGO_TARGET_DIR": tmp_path / "target",
        "CLAWPOT_IMAGE_DIR": tmp_path / "assets",
    }
    (tmp_path / "target/debug").mkdir(parents=True)
    (tmp_path / "target/debug/program").write_text("one")
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets/boot.json").write_text("{}")
    assert shell(REPO / "ci/cache", "save", **env).returncode == 0
    (tmp_path / "target/debug/program").write_text("two")
    assert shell(REPO / "ci/cache", "save", **env).returncode == 0
    (tmp_path / "target").rename(tmp_path / "gone")
    (tmp_path / "assets/boot.json").unlink()
    (tmp_path / "assets/README.md").write_text("of the repository")
    done = shell(REPO / "ci/cache", "restore", **env)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "target/debug/program").read_text() == "two"
    assert sorted(path.name for path in (tmp_path / "assets").iterdir()) == ["README.md", "boot.json"]
    assert not list((tmp_path / "cache").glob("*.half")) + list((tmp_path / "cache").glob("*.old"))


def test_the_pipeline_names_what_there_is() -> None:
    text = (REPO / ".buildkite/pipeline.yml").read_text()
    commands = re.findall(r"^\s+command: (\S+)$", text, re.M)
    assert len(commands) == text.count("- label:")
    for command in commands:
        assert os.access(REPO / command, os.X_OK), command
    # The step whose artifacts matter most when it fails.
    integration = (REPO / ".buildkite/scripts/integration.sh").read_text()
    assert "--artifacts artifacts" in integration
    assert "artifacts/**/*" in text
    assert re.search(r"run: \.ci/run$", (REPO / ".github/workflows/ci.yml").read_text(), re.M)


def test_a_run_without_vms_is_no_pass() -> None:
    """pytest as scripts/test runs it, where no program is found that VMs need."""
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    without = shell(
        *words, "test_ci.py::test_inner_vms_alone_are_ours", "test_parts.py::test_memory_is_in_mib", PATH="/nowhere"
    )
    assert without.returncode == 77, without.stdout
    assert "1 passed, 1 skipped" in without.stdout
    assert re.search(r"^dev VM and inner VMs: SKIPPED: .", without.stdout, re.M), without.stdout
    asked_for_none = shell(*words, "test_parts.py::test_memory_is_in_mib", PATH="/nowhere")
    assert asked_for_none.returncode == 0, asked_for_none.stdout
