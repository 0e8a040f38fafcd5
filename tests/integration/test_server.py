"""The server itself: side by side, going, coming back to a damaged store, being watched; and every way it may not start."""

import contextlib
import http.client
import json
import os
import re
import shutil
import socket
import sqlite3
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from harness import images
from harness.api import Api
from harness.cli import binaries
from harness.server import ASSETS, VMM, Server
from harness.tools import run, until


class _Scrape(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("metrics.invalid", timeout=60)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(60)
        self.sock.connect(str(self._path))


def test_metrics(server: Server, vm: str) -> None:
    del vm
    scrape = _Scrape(server.metrics_socket)
    scrape.request("GET", "/metrics")
    answer = scrape.getresponse()
    text = answer.read().decode()
    assert answer.status == 200
    assert re.search(r'^clawpot_vms\{[^}]*phase="running"[^}]*\} [1-9]', text, re.MULTILINE), text
    assert text.rstrip().endswith("# EOF")
    ids = [vm["id"] for vm in server.cli.ls()]
    assert not [one for one in ids if one in text], "a VM's id is no label"


def test_health_and_reflection(server: Server) -> None:
    with Api(server.socket) as api:
        assert api.healthy("clawpot.v1.VmService")
        names = api.services()
        assert {"clawpot.v1.VmService", "clawpot.v1.EventService", "clawpot.v1.HostService"} <= set(names)
        assert api.call("HostService", "GetHost").vmm in ("qemu", "firecracker")


def test_host_tells_which_vmm_and_why(server: Server) -> None:
    host = server.cli("host", "-o", "json").ok().json
    assert host["vmm"] in ("qemu", "firecracker") and host["vmm_reason"] and host["vmm_version"]
    assert host["instance"] == server.traces.instance
    assert host["capacity"]["cpus"] == os.cpu_count()
    (image,) = [image for image in server.cli("image", "ls", "-o", "json").ok().json if image["name"] == "debian"]
    assert image["digest"].startswith("sha256:")


def test_sockets_are_for_root_and_the_group(server: Server) -> None:
    for path in (server.socket, server.metrics_socket):
        assert stat.S_IMODE(path.stat().st_mode) == 0o660, path
    assert stat.S_IMODE(server.state_dir.stat().st_mode) & 0o007 == 0


def test_who_got_in_is_asked_all_the_same(make_server: Callable[..., Server]) -> None:
    """A socket whose mode somebody widened lets nobody in who is not meant; what tells nothing is answered."""
    with tempfile.TemporaryDirectory(dir="/tmp") as place:
        server = make_server("doors", "--warm-slots", "0")
        server.socket = server.cli.socket = Path(place, "api.sock")
        server.start()
        Path(place).chmod(0o755)
        server.socket.chmod(0o666)
        clawpot = Path(shutil.copy(binaries() / "clawpot", place))
        nobody = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", clawpot, "--socket", server.socket]

        def refused(*words: str) -> str:
            done = subprocess.run([*nobody, *words], capture_output=True, text=True, check=False, timeout=60)
            assert done.returncode == 1, done
            return done.stderr

        assert "uid=65534 may not" in refused("ls") and "sudo" in refused("create", "debian")
        assert server.cli.ls() == []
        server.socket.chmod(0o660)
        assert "may not open this socket" in refused("ls")


@pytest.fixture(scope="module")
def second(session_server: Callable[..., Server]) -> Server:
    return session_server("second", "--vmm", VMM, "--on-stop", "drain").start()


def test_two_servers_side_by_side(server: Server, second: Server, vm: str) -> None:
    second.cli("create", "--wait", "--name", vm, "debian").ok()
    one, other = server.cli.inspect(vm), second.cli.inspect(vm)
    assert one["id"] != other["id"] and one["address"] != other["address"]
    assert server.traces.instance != second.traces.instance
    uids = [
        {Path(f"/proc/{pid}/status").read_text().split("Uid:")[1].split()[0] for pid in which.vmm_pids(at["id"])}
        for which, at in ((server, one), (second, other))
    ]
    assert uids[0] and uids[1] and not uids[0] & uids[1]
    assert second.cli.sh(vm, "echo second").ok().text == "second\n"
    assert server.cli.sh(vm, "echo first").ok().text == "first\n"
    # A restart of one touches nothing of the other's.
    server.stop()
    server.start()
    assert second.cli.sh(vm, "echo second").ok().text == "second\n"


def test_drain_stops_the_vms_first(second: Server, vm: str) -> None:
    if not second.cli.ls():
        second.cli("create", "--wait", "--name", vm, "debian").ok()
    vm_id = second.cli.inspect(vm)["id"]
    second.cli.sh(vm, "echo drained > /root/drained").ok()
    assert second.stop() == 0
    assert not second.vmm_pids(vm_id)
    second.start()
    assert second.cli.inspect(vm)["phase"] == "stopped"


def test_what_stays_for_stopped_vms_can_be_taken_away(make_server: Callable[..., Server]) -> None:
    """As `make uninstall` does: refused while a server or a VM runs, and the next server starts the VM as it was."""
    server = make_server("clear").start()
    server.cli("create", "--wait", "--name", "left", "debian").ok()
    server.cli.sh("left", "echo kept >/root/kept; sync").ok()
    refused = server.refuses("clear-host")
    assert refused.returncode == 1 and "in use by another server" in refused.stderr, refused.stderr
    server.stop()
    refused = server.refuses("clear-host")
    assert refused.returncode == 1 and "is in use" in refused.stderr, refused.stderr
    server.start()
    assert server.cli.sh("left", "cat /root/kept").ok().text == "kept\n"
    server.cli("stop", "left").ok()
    server.stop()

    def left() -> list[str]:
        return [thing for thing in server.traces.now() if not thing.startswith("file ")]

    assert left(), "the server leaves the resolver and prepared slots, or this shows nothing"
    for _ in range(2):
        cleared = server.refuses("clear-host")
        assert cleared.returncode == 0, cleared.stderr
        # Of the resolver the kernel may still be taking leave.
        until(lambda: not left(), what="nothing of it")
    server.start()
    server.cli("start", "left").ok()
    assert server.cli.sh("left", "cat /root/kept").ok().text == "kept\n"


def test_a_record_that_cannot_be_read_is_quarantined(second: Server, vm: str) -> None:
    """Shown, never touched, and `rm --force` is the way out."""
    if not second.cli.ls():
        second.cli("create", "--name", vm, "debian").ok()
        second.cli("stop", vm).ok()
    vm_id = second.cli.inspect(vm)["id"]
    disk = next(second.state_dir.glob(f"disks/{vm_id}*"))
    second.stop()
    second.edit('UPDATE kv SET value = \'{"version": 1, "id": 7\' WHERE key = ?', f"vms/{vm_id}")
    second.start()
    (shown,) = second.cli.ls()
    assert (shown["id"], shown["phase"]) == (vm_id, "quarantined")
    assert "cannot be read" in shown["failure"]["message"] or "not readable" in shown["failure"]["message"], shown
    for verb in ("stop", "start", "rm"):
        second.cli(verb, vm_id).fails(1, "quarantined")
    second.cli("exec", vm_id, "--", "true").fails(125, "quarantined")
    assert disk.exists()
    second.cli("rm", "--force", vm_id).ok()
    assert second.cli.ls() == []
    assert not [name for name in second.traces.now() if vm_id in name]
    # Its name and its slot are free again.
    second.cli("create", "--name", vm, "debian").ok()
    second.cli("rm", vm).ok()


def test_records_and_stores_of_a_newer_version_are_refused(second: Server) -> None:
    second.cli("create", "--name", "newer", "debian").ok()
    vm_id = second.cli.inspect("newer")["id"]
    second.stop()
    key = f"vms/{vm_id}"
    second.edit("UPDATE kv SET value = json_set(value, '$.version', 99) WHERE key = ?", key)
    refused = second.refuses()
    assert refused.returncode == 1 and vm_id in refused.stderr and "99" in refused.stderr, refused.stderr
    assert "newer" in refused.stderr
    second.edit("UPDATE kv SET value = json_set(value, '$.version', 1) WHERE key = ?", key)
    with sqlite3.connect(second.state_dir / "state.db") as store:
        (version,) = store.execute("PRAGMA user_version").fetchone()
        store.execute("PRAGMA user_version = 99")
    store.close()
    refused = second.refuses()
    assert refused.returncode == 1 and "newer server" in refused.stderr and "99" in refused.stderr, refused.stderr
    with sqlite3.connect(second.state_dir / "state.db") as store:
        store.execute(f"PRAGMA user_version = {version}")
    store.close()
    second.start()
    second.cli("rm", "newer").ok()


def test_backup(second: Server, workdir: Path) -> None:
    copy = workdir / "backup.db"
    run(*second.command("backup", copy))
    with sqlite3.connect(copy) as store:
        assert store.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert store.execute("SELECT count(*) FROM kv").fetchone()[0] >= 0
    store.close()
    again = second.refuses("backup", copy)
    assert again.returncode == 1 and "is there already" in again.stderr, again.stderr


# Each way in which a server may not start: at once, with a word on what is wrong and what helps, and with nothing left.


def _refused(server: Server, *words: str, more: tuple[object, ...] = (), before: tuple[str, ...] = ()) -> None:
    done = server.refuses(*more, before=before)
    said = done.stderr + done.stdout
    assert done.returncode not in (0, 101) and "panicked" not in said, said
    missing = [word for word in words if word.lower() not in said.lower()]
    assert not missing, f"it lacks {missing}: {said}"


def _in_mounts(script: str) -> tuple[str, ...]:
    """Words before a command that runs after `script`, in a mount namespace of its own."""
    return ("unshare", "--mount", "--propagation", "private", "sh", "-ec", f'{script}; exec "$@"', "sh")


def test_a_state_directory_in_use(server: Server, make_server: Callable[..., Server]) -> None:
    other = make_server("intruder")
    other.state_dir = server.state_dir
    try:
        other.socket = other.metrics_socket.with_name("intruder.sock")
        _refused(other, "in use by another server", f"pid {server.pid}", str(server.state_dir))
        assert server.cli("ls").code == 0
    finally:
        # It is not its own to sweep.
        other.state_dir = server.state_dir.with_name("intruder")
        other.traces.state_dir = other.state_dir


def test_a_state_directory_that_cannot_be_written(make_server: Callable[..., Server]) -> None:
    server = make_server("readonly")
    server.state_dir.mkdir()
    script = f"mount -t tmpfs -o ro,size=1m none {server.state_dir}"
    _refused(server, "state directory", "not writable", "read-only", before=_in_mounts(script))


def test_a_full_disk_at_the_start(make_server: Callable[..., Server]) -> None:
    server = make_server("full")
    server.state_dir.mkdir()
    script = f"mount -t tmpfs -o size=64k none {server.state_dir}; head -c 100000 /dev/zero > {server.state_dir}/filler || true"
    _refused(server, "no space", str(server.state_dir), before=_in_mounts(script))


def test_no_root(make_server: Callable[..., Server], tmp_path: Path) -> None:
    server = make_server("noroot")
    # The tree may be where only root may look.
    shutil.copy(binaries() / "clawpot-server", tmp_path / "clawpot-server")
    for part in (tmp_path, *tmp_path.parents):
        if part.owner() == "root" and part != Path("/") and part.parts[:2] == ("/", "tmp") and part != Path("/tmp"):
            part.chmod(0o755)
    state = tmp_path / "state"
    state.mkdir()
    os.chown(state, 65534, 65534)
    words = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", str(tmp_path / "clawpot-server")]
    options = ["--state-dir", str(state), "--image-dir", str(ASSETS), "--socket", str(state / "api.sock")]
    done = server.world.run("sh", "-c", '"$@" 2>&1; echo "exit $?"', "sh", *words, *options)
    assert "root" in done and "exit 0" not in done and "panicked" not in done, done


def test_no_tun(make_server: Callable[..., Server]) -> None:
    """The server answers, as it may have other VMs to look after; a new one fails and says why."""
    server = make_server("notun", "--vmm", "qemu", "--warm-slots", "0")
    server.start(before=_in_mounts("mount -t tmpfs none /dev/net"))
    server.cli("create", "--wait", "--name", "notun", "debian").fails(1, "/dev/net/tun")
    server.cli("rm", "notun").ok()
    server.stop()


def test_no_qemu(make_server: Callable[..., Server]) -> None:
    server = make_server("noqemu", "--vmm", "qemu")
    _refused(server, "qemu", "/nowhere/qemu", "install", more=("--qemu", "/nowhere/qemu"))


def test_another_file_system_for_images(make_server: Callable[..., Server]) -> None:
    """Files are hard-linked into jails, which cannot be done there."""
    server = make_server("elsewhere", "--vmm", "qemu")
    server.state_dir.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=64m", "none", server.state_dir)
    try:
        server.start()
        server.cli("create", "--wait", "--disk", "64M", "--name", "elsewhere", "debian").fails(1, "file system", str(ASSETS))
        server.cli("rm", "elsewhere").ok()
        server.stop()
    finally:
        server.close()
        run("umount", "-l", server.state_dir, check=False)


def test_no_such_image_directory(make_server: Callable[..., Server]) -> None:
    server = make_server("noimages", "--vmm", VMM, image_dir=Path("/nowhere/images"))
    server.start()
    server.cli("create", "debian").fails(1, "/nowhere/images", "--image-dir")
    server.stop()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--vmm", "xen"), ("xen",)),
        (("--default-vcpus", "33"), ("33", "1 to 32")),
        (("--default-memory-mib", "1"), ("64",)),
        (("--group", "no-such-group"), ("no-such-group",)),
        (("--no-such-option",), ("no-such-option",)),
    ],
    ids=lambda value: value[0].strip("-") if isinstance(value, tuple) else None,
)
def test_settings(make_server: Callable[..., Server], options: tuple[str, ...], words: tuple[str, ...]) -> None:
    server = make_server("settings")
    _refused(server, *words, more=options)


