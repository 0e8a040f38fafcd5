"""Parts of the VM tools that can be tried without a VM that lives long."""

import argparse
import fcntl
import importlib.machinery
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import IO

import pytest

from conftest import RUN, clear_leftovers
from vmlab import accel, devvm, golden, host, inner, machine, qemu, recipe, sizes, ssh
from vmlab.errors import LabError, Lacking

KVM_NONE = accel.Accel("tcg", "for a test", True)


def sleeper(*names: str) -> subprocess.Popen[bytes]:
    """A process whose command line has these words."""
    code = "import sys, time; sys.stdout.write('x'); sys.stdout.flush(); time.sleep(600)"
    process = subprocess.Popen([sys.executable, "-c", code, *names], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.read(1)
    return process


def test_only_the_very_process_is_killed() -> None:
    process = sleeper("guest=clawpot-dev-1")
    try:
        known = qemu.Process.of(process.pid, "clawpot-dev-1")
        for other in (
            replace(known, started=known.started - 1),
            replace(known, name="clawpot-dev-11"),
            replace(known, name="clawpot"),
        ):
            assert not other.alive()
            other.kill()
            assert process.poll() is None, f"{other} was taken for {known}"
        assert known.alive()
        known.kill()
        assert process.wait(5) == -9
        assert not known.alive()
    finally:
        process.kill()
        process.wait()


def test_a_pid_file_of_another_process_is_nobodys(tmp_path: Path) -> None:
    (tmp_path / "qemu.pid").write_text(f"{os.getpid()}\n")
    assert qemu.from_pid_file(tmp_path, "clawpot-dev-1") is None
    (tmp_path / "qemu.pid").write_text("")
    assert qemu.from_pid_file(tmp_path, "clawpot-dev-1") is None


def test_memory_is_in_mib() -> None:
    assert [sizes.memory(text) for text in ("4096", "4G", "512M", "2g")] == [4096, 4096, 512, 2048]
    for wrong in ("", "4T", "-1", "100", "1.5G", "4 G"):
        with pytest.raises(argparse.ArgumentTypeError):
            sizes.memory(wrong)


def plain_recipe(*packages: str) -> recipe.Recipe:
    return recipe.Recipe(replace(recipe.PROFILES["small"], packages=packages), "bookworm", "linux-image-1")


def test_another_recipe_has_another_hash(tmp_path: Path) -> None:
    one = plain_recipe("bash")
    assert one.hash() == plain_recipe("bash").hash()
    others = [plain_recipe("bash", "less"), replace(one, release="trixie"), replace(one, kernel="linux-image-2")]
    others.append(replace(one, extras=(recipe.Extra(tmp_path, "opt/rust", "1.95"),)))
    others.append(replace(one, profile=replace(one.profile, name="dev")))
    assert len({each.hash() for each in [one, *others]}) == 1 + len(others)


def make_golden(state: Path, wanted: recipe.Recipe, number: int, whole: bool = True) -> Path:
    directory = golden.home(state) / f"{wanted.profile.name}-{wanted.hash()}-{number}"
    directory.mkdir()
    if whole:
        record = {"profile": wanted.profile.name, "recipe": wanted.hash(), "kernel": wanted.kernel, "seconds": 1, "notes": []}
        (directory / "golden.json").write_text(json.dumps(record))
    return directory


def test_only_whole_images_are_found_and_only_unused_ones_dropped(tmp_path: Path) -> None:
    wanted = plain_recipe("bash")
    assert golden.find(tmp_path, wanted) is None
    make_golden(tmp_path, wanted, 1, whole=False)
    (golden.home(tmp_path) / f".build-small-{os.getpid()}").mkdir()
    assert golden.find(tmp_path, wanted) is None
    used, oldest, older, newest = (make_golden(tmp_path, wanted, number) for number in (2, 3, 4, 5))
    for age, path in enumerate((newest, older, oldest, used)):
        os.utime(path / "golden.json", (1000 - age, 1000 - age))
    found = golden.find(tmp_path, wanted)
    assert found
    assert found.directory == newest
    (tmp_path / "vms/v").mkdir(parents=True)
    (tmp_path / "vms/v/vm.json").write_text(json.dumps({"golden": str(used)}))
    golden.drop_unused(tmp_path, found, print)
    assert [path.exists() for path in (used, oldest, older, newest)] == [True, False, True, True]
    assert golden.drop_all_unused(tmp_path) == [older.name, newest.name]


def test_missing_programs_are_named_with_their_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(host, "SBIN", ())
    with pytest.raises(Lacking) as error:
        host.need_tools(["rsync", "qemu-img", "ssh"])
    assert "rsync, qemu-img, ssh" in str(error.value)
    assert "openssh-client qemu-utils rsync" in error.value.next


def test_too_little_room_is_told_with_figures(tmp_path: Path) -> None:
    with pytest.raises(Lacking, match=r"needs 99999999 MiB in .*, and \d+ MiB are free"):
        host.need_disk(tmp_path / "not" / "yet", 99999999, "the VM")
    with pytest.raises(Lacking, match=r"needs 99999999 MiB of memory, and \d+ MiB"):
        host.need_memory(99999999, "the VM")


def test_no_kvm_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accel, "KVM", tmp_path / "kvm")
    found = accel.probe(tmp_path / "vmlinux")
    assert (found.name, found.nested) == ("tcg", True)
    assert "no /dev/kvm" in found.words


