"""The steps of the pipeline as an agent runs them, in a checkout of the tests' own; what takes long is a stand-in."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
#: An agent that is not root: nobody's number on Debian.
AGENT = 65534


def shell(*words: object, cwd: Path, **env: object) -> subprocess.CompletedProcess[str]:
    full = {**os.environ, **{name: str(value) for name, value in env.items()}}
    for name in ("BUILDKITE_BUILD_ID", "CLAWPOT_IMAGE_DIR", "CARGO_TARGET_DIR", "GIT_DIR"):
        if name not in env:
            full.pop(name, None)
    command = [str(word) for word in words]
    quiet = {"stdin": subprocess.DEVNULL, "capture_output": True}
    return subprocess.run(command, cwd=cwd, env=full, text=True, check=False, timeout=120, **quiet)  # type: ignore[call-overload]


def script(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)


@pytest.fixture
def checkout() -> Iterator[Path]:
    """With the pipeline's own scripts. Not below pytest's directory, which nobody but root may enter."""
    with tempfile.TemporaryDirectory(prefix="clawpot-checkout-") as directory:
        root = Path(directory)
        root.chmod(0o755)
        for name in (".buildkite", "ci", "scripts/lib"):
            shutil.copytree(REPO / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
        (root / "assets").mkdir()
        yield root


def test_the_next_job_can_remove_what_root_made_in_a_step(checkout: Path, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("makes what only root can make")
    script(checkout / "scripts/test", "mkdir -p target/deep/er assets/cache tests/__pycache__", "touch target/deep/er/file")
    with (checkout / "scripts/test").open("a") as file:
        file.write("ln -s /etc/hostname target/link\nexit 3\n")
    (checkout / ".gitignore").write_text("/target\n/assets\n__pycache__/\n")
    shell("git", "init", "-q", cwd=checkout)
    for path in [checkout, *checkout.rglob("*")]:
        os.chown(path, AGENT, AGENT, follow_symlinks=False)
    cache = tmp_path / "cache"
    # Root in the place of `sudo` within the step; it fails, as the step that makes most of the mess may.
    done = shell(checkout / ".buildkite/scripts/build.sh", cwd=checkout, CLAWPOT_CI_CACHE=cache)
    assert done.returncode == 3, done.stdout + done.stderr
    assert [path.name for path in cache.glob("target-*")], "what was built is kept all the same"
    agent = ["setpriv", f"--reuid={AGENT}", f"--regid={AGENT}", "--clear-groups"]
    cleaned = shell(*agent, "git", "clean", "-ffxdq", cwd=checkout, HOME=checkout)
    assert (cleaned.returncode, cleaned.stderr) == (0, "")
    assert not (checkout / "target").exists() and not (checkout / "tests").exists()
    assert Path("/etc/hostname").stat().st_uid == 0


def test_every_step_gives_back(checkout: Path) -> None:
    for path in (checkout / ".buildkite/scripts").glob("*.sh"):
        text = path.read_text()
        if path.name != "step.sh":
            assert "/step.sh" in text and "\nexec " not in text, path.name


def test_the_integration_step_has_the_firecracker_of_the_cache(checkout: Path, tmp_path: Path) -> None:
    """The checkout has none: the agent removes what git ignores before each job."""
    kept = tmp_path / "cache/assets/firecracker/v1.2.3/firecracker"
    script(kept, "exit 0")
    (tmp_path / "cache" / "target-none").mkdir()
    # Installs nothing here.
    with (checkout / "scripts/lib/packages.sh").open("a") as file:
        file.write('need_packages() { echo "needed: $*"; }\n')
    script(checkout / "ci/run-local", 'echo "$@"', "ls assets/firecracker/*/firecracker", "exit 5")
    done = shell(checkout / ".buildkite/scripts/integration.sh", "--", "-x", cwd=checkout, CLAWPOT_CI_CACHE=tmp_path / "cache")
    assert done.returncode == 5, done.stdout + done.stderr
    # The agent of this step may be another one than built.
    assert re.match(r"needed: .*\bmmdebstrap=.* qemu-img=.* rsync=", done.stdout), done.stdout
    assert "--package target/ci/package.tar.zst --artifacts artifacts -- -x\n" in done.stdout
    assert "assets/firecracker/v1.2.3/firecracker\n" in done.stdout, done
    assert not (checkout / "target").exists(), "nothing is compiled here"


@pytest.mark.parametrize("there", [(), ("firecracker",), ("jailer",), ("firecracker", "jailer")])
def test_what_ran_on_qemu_is_not_taken_for_firecracker(tmp_path: Path, there: tuple[str, ...]) -> None:
    """ci/run-tests as in the inner VM; its last word says what did not run, and pytest's status stays."""
    root, programs = tmp_path / "root", tmp_path / "bin"
    programs.mkdir()
    (root / "ci").mkdir(parents=True)
    shutil.copy(REPO / "ci/run-tests", root / "ci")
    (root / "COMMIT").write_text("0123456\n")
    (root / "tests/integration").mkdir(parents=True)
    (root / "tests/integration/test_one.py").write_text("import os\ndef test_vmm(): assert 'CLAWPOT_TEST_VMM' in os.environ\n")
    for name in ("bash", "dirname", "uname", "nproc", "cat"):
        (programs / name).symlink_to(str(shutil.which(name)))
    (programs / "python3").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (programs / "python3").chmod(0o755)
    for name in there:
        script(programs / name, "exit 0")
    done = shell(root / "ci/run-tests", cwd=root, PATH=programs, CLAWPOT_TEST_SLOWNESS=1)
    last = done.stdout.splitlines()[-1]
    if len(there) == 2 and Path("/dev/kvm").is_char_device():
        assert (done.returncode, "SKIPPED" in done.stdout) == (0, False), done
        assert "vmm firecracker" in done.stdout
        return
    assert (done.returncode, last.startswith("inner VM: on Firecracker: SKIPPED: no ")) == (1, True), done
    if Path("/dev/kvm").is_char_device():
        assert [f"no {name} in" in last for name in ("firecracker", "jailer")] == [
            name not in there for name in ("firecracker", "jailer")
        ]