def test_an_unknown_key_in_the_settings_file(make_server: Callable[..., Server], tmp_path: Path) -> None:
    server = make_server("file")
    file = tmp_path / "server.toml"
    file.write_text('statedir = "/x"\n')
    _refused(server, "statedir", str(file), more=("--config", str(file)))


@pytest.fixture
def small(make_server: Callable[..., Server], workdir: Path) -> Iterator[Server]:
    """State and images on a filesystem of 96 MiB of their own, whose VMs cannot boot: they cost nothing."""
    base = workdir / "small"
    base.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=96m,mode=755", "none", base)
    store = base / "images"
    (store / "blobs/sha256").mkdir(parents=True)
    (store / "manifests").mkdir()
    shutil.copy(ASSETS / "boot.json", store / "boot.json")
    images.set_boot_file(store, "kernel", Path("/bin/true").read_bytes())
    images.set_boot_file(store, "initramfs", images.cpio({}))
    _tiny_image(store)
    # Disks of 4 GiB are promised though there is not a tenth of one; how much must stay free is each test's to say.
    promised = ("--disk-percent", "10000", "--low-disk-percent", "0")
    server = make_server("small/state", "--vmm", VMM, *promised, image_dir=store)
    yield server
    server.close()
    run("umount", "-l", base)
    base.rmdir()