def test_a_kernel_that_says_nothing_is_no_kvm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe looks at what the guest prints. Here QEMU has nothing to run, which no accelerator mends."""
    monkeypatch.setattr(accel, "KVM", Path("/dev/null"))
    if not host.tool("qemu-system-x86_64"):
        pytest.skip("qemu-system-x86_64 is not installed")
    (tmp_path / "vmlinux").write_bytes(b"\0" * 4096)
    found = accel.probe(tmp_path / "vmlinux", seconds=5)
    assert found.name == "tcg"
    assert "/dev/kvm is here, but" in found.why


def test_a_host_is_judged_as_the_firecracker_lane_judges_it() -> None:
    told = re.search(r"^PROBE_SECONDS = ([\d.]+)$", (recipe.LIB / "firecracker_lane.py").read_text(), re.M)
    assert told and float(told[1]) == accel.PROBE_SECONDS


def test_the_answer_of_the_probe_is_kept_for_this_boot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CLAWPOT_VM_ACCEL", raising=False)
    monkeypatch.setattr(accel, "probe", lambda kernel: KVM_NONE)
    assert accel.choose(tmp_path, tmp_path / "kept") == KVM_NONE
    monkeypatch.setattr(accel, "probe", lambda kernel: pytest.fail("asked again"))
    assert accel.choose(tmp_path, tmp_path / "kept") == KVM_NONE
    monkeypatch.setattr(host, "boot_id", lambda: "another boot")
    with pytest.raises(pytest.fail.Exception):
        accel.choose(tmp_path, tmp_path / "kept")


def test_a_launch_under_way_keeps_others_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devvm, "ID_FILE", tmp_path / ".devvm")
    with devvm.id_file(), pytest.raises(LabError, match="under way"), devvm.id_file():
        pass


def test_an_id_is_never_written_to_a_file_that_a_destroy_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / ".devvm"
    monkeypatch.setattr(devvm, "ID_FILE", path)
    really = fcntl.flock

    def meanwhile(file: IO[str], how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", really)
        path.unlink()
        really(file, how)

    monkeypatch.setattr(fcntl, "flock", meanwhile)
    with devvm.id_file() as file:
        file.write("0123456789ab\n")
    assert path.read_text() == "0123456789ab\n"


def test_a_destroy_does_not_take_the_file_from_a_launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it has an id in it, there is no VM yet to see."""
    monkeypatch.setattr(devvm, "ID_FILE", tmp_path / ".devvm")
    monkeypatch.setenv("CLAWPOT_VM_DIR", str(tmp_path))
    with devvm.id_file():
        assert devvm.main(["destroy"]) == 1
        assert (tmp_path / ".devvm").exists()
    assert devvm.main(["destroy"]) == 0
    assert not (tmp_path / ".devvm").exists()


def test_a_record_that_cannot_be_read_is_not_absent(tmp_path: Path) -> None:
    (tmp_path / "vms/0123456789ab").mkdir(parents=True)
    assert machine.Machine.open(tmp_path, "0123456789ab") is None
    (tmp_path / "vms/0123456789ab/vm.json").write_text('{"id": ')
    with pytest.raises(LabError, match="cannot be read"):
        machine.Machine.open(tmp_path, "0123456789ab")


