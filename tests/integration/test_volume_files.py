"""Volumes' files on file systems that share blocks, that are full, that are damaged."""

import contextlib
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import LIVING
from harness.cli import Cli
from harness.server import Server
from harness.tools import until
from harness.world import World


def _volume(cli: Cli, name: str) -> dict[str, Any]:
    found: dict[str, Any] = cli("volume", "inspect", name, "-o", "json").ok().json
    return found


class Elsewhere(Server):
    """A server whose volumes lie on a file system of their own, mounted where only it sees that: gone with its process."""

    def begin(self, mount: str) -> "Elsewhere":
        place = self.state_dir / "volumes"
        script = f'mkdir -p -m 700 {self.state_dir} {place} && {mount} {place} && chmod 700 {place} && exec "$@"'
        self.start(before=("unshare", "--mount", "--propagation", "private", "sh", "-euc", script, "sh"))
        return self

    @property
    def place(self) -> Path:
        """Its volumes, as it sees them."""
        return Path(f"/proc/{self.pid}/root{self.state_dir}/volumes")

    def file(self, name: str) -> Path:
        return self.place / f"{_volume(self.cli, name)['id']}.ext4"

    def files(self) -> set[str]:
        return {path.name for path in self.place.iterdir()}


@pytest.fixture
def elsewhere(world: World, workdir: Path) -> Iterator[Elsewhere]:
    server = Elsewhere(world, workdir / "volumes-elsewhere", "--vmm", "qemu")
    LIVING.append(server)
    yield server
    left = server.close()
    LIVING.remove(server)
    assert not left, left


def _debugfs(file: Path, *requests: str) -> None:
    for request in requests:
        subprocess.run(["debugfs", "-w", "-R", request, file], check=True, capture_output=True)


def _told(cli: Cli, volume: str) -> list[tuple[str, str, str]]:
    """Kind, actor and message of its events."""
    lines = cli("events", "-o", "json").ok().lines
    return [(one["kind"], one["actor"], one["message"]) for one in lines if one["volume_name"] == volume]


def _payload(workdir: Path, mib: int) -> Path:
    path = workdir / "payload"
    path.write_bytes(os.urandom(mib << 20))
    return path


def _needs_xfs() -> None:
    if not shutil.which("mkfs.xfs"):
        assert not os.environ.get("CLAWPOT_TEST_REQUIRE_TOOLS"), "mkfs.xfs is missing: install xfsprogs"
        pytest.skip("needs mkfs.xfs: install xfsprogs")
    if shutil.which("modprobe"):
        subprocess.run(["modprobe", "-q", "xfs"], check=False)
    if "\txfs\n" not in Path("/proc/filesystems").read_text(encoding="ascii"):
        pytest.skip("this kernel has no XFS")


def test_a_copy_by_reflink(elsewhere: Elsewhere, workdir: Path) -> None:
    """On an XFS: at once, and the two share their blocks."""
    _needs_xfs()
    image = workdir / "volumes.xfs"
    with image.open("wb") as file:
        file.truncate(512 << 20)
    subprocess.run(["mkfs.xfs", "-q", "-m", "reflink=1", image], check=True, capture_output=True)
    # The loop device goes with the mount.
    cli = elsewhere.begin(f"mount -t xfs -o loop {image}").cli
    cli("volume", "create", "data", "--size", "256M").ok()
    _debugfs(elsewhere.file("data"), f"write {_payload(workdir, 32)} kept")
    os.sync()
    before = os.statvfs(elsewhere.place)
    copied = cli("volume", "cp", "data", "copy", "-o", "json").ok().json
    assert copied["copied"] == "reflink" and copied["copied_bytes"] is None, copied
    assert cli("volume", "cp", "data", "again").ok().text == "again (reflink)\n"
    os.sync()
    after = os.statvfs(elsewhere.place)
    taken = (before.f_bfree - after.f_bfree) * after.f_frsize
    assert taken < 8 << 20, f"two copies of 32 MiB took {taken} bytes"
    for name in ("copy", "again"):
        assert elsewhere.file(name).read_bytes() == elsewhere.file("data").read_bytes()
    # Each is its own from here on.
    _debugfs(elsewhere.file("copy"), "rm kept")
    assert elsewhere.file("again").read_bytes() == elsewhere.file("data").read_bytes()
    assert ("volume.ready", "server", "copied by reflink") in _told(cli, "copy")
    cli("volume", "check", "copy").ok()
    cli("volume", "rm", "data", "copy", "again").ok()
    assert elsewhere.files() == set()
    image.unlink()


