"""A dev VM's whole life, as a developer has it. The tests stand on each other in the order in which they are written."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest

from conftest import MEMORY_MIB, Run
from vmlab import golden, qemu, recipe
from vmlab.errors import LabError


@pytest.fixture(scope="module")
def up(devvm: Run) -> Run:
    """A VM that runs."""
    done = devvm("launch", "--profile", "small", "--memory", str(MEMORY_MIB), check=True, seconds=1400)
    print(done.stderr)
    return devvm


def told(devvm: Run) -> dict[str, object]:
    return json.loads(devvm("status", "--json").stdout)


def test_launch_gives_a_machine_with_kvm(up: Run) -> None:
    state = told(up)
    assert state["state"] == "running"
    accel = state["accel"]
    assert isinstance(accel, dict)
    if not accel["nested"]:
        pytest.skip(f"KVM works here, but not in a guest: {accel['why']}")
    # Opening it, not its name, is what Firecracker will do.
    up("run", "exec 3<>/dev/kvm", check=True)
    assert state["kvm_inside"] is True


def test_status_tells_how_it_runs(up: Run) -> None:
    done = up("status")
    assert done.returncode == 0
    accel = told(up)["accel"]
    assert isinstance(accel, dict)
    assert ("KVM" if accel["name"] == "kvm" else "TCG") in done.stdout
    assert str(accel["why"]) in done.stdout


def test_run_passes_exit_codes_output_and_stdin(up: Run) -> None:
    assert up("run", "exit 7").returncode == 7
    assert up("run", "kill -9 $$").returncode == 137
    done = up("run", "cat; echo oops >&2", input="through\n")
    assert (done.stdout, done.stderr, done.returncode) == ("through\n", "oops\n", 0)
    # Several words are one command, each a word of it.
    assert up("run", "printf", "[%s]", "a b", "$c").stdout == "[a b][$c]"


def test_run_is_a_login_shell(up: Run) -> None:
    done = up("run", "shopt -q login_shell && echo $PATH", check=True)
    assert "/usr/sbin" in done.stdout


def test_systemd_is_well(up: Run) -> None:
    assert up("run", "cat /proc/1/comm").stdout.strip() == "systemd"
    assert up("run", "systemctl --failed --quiet --no-legend").stdout.strip() == ""


def test_sync_copies_and_deletes(up: Run, tree: Path) -> None:
    (tree / "target").mkdir(exist_ok=True)
    (tree / "target/program").write_text("built")
    (tree / "a file").write_text("one\n")
    up("sync", check=True)
    listed = up(
        "run", "cd /work/clawpot && cat 'a file' && ls -d target .git .devvm 2>/dev/null; stat -c %a utils/devvm"
    ).stdout
    assert listed.split() == ["one", "755"]
    # Excluded by default, brought by name; and what the VM has there of its own stays.
    up("run", "mkdir -p /work/clawpot/target/debug && touch /work/clawpot/target/debug/own", check=True)
    (tree / "a file").unlink()
    up("sync", "--with", "target/program", check=True)
    listed = up("run", "cd /work/clawpot && ls 'a file' 2>/dev/null; cat target/program; ls target/debug").stdout
    assert listed.split() == ["builtown"]
    refused = up("sync", "--with", "/etc/passwd")
    assert refused.returncode == 1
    assert "is not in" in refused.stderr


def test_a_second_launch_is_refused(up: Run) -> None:
    before = told(up)
    done = up("launch", "--profile", "small")
    assert done.returncode == 1
    assert "has a VM" in done.stderr
    assert "utils/devvm destroy" in done.stderr
    assert told(up)["pid"] == before["pid"]


def test_stop_and_start_keep_the_disk(up: Run) -> None:
    up("run", "echo kept >/root/note", check=True)
    state = told(up)
    up("stop", check=True)
    assert not is_there(state), "QEMU is still there"
    assert up("status").returncode == 3
    refused = up("run", "true")
    assert refused.returncode == 1
    assert "utils/devvm start" in refused.stderr
    assert up("stop").returncode == 1
    up("start", check=True)
    assert up("run", "cat /root/note").stdout == "kept\n"
    assert "already" in up("start").stderr


def test_logs_show_the_console(up: Run) -> None:
    assert "clawpot-vm: ready" in up("logs", check=True).stdout


def test_an_image_that_does_not_boot_is_thrown_away(up: Run, vm_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = Path(str(told(up)["golden"]))

    def make(wanted: recipe.Recipe, scratch: Path, say: golden.Say, fresh: bool) -> None:
        """The image that boots, but for its initrd."""
        del wanted, say, fresh
        for name in ("root.img", "vmlinux"):
            os.link(good / name, scratch / name)
        (scratch / "initrd").write_bytes(b"")

    monkeypatch.setattr(golden, "make", make)
    # On the file system of the good one, where it can be linked.
    state = vm_dir / f"test-{os.getpid()}"
    wanted = recipe.Recipe(recipe.PROFILES["small"], "bookworm", "linux-image-1")
    try:
        with pytest.raises(LabError, match=r"does not boot(.|\n)*\| .*Kernel panic(.|\n)*thrown away"):
            golden.obtain(state, wanted, print)
        left = [path.name for path in golden.home(state).iterdir()]
    finally:
        shutil.rmtree(state)
    assert left == ["lock-small"]


def test_destroy_removes_all_of_it_and_nothing_else(up: Run, tree: Path, vm_dir: Path) -> None:
    state = told(up)
    others = sorted(path.name for path in (vm_dir / "vms").iterdir() if path.name != state["id"])
    begun = time.monotonic()
    up("destroy", check=True)
    assert time.monotonic() - begun < 60
    assert not is_there(state), "QEMU is still there"
    assert not (tree / ".devvm").exists()
    assert sorted(path.name for path in (vm_dir / "vms").iterdir()) == others
    # The shared connection has been told to end, and is not waited for.
    deadline = time.monotonic() + 60
    while mentions := [pid for pid in os.listdir("/proc") if pid.isdigit() and str(state["id"]) in command_line(pid)]:
        assert time.monotonic() < deadline, f"processes that name the VM: {[command_line(pid) for pid in mentions]}"
        time.sleep(0.1)
    assert up("status").returncode == 4
    # A second time it has nothing to do, and says so.
    assert up("destroy").returncode == 0


def is_there(state: dict[str, object]) -> bool:
    """Whether its QEMU runs; its number may be another's by now."""
    return qemu.start_time(int(str(state["pid"]))) == state["started"]


def command_line(pid: str) -> str:
    try:
        return Path("/proc", pid, "cmdline").read_text(errors="replace")
    except OSError:
        return ""