def test_a_vm_that_never_gets_ready_shows_its_console(tmp_path: Path) -> None:
    process = sleeper("guest=clawpot-dev-2")
    try:
        spec = qemu.Spec("clawpot-dev-2", tmp_path, tmp_path, tmp_path / "disk", 1, 512, KVM_NONE)
        spec.console.write_bytes(b"first line\r\n\x1b[31mKernel panic - not syncing\r\n")
        known = qemu.Process.of(process.pid, spec.name)
        begun = time.monotonic()
        with pytest.raises(LabError, match=r"not ready within 0.3 s(.|\n)*\| .*Kernel panic"):
            qemu.wait_ready(spec, known, seconds=0.3)
        assert time.monotonic() - begun < 120
        known.kill()
        process.wait()
        with pytest.raises(LabError, match=r"ended before it was ready(.|\n)*Kernel panic"):
            qemu.wait_ready(spec, known)
        # The console is written a few bytes at a time: half a key is none.
        spec.console.write_bytes(b"clawpot-vm: ready golden=ab12 kvm=no uptime=3.5 hostkey=ssh-ed25519:AA")
        with pytest.raises(LabError, match="ended before it was ready"):
            qemu.wait_ready(spec, known)
        # A machine that was ready and ended has been ready.
        spec.console.write_bytes(b"clawpot-vm: ready golden=ab12 kvm=no uptime=3.5 hostkey=ssh-ed25519:AAAA\r\n")
        assert qemu.wait_ready(spec, known) == qemu.Ready("ab12", False, 3.5, "ssh-ed25519 AAAA")
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("ends", ["told to end", "told at once", "too slow"])
def test_a_qemu_that_is_given_up_while_it_starts_does_not_come_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: str
) -> None:
    """A stand-in that goes into the background as QEMU does, after its caller was told to end; or writes its pid, and hangs."""
    name, called, told, pid_file = "clawpot-dev-3", *(tmp_path / name for name in ("called", "told", "qemu.pid"))
    signalled = ends != "too slow"
    first, then = (f"touch {called}; until [ -e {told} ]; do sleep 0.1; done", "") if signalled else ("", "wait")
    (tmp_path / "bin").mkdir()
    stand_in = tmp_path / "bin/qemu-system-x86_64"
    daemon = f"import os, time; print(os.getpid(), file=open('{pid_file}', 'w'), flush=True); time.sleep(600)"
    up = f"until [ -s {pid_file} ]; do sleep 0.1; done"
    stand_in.write_text(f'#!/bin/sh\n{first}\n{sys.executable} -c "{daemon}" guest={name} &\n{up}\n{then}\n')
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    # The hung one has both to write its pid.
    monkeypatch.setattr(qemu, "START_SECONDS", 60 if signalled else 1)
    monkeypatch.setattr(qemu, "QUIT_SECONDS", 60 if signalled else 8)
    spec = qemu.Spec(name, tmp_path, tmp_path, tmp_path / "disk", 1, 512, KVM_NONE)

    def end(*_: object) -> None:
        told.touch()
        sys.exit(143)

    def tell() -> None:
        while not called.exists():
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)

    really = subprocess.Popen

    def interrupted(*words: object, **how: object) -> subprocess.Popen[bytes]:
        """The signal comes between the program's start and our knowing of it."""
        process = really(*words, **how)  # type: ignore[call-overload]
        os.kill(os.getpid(), signal.SIGTERM)
        return process

    if ends == "told at once":
        monkeypatch.setattr(subprocess, "Popen", interrupted)
    before = signal.signal(signal.SIGTERM, end)
    teller = threading.Thread(target=tell, daemon=True)
    try:
        if ends == "told to end":
            teller.start()
        with pytest.raises(SystemExit if signalled else LabError):
            qemu.spawn(spec)
    finally:
        signal.signal(signal.SIGTERM, before)
    pid = int((tmp_path / "qemu.pid").read_text())
    assert qemu.start_time(pid) is None, "it runs, and nobody knows of it"


@pytest.fixture
def hanging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[machine.Machine, subprocess.Popen[bytes]]]:
    """A VM whose QEMU runs and answers nobody, and whose shared connection does not answer either."""
    record = machine.Record("0123456789ab", "ci", str(tmp_path), "small", 1, 512, "a test", accel={"name": "tcg"})
    process = sleeper(f"guest=clawpot-ci-{record.id}")
    try:
        record.pid, record.started = process.pid, qemu.start_time(process.pid) or 0
        directory = tmp_path / "vms" / record.id
        directory.mkdir(parents=True)
        (directory / "ctl").touch()
        hung = tmp_path / "bin/ssh"
        hung.parent.mkdir()
        hung.write_text("#!/bin/sh\nexec sleep 60\n")
        hung.chmod(0o755)
        monkeypatch.setenv("PATH", f"{hung.parent}:{os.environ['PATH']}")
        monkeypatch.setattr(ssh, "ANSWER_SECONDS", 0.3)
        monkeypatch.setattr(qemu, "QUIT_SECONDS", 0.3)
        vm = machine.Machine(directory, record)
        vm.save()
        yield vm, process
    finally:
        process.kill()
        process.wait()