def _tiny_image(store: Path) -> None:
    manifest = json.loads((ASSETS / "manifests/debian.json").read_text())
    manifest["rootfs"] |= images.blob(store, b"\0" * 4096)
    data = (json.dumps(manifest, indent=2, sort_keys=True) + "\n").encode()
    images.blob(store, data)
    (store / "manifests/tiny.json").write_bytes(data)


def test_a_disk_that_fills_up(small: Server) -> None:
    """A create says so and leaves nothing; what is there can still be deleted; with room again all is as before."""
    small.start()
    small.cli("create", "--name", "early", "tiny").ok()
    until(lambda: small.cli.inspect("early")["phase"] == "failed", what="its end")
    filler = small.state_dir.parent / "filler"
    with filler.open("wb", buffering=0) as file:

        def full() -> bool:
            """And nothing was freed since the last time: what the server makes in the background fails now, and goes."""
            before = file.tell()
            for size in (1 << 20, 4096, 1):
                with contextlib.suppress(OSError):
                    while file.write(b"\0" * size):
                        pass
            return file.tell() == before

        until(full, every=0.5, what="the disk full")
    made = small.cli("create", "--wait", "--name", "late", "tiny")
    made.fails(1, "full", "free some space")
    small.cli("rm", "early").ok()
    filler.unlink()
    if [vm for vm in small.cli.ls() if vm["name"] == "late"]:
        small.cli("rm", "late").ok()
    assert small.cli.ls() == []
    # The server looks every 2 s whether there is room again.
    until(lambda: small.cli("create", "--name", "later", "tiny").code == 0, what="room", every=0.5)
    small.cli("rm", "later").ok()


