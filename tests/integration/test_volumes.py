"""Disks that outlive VMs: what is in them, who may have them, and what a server that dies leaves of them."""

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import LIVING
from harness.cli import Cli, binaries
from harness.crashes import Mortal, all_points, program
from harness.server import Server
from harness.tools import run, until, within
from harness.world import World


def _volume(cli: Cli, name: str) -> dict[str, Any]:
    found: dict[str, Any] = cli("volume", "inspect", name, "-o", "json").ok().json
    return found


@pytest.mark.firecracker
def test_what_is_in_a_volume_outlives_vms(server: Server) -> None:
    """Written, grown, left behind by a VMM that was killed, and read by another VM: three boots."""
    cli = server.cli
    assert cli("volume", "create", "data", "--size", "256M").ok().text == "data\n"
    cli("volume", "create", "data", "--size", "256M").fails(1, "volume data: there is one of this name")
    cli("create", "--wait", "--name", "keeper", "--volume", "data:/srv/deep/data", "debian").ok()
    mounted = cli.sh("keeper", "grep ' /srv/deep/data ' /proc/mounts; echo kept > /srv/deep/data/mark").ok().text
    assert " ext4 rw,nodev," in mounted, mounted
    cli("volume", "rm", "data").fails(1, "VM keeper has it", "clawpot rm keeper")
    cli("volume", "resize", "data", "--size", "512M").fails(1, "VM keeper has it and is not stopped")
    cli("create", "--volume", "data:/x:ro", "debian").fails(1, "VM keeper writes to it")
    cli("stop", "keeper").ok()
    assert not _volume(cli, "data")["unclean"], "it was unmounted in order"
    cli("volume", "resize", "data", "--size", "512M").ok()
    cli("volume", "resize", "data", "--size", "256M").fails(1, "a volume only grows")
    # A stopped VM keeps what it has: its next start cannot fail for somebody else's sake.
    cli("create", "--volume", "data:/x", "debian").fails(1, "VM keeper writes to it")

    cli("start", "keeper").ok()
    size = int(cli.sh("keeper", "df -m --output=size /srv/deep/data | tail -n 1").ok().text)
    assert size > 400, f"{size} MiB"
    cli.sh("keeper", "echo more >> /srv/deep/data/mark; dd if=/dev/zero of=/srv/deep/data/open bs=1M count=8; sync").ok()
    busy = cli.start("exec", "keeper", "--", "sh", "-c", "while :; do date >> /srv/deep/data/log; done")
    for pid in server.vmm_pids(cli.inspect("keeper")["id"]):
        os.kill(pid, signal.SIGKILL)
    busy.communicate(timeout=within(60))
    cli("rm", "keeper").ok()
    left = _volume(cli, "data")
    assert left["unclean"] and left["state"] == "ready" and left["used_by"] == [], left

    cli("create", "--wait", "--name", "reader", "--volume", "data:/srv/data:ro", "debian").ok()
    assert not _volume(cli, "data")["unclean"], "it was checked"
    assert cli.sh("reader", "cat /srv/data/mark").ok().text == "kept\nmore\n"
    cli.sh("reader", "echo no > /srv/data/mark").fails(2, "Read-only")
    assert cli.inspect("reader")["volumes"] == [{"volume": "data", "path": "/srv/data", "read_only": True}]
    cli("create", "--volume", "data:/x", "debian").fails(1, "VM reader reads it")
    cli("rm", "reader").ok()
    # A VM that is deleted unmounts what it writes to: nobody said "sync" here.
    cli("run", "--rm", "--volume", "data:/srv", "debian", "--", "sh", "-c", "echo last > /srv/last").ok()
    # The client waits for the end of its VM, but not for ever.
    until(lambda: not _volume(cli, "data")["used_by"], what="the end of its VM")
    left = _volume(cli, "data")
    assert not left["unclean"], left
    file = server.state_dir / "volumes" / f"{left['id']}.ext4"
    assert run("debugfs", "-R", "cat /last", file) == "last\n"
    copied = cli("volume", "cp", "data", "copy", "-o", "json").ok().json
    assert copied["copied"] in ("reflink", "sparse") and copied["size_mib"] == 512, copied
    assert [one["name"] for one in cli("volume", "ls", "-o", "json").ok().json] == ["copy", "data"]
    cli("volume", "rm", "data", "copy").ok()
    assert list((server.state_dir / "volumes").iterdir()) == []


def test_bad_volumes_are_refused(server: Server) -> None:
    cli = server.cli
    cli("create", "--volume", "nothing:/data", "debian").fails(1, "--volume: volume nothing: there is none")
    cli("create", "--volume", "a:/", "debian").fails(2, "root")
    cli("create", "--volume", "a:/proc/x", "debian").fails(2, "guest kernel's")
    cli("create", "--volume", "a:/x/../y", "debian").fails(2, "'..'")
    cli("create", "--volume", "a:/x", "--volume", "a:/y", "debian").fails(1, "volume a is there twice")
    cli("create", "--volume", "a:/x", "--volume", "b:/x", "debian").fails(1, "/x is there twice")
    nine = [word for n in range(9) for word in ("--volume", f"v{n}:/v{n}")]
    cli("create", *nine, "debian").fails(1, "at most 8")
    cli("volume", "create", "Big", "--size", "1G").fails(2, "[a-z0-9._-]")
    assert cli("volume", "ls", "-o", "json").ok().json == []