def test_a_vm_that_answers_nobody_is_destroyed_all_the_same(
    hanging: tuple[machine.Machine, subprocess.Popen[bytes]],
) -> None:
    vm, process = hanging
    vm.destroy()
    assert process.wait(5) == -9
    assert not vm.directory.exists()


def test_no_room_for_what_the_tests_left_keeps_no_inner_vm(
    hanging: tuple[machine.Machine, subprocess.Popen[bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm, process = hanging
    run_local = program("ci/run-local")
    monkeypatch.setattr(inner, "launch", lambda say, wanted: vm)
    monkeypatch.setattr(run_local, "tests", lambda arguments, vm: 0)
    (tmp_path / "file").touch()
    arguments = argparse.Namespace(artifacts=tmp_path / "file/artifacts", memory=512, keep=False)
    with pytest.raises(NotADirectoryError):
        run_local.in_vm(arguments, tmp_path / "package.tar")
    assert process.wait(5) == -9
    assert not vm.directory.exists()


def test_of_runs_that_ended_at_once_the_vms_are_removed_and_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qemu, "QUIT_SECONDS", 0.3)

    def tree(name: str, run: str | None) -> Path:
        made = tmp_path / name
        made.mkdir()
        if run:
            (made / RUN).write_text(run)
        return made

    pid, started = machine.me()
    trees = {
        "dead": tree("dead", f"{pid} {started - 1}"),
        "gone": tmp_path / "pytest-of-root/pytest-3/tree0",
        "alive": tree("alive", f"{pid} {started}"),
        "somebody's": tree("somebody's", None),
        "somebody's, moved": tmp_path / "moved",
    }
    vms = {}
    processes = [sleeper(f"guest=clawpot-dev-{number:012x}") for number in range(len(trees))]
    try:
        for number, (name, belongs_to) in enumerate(trees.items()):
            vms[name] = tmp_path / f"vms/{number:012x}"
            record = machine.Record(vms[name].name, "dev", str(tmp_path), "small", 1, 512, str(belongs_to))
            record.pid, record.started = processes[number].pid, qemu.start_time(processes[number].pid) or 0
            vms[name].mkdir(parents=True)
            machine.Machine(vms[name], record).save()
        (tmp_path / f"test-{os.getpid()}").mkdir()
        (tmp_path / "test-4194305/golden/.build-small-4194305").mkdir(parents=True)
        clear_leftovers(tmp_path)
        kept = ["alive", "somebody's", "somebody's, moved"]
        assert [name for name, path in vms.items() if path.exists()] == kept
        assert [process.poll() is None for process in processes] == [name in kept for name in trees]
        assert [path.name for path in tmp_path.glob("test-*")] == [f"test-{os.getpid()}"]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def program(name: str) -> ModuleType:
    loader = importlib.machinery.SourceFileLoader(name.replace("-", "_").replace("/", "."), str(host.REPO / name))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def test_artifacts_take_the_place_of_nothing_but_artifacts(tmp_path: Path) -> None:
    """The program itself: what it is given is refused before anything is packed or booted."""
    home = tmp_path / "home"
    (home / "report").mkdir(parents=True)
    (home / "report/thesis.tex").write_text("years")
    for more, said in ((), "no run's console"), (("letters",), "letters"), (("console.log", "letters"), "letters"):
        for name in more:
            (home / name).touch()
        words = [sys.executable, host.REPO / "ci/run-local", "--no-build", "--artifacts", home]
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 1 and f"is no directory of artifacts: there is {said} in it" in done.stderr, done
    assert (home / "report/thesis.tex").read_text() == "years"
    (home / "letters").unlink()
    (home / "link").symlink_to(home / "report")
    with pytest.raises(LabError, match="link"):
        inner.need_own(home)
    (home / "link").unlink()
    inner.need_own(home)
    inner.clear(home)
    assert list(home.iterdir()) == []
    inner.need_own(home)
    inner.clear(tmp_path / "not there")