def test_a_disk_that_is_nearly_full(small: Server) -> None:
    """Under the watermark nothing is created or started, long before records have no room; and everything can be deleted."""
    small.options += ["--warm-slots", "0"]
    small.options[small.options.index("--low-disk-percent") + 1] = "10"
    small.start()
    small.cli("create", "--name", "early", "tiny").ok()
    until(lambda: small.cli.inspect("early")["phase"] == "failed", what="its end")
    low = small.cli("host", "-o", "json").ok().json["budgets"]["low_disk_mib"]
    filler = small.state_dir.parent / "filler"
    with filler.open("wb") as file:

        def low_now() -> bool:
            """And has been since the last time: what the server makes in the background may take some of it, or go."""
            free = os.statvfs(small.state_dir)
            more = free.f_bavail * free.f_frsize - ((low - 2) << 20)
            if more > 0:
                with contextlib.suppress(OSError):
                    os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, more)
            return more <= 0

        until(low_now, every=0.5, what="little room")
    small.cli("create", "--name", "late", "tiny").fails(1, f"under the watermark of {low} MiB", "low_disk_percent")
    small.cli("start", "early").fails(1, "VM early: start: disk:", f"watermark of {low} MiB")
    assert [vm["name"] for vm in small.cli.ls()] == ["early"]
    small.cli("rm", "early").ok()
    filler.unlink()
    small.cli("create", "--name", "later", "tiny").ok()
    small.cli("rm", "later").ok()