@pytest.fixture
def mortal(world: World, workdir: Path) -> Iterator[Mortal]:
    # What checks and grows volumes stands beside the server.
    helper = program().with_name("clawpot-unpack")
    if not helper.exists():
        shutil.copy(binaries() / "clawpot-unpack", helper)
    server = Mortal(world, workdir / "mortal-volumes", "--stray-grace-secs", 1)
    LIVING.append(server)
    yield server
    left = server.close()
    LIVING.remove(server)
    assert not left, left


# With the end of all servers, as the last.
@pytest.mark.timeout(within(900))
def test_every_failpoint_of_volumes(mortal: Mortal) -> None:
    """It dies at each; the next one has no file without a record, no record without a file, and does what is asked again."""
    cli = mortal.start().cli
    died = []

    def settled() -> list[str]:
        volumes = cli("volume", "ls", "-o", "json").ok().json
        files = {path.name for path in (mortal.state_dir / "volumes").iterdir()}
        assert files == {f"{one['id']}.ext4" for one in volumes}, (files, volumes)
        assert all(one["state"] == "ready" for one in volumes), volumes
        return [one["name"] for one in volumes]

    def die(point: str, *words: object, nth: int = 1) -> subprocess.Popen[bytes]:
        mortal.arm(point, nth)
        process = cli.start(*words)
        until(mortal.died, seconds=60, what=f"its death at {point}")
        assert mortal.hits()[-1] == point
        died.append(point)
        mortal.process = None
        mortal.start()
        return process

    def asked_again(point: str, *words: object) -> None:
        die(point, *words).communicate(timeout=within(60))
        until(lambda: all(one["state"] == "ready" for one in cli("volume", "ls", "-o", "json").ok().json))
        settled()

    for point in ("volume.written", "volume.formatted", "volume.made"):
        asked_again(point, "volume", "create", "one", "--size", "64M")
        assert settled() == []
    cli("volume", "create", "one", "--size", "64M").ok()
    asked_again("volume.held", "volume", "cp", "one", "two")
    for number, point in enumerate(("volume.lengthened", "volume.grown")):
        asked_again(point, "volume", "resize", "one", "--size", f"{128 + number}M")
        assert _volume(cli, "one")["size_mib"] == 128 + number
    asked_again("volume.mended", "volume", "check", "one")
    assert _volume(cli, "one")["unclean"]
    cli("volume", "check", "one").ok()
    _die_with_a_vm(mortal, die)
    for point in ("volume.doomed", "volume.erased"):
        cli("volume", "create", "gone", "--size", "64M").ok()
        asked_again(point, "volume", "rm", "gone")
        assert settled() == ["one"]
    cli("volume", "rm", "one").ok()
    assert set(died) == {point for point in all_points() if point.startswith("volume.")}


def _die_with_a_vm(mortal: Mortal, die: Callable[..., subprocess.Popen[bytes]]) -> None:
    """The VM comes up with its volume all the same; its guest needs not boot."""
    cli = mortal.cli

    def booting() -> bool:
        vm = cli.inspect("mortal")
        assert vm["phase"] not in ("failed", "quarantined"), vm
        return vm["phase"] in ("booting", "running") and bool(mortal.vmm_pids(vm["id"]))

    for point in ("volume.given", "volume.linked", "volume.checked"):
        process = die(point, "create", "--name", "mortal", "--volume", "one:/data", "debian")
        errors = process.communicate(timeout=within(60))[1].decode()
        assert process.returncode == 0, errors
        until(booting, what=f"a machine after {point}")
        (use,) = _volume(cli, "one")["used_by"]
        assert use["vm"] == "mortal"
        cli("rm", "mortal").ok()
        if point == "volume.linked":
            _spoil(mortal)


def _spoil(mortal: Mortal) -> None:
    """A VM is killed whose guest has begun to write to the volume."""
    cli = mortal.cli
    cli("create", "--name", "writer", "--volume", "one:/data", "debian").ok()
    # It stands still from here on: a guest that has come so far would unmount it in order.
    for pid in until(lambda: mortal.vmm_pids(cli.inspect("writer")["id"]), what="its machine"):
        os.kill(pid, signal.SIGSTOP)
    path = mortal.state_dir / "volumes" / f"{_volume(cli, 'one')['id']}.ext4"
    subprocess.run(["debugfs", "-w", "-R", "set_super_value state 0", path], check=True, capture_output=True)
    cli("rm", "writer").ok()
    assert _volume(cli, "one")["unclean"]