def test_a_full_disk(elsewhere: Elsewhere, workdir: Path) -> None:
    """Whatever was asked for is refused, saying what is free; what is there stays as it is, and the records say so."""
    cli = elsewhere.begin("mount -t tmpfs -o size=64m none").cli
    cli("volume", "create", "data", "--size", "128M").ok()
    file = elsewhere.file("data")
    # A sparse copy: what was a hole is one.
    copied = cli("volume", "cp", "data", "copy", "-o", "json").ok().json
    assert copied["copied"] == "sparse" and copied["copied_bytes"] < 32 << 20, copied
    assert "(sparse copy, " in cli("volume", "cp", "data", "third").ok().text
    sizes = [(one.stat().st_size, one.stat().st_blocks) for one in (file, elsewhere.file("copy"))]
    assert sizes[0][0] == sizes[1][0] == 128 << 20 and sizes[1][1] <= sizes[0][1], sizes
    cli("volume", "rm", "copy", "third").ok()
    _debugfs(file, f"write {_payload(workdir, 40)} kept")
    before = file.read_bytes()

    def unchanged(*others: str) -> None:
        assert elsewhere.files() == {file.name, *others}
        (one,) = cli("volume", "ls", "-o", "json").ok().json
        assert (one["name"], one["size_mib"], one["state"]) == ("data", 128, "ready"), one
        assert cli("host", "-o", "json").ok().json["budgets"]["disk_mib"]["used"] == used

    used = cli("host", "-o", "json").ok().json["budgets"]["disk_mib"]["used"]
    cli("volume", "cp", "data", "copy").fails(1, "no room in", "MiB free", "nothing was left behind")
    unchanged()
    filler = elsewhere.place / "filler"
    with filler.open("wb") as full, contextlib.suppress(OSError):
        while True:
            full.write(bytes(1 << 16))
    cli("volume", "create", "other", "--size", "64M").fails(1, "volume other", "no room in", "0 MiB free")
    unchanged("filler")
    # It writes nothing into it.
    cli("volume", "resize", "data", "--size", "192M").ok()
    filler.unlink()
    with file.open("rb") as grown:
        assert grown.read(len(before)) == before and not any(grown.read())
    gone = [message for kind, _, message in _told(cli, "other") if kind == "volume.gone"]
    assert len(gone) == 1 and "no room in" in gone[0], gone
    assert ("volume.ready", "server", "resized to 192 MiB") in _told(cli, "data")
    # Nothing is the worse for it.
    cli("volume", "check", "data").ok()
    cli("volume", "create", "other", "--size", "64M").ok()
    cli("volume", "rm", "data", "other").ok()
    assert elsewhere.files() == set()


def test_a_file_system_that_takes_a_repair(server: Server, workdir: Path) -> None:
    """Its VM does not start and says what to do, which helps; a file system without a superblock is repaired too."""
    cli = server.cli
    cli("volume", "create", "hurt", "--size", "256M").ok()
    path = server.state_dir / "volumes" / f"{_volume(cli, 'hurt')['id']}.ext4"
    _debugfs(path, f"write {_payload(workdir, 2)} kept")
    content = (workdir / "payload").read_bytes()
    assert cli("volume", "check", "hurt").ok().text == "hurt: nothing was wrong\n"
    # Its root directory is gone, and nobody unmounted it.
    _debugfs(path, "clri <2>", "set_super_value state 0")
    cli("volume", "check", "hurt").fails(
        1, "more repair", "clawpot volume cp hurt hurt-damaged", "clawpot volume check hurt --repair"
    )
    assert _volume(cli, "hurt")["unclean"]
    cli("create", "--name", "patient", "--volume", "hurt:/data", "debian").ok()
    until(lambda: cli.inspect("patient")["phase"] == "failed", seconds=60, what="its failure")
    assert "clawpot volume check hurt --repair" in str(cli.inspect("patient")["failure"]), cli.inspect("patient")
    cli("volume", "check", "hurt", "--repair").fails(1, "VM patient has it and is not stopped")
    cli("stop", "patient").ok()
    cli("volume", "cp", "hurt", "hurt-damaged").ok()
    done = cli("volume", "check", "hurt", "--repair", "-o", "json").ok().json
    assert "lost+found" in done["outcome"] and not done["unclean"], done
    cli("start", "patient").ok()
    found = cli.sh("patient", "cat '/data/lost+found/#12' | sha256sum").ok().text.split()[0]
    assert found == hashlib.sha256(content).hexdigest()
    cli("rm", "patient").ok()
    kinds = [(kind, actor) for kind, actor, _ in _told(cli, "hurt")]
    asked = [kind for kind, actor in kinds if actor == "uid=0"]
    assert asked == ["volume.create", *["volume.check"] * 3], kinds

    cli("volume", "rm", "hurt").ok()
    damaged = server.state_dir / "volumes" / f"{_volume(cli, 'hurt-damaged')['id']}.ext4"
    with damaged.open("r+b") as file:
        file.write(bytes(4096))
    cli("volume", "check", "hurt-damaged").fails(1, "Bad magic number", "--repair")
    cli("volume", "check", "hurt-damaged", "--repair").ok()
    assert cli("volume", "check", "hurt-damaged").ok().text == "hurt-damaged: nothing was wrong\n"
    cli("volume", "rm", "hurt-damaged").ok()
    assert ("volume.delete", "uid=0") in [(kind, actor) for kind, actor, _ in _told(cli, "hurt-damaged")]
