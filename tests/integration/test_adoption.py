"""What a server finds when it comes up: an older server's VMs, processes that only look its own, strays, strangers' things."""

import hashlib
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import LIVING
from harness.server import ASSETS, Server
from harness.tools import run, until

#: A store as server 0.1 wrote it: tables of version 2, records of version 1. Never edit it.
OLD_STORE = Path(__file__).with_name("fixtures") / "store-2-records-1.sql"


def _old_store(path: Path) -> sqlite3.Connection:
    """Of VMs of the image that is here: what another machine packed has another digest."""
    image = hashlib.sha256((ASSETS / "manifests/debian.json").read_bytes()).hexdigest()
    store = sqlite3.connect(path)
    store.executescript(re.sub(r"sha256:[0-9a-f]{64}", f"sha256:{image}", OLD_STORE.read_text(encoding="utf-8")))
    return store


def _old_record(name: str) -> dict[str, Any]:
    store = _old_store(Path(":memory:"))
    rows = [json.loads(value) for (value,) in store.execute("SELECT value FROM kv WHERE key LIKE 'vms/%'")]
    store.close()
    (record,) = [row for row in rows if row["name"] == name]
    return record


def _record(server: Server, vm_id: str) -> dict[str, Any]:
    with sqlite3.connect(server.state_dir / "state.db") as store:
        (value,) = store.execute("SELECT value FROM kv WHERE key = ?", (f"vms/{vm_id}",)).fetchone()
    store.close()
    return json.loads(value)


def test_a_store_of_an_older_server(make_server: Callable[..., Server]) -> None:
    """Opened, every VM shown as what it is, events readable; and what the old one refused to write is written now."""
    server = make_server("older", "--vmm", "qemu", "--warm-slots", "0")
    server.state_dir.mkdir(parents=True)
    store = _old_store(server.state_dir / "state.db")
    assert store.execute("PRAGMA user_version").fetchone() == (2,)
    store.close()
    server.start()
    before = server.traces.now()

    def rested() -> bool:
        phases = {vm["name"]: vm["phase"] for vm in server.cli.ls()}
        assert phases.keys() == {"runs", "rests", "broke"} and phases["broke"] == "failed", phases
        return phases["runs"] == phases["rests"] == "stopped"

    # The host was booted since: what ran then comes to rest.
    until(rested, what="the rest of the VM of a boot that is over")
    assert server.cli.inspect("runs")["labels"] == {"team": "blue"}
    assert "generation 2" in server.cli("events", "-o", "json").ok().text
    # Its disk is not here; that is said, and no empty one is given to it.
    server.cli("start", "runs").fails(1, "disk")
    server.cli("rm", "runs", "rests", "broke").ok()
    assert not server.settle(before)


def test_an_older_servers_running_vm_is_adopted(server: Server, vm: str) -> None:
    """A VM that runs, in a record as the older server would have written it."""
    boot = server.cli.sh(vm, "cat /proc/sys/kernel/random/boot_id").ok().text
    vm_id = server.cli.inspect(vm)["id"]
    pids = server.vmm_pids(vm_id)
    server.kill9()
    old, now = _old_record("runs"), _record(server, vm_id)
    assert old["version"] < now["version"], "a fixture of this version proves nothing: add the next one"
    as_old = {field: old["version"] if field == "version" else now[field] for field in old}
    server.edit("UPDATE kv SET value = ? WHERE key = ?", json.dumps(as_old), f"vms/{vm_id}")
    server.start()
    assert server.cli.sh(vm, "cat /proc/sys/kernel/random/boot_id").ok().text == boot
    assert server.vmm_pids(vm_id) == pids
    # Written anew when it changes, not before: the older server could still be gone back to.
    assert _record(server, vm_id) == as_old


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """Somebody's process."""
    process = subprocess.Popen(["sleep", "1000"])
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def quick(session_server: Callable[..., Server]) -> Server:
    """Its VMs need not boot: they are adopted, or not, before that."""
    found = [server for server in LIVING if server.state_dir.name == "quick"]
    return found[0] if found else session_server("quick", "--vmm", "qemu", "--warm-slots", "0").start()


def _started(server: Server, vm_id: str) -> Path:
    """Who the VM's machine is, once that is written down; a process of it there may be before that."""
    return until(lambda: next(server.state_dir.glob(f"jail/*/{vm_id}-*/process.json"), None), what="its machine")


def _dies_unseen(server: Server) -> tuple[str, Path]:
    """A VM; the server is killed, then the VM's process. Its id, and its `process.json`."""
    server.cli("create", "--name", "unseen", "debian").ok()
    vm_id = server.cli.inspect("unseen")["id"]
    path = _started(server, vm_id)
    pids = server.vmm_pids(vm_id)
    assert pids, "it has ended by itself"
    server.kill9()
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    until(lambda: not server.vmm_pids(vm_id), what="the VMM's end")
    return vm_id, path


def _start_ticks(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


def test_a_recycled_pid_is_not_adopted(quick: Server, sleeper: subprocess.Popen[bytes]) -> None:
    """The number, the start time, even the program of the record are those of another process: it is no machine of ours."""
    _, path = _dies_unseen(quick)
    program = os.stat(f"/proc/{sleeper.pid}/exe")
    identity = json.loads(path.read_text())
    identity |= {"pid": sleeper.pid, "start_ticks": _start_ticks(sleeper.pid), "exe": [program.st_dev, program.st_ino]}
    path.write_text(json.dumps(identity))
    quick.start()
    quick.cli("wait", "--for", "failed", "--timeout", "60s", "unseen").ok()
    quick.cli("rm", "unseen").ok()
    assert sleeper.poll() is None


@pytest.mark.parametrize("ticks", [0, 1])
def test_a_stranger_in_a_machines_cgroup(quick: Server, sleeper: subprocess.Popen[bytes], ticks: int) -> None:
    """Not taken for the machine, not ended; that is for the VM's owner to say. Nor if it came by the machine's number."""
    vm_id, group = _intruded(quick, sleeper, ticks)
    quick.start()
    until(lambda: quick.cli.inspect("unseen")["phase"] == "quarantined", seconds=60, what="its quarantine")
    failure = quick.cli.inspect("unseen")["failure"]
    assert "another is in its cgroup" in failure["message"] and str(sleeper.pid) in failure["message"], failure
    assert "rm --force unseen" in failure["hint"], failure
    assert [vm["phase"] for vm in quick.cli.ls()] == ["quarantined"]
    assert "another is in its cgroup" in quick.cli("events", "unseen").ok().text
    quick.cli("rm", "unseen").fails(1, "another is in its cgroup")
    assert sleeper.poll() is None and (group / "cgroup.procs").read_text().split() == [str(sleeper.pid)]
    quick.cli("rm", "--force", "unseen").ok()
    assert sleeper.wait(60) == -signal.SIGKILL
    assert not [thing for thing in quick.traces.now() if vm_id in thing]


def test_a_stranger_leaves_a_machines_cgroup(quick: Server, sleeper: subprocess.Popen[bytes]) -> None:
    """What became of the machine is said then."""
    _, group = _intruded(quick, sleeper, 0)
    quick.start()
    until(lambda: quick.cli.inspect("unseen")["phase"] == "quarantined", seconds=60, what="its quarantine")
    (_top(group) / "cgroup.procs").write_text(str(sleeper.pid))
    until(lambda: quick.cli.inspect("unseen")["phase"] == "failed", seconds=60, what="the machine's end to be told")
    quick.cli("rm", "unseen").ok()
    assert sleeper.poll() is None


def _top(group: Path) -> Path:
    """A group in between that passes controllers on may hold no process."""
    return next(path for path in group.parents if path.is_mount())


def _move(pids: list[int], group: Path) -> None:
    for pid in pids:
        (group / "cgroup.procs").write_text(str(pid))


def test_a_vmm_moved_out_of_its_cgroup(server: Server, vm: str) -> None:
    """It has not ended, whatever its empty cgroup looks like: shown, untouched, and the same VM again once it is back."""
    boot = server.cli.sh(vm, "cat /proc/sys/kernel/random/boot_id").ok().text
    vm_id = server.cli.inspect(vm)["id"]
    (group,) = _groups(server, vm_id)
    pids = server.vmm_pids(vm_id)
    assert pids
    for restarted in (False, True):
        if restarted:
            server.kill9()
        _move(pids, _top(group))
        if restarted:
            server.start()
        until(lambda: server.cli.inspect(vm)["phase"] == "quarantined", what="its quarantine")
        failure = server.cli.inspect(vm)["failure"]
        assert str(pids[0]) in failure["message"] and "not in its cgroup" in failure["message"], failure
        server.cli("rm", vm).fails(1, "not in its cgroup")
        assert all(Path(f"/proc/{pid}/exe").exists() for pid in pids)
        _move(pids, group)
        until(lambda: server.cli.inspect(vm)["phase"] == "running", what="its release")
        assert server.cli.sh(vm, "cat /proc/sys/kernel/random/boot_id").ok().text == boot
    assert server.cli.inspect(vm)["incarnation"] == 1


def test_a_moved_vmm_is_ended_by_force(quick: Server) -> None:
    quick.cli("create", "--name", "moved", "debian").ok()
    vm_id = quick.cli.inspect("moved")["id"]
    _started(quick, vm_id)
    pids = quick.vmm_pids(vm_id)
    assert pids, "it has ended by itself"
    (group,) = _groups(quick, vm_id)
    _move(pids, _top(group))
    until(lambda: quick.cli.inspect("moved")["phase"] == "quarantined", what="its quarantine")
    quick.cli("rm", "--force", "moved").ok()
    until(lambda: not any(Path(f"/proc/{pid}/exe").exists() for pid in pids), what="the end of the VMM")
    assert not [thing for thing in quick.traces.now() if vm_id in thing]


def _groups(server: Server, vm_id: str) -> list[Path]:
    """Of the version that counts."""
    return [path for path in server.traces.cgroups() if vm_id in path.name and (path / "cgroup.events").exists()]


def _intruded(quick: Server, sleeper: subprocess.Popen[bytes], ticks: int) -> tuple[str, Path]:
    """A VM whose machine has died unseen, and the sleeper in its cgroup. Its id, and the cgroup."""
    vm_id, path = _dies_unseen(quick)
    if ticks:
        number = {"pid": sleeper.pid, "start_ticks": _start_ticks(sleeper.pid) - ticks}
        path.write_text(json.dumps(json.loads(path.read_text()) | number))
    (group,) = _groups(quick, vm_id)
    (group / "cgroup.procs").write_text(str(sleeper.pid))
    return vm_id, group


class _Strangers:
    """Things beside a server's that bear names much like its own, and everything of another server."""

    def __init__(self, server: Server, other: Server) -> None:
        self.netns = server.world.host
        self.server, self.other = server, other
        # The characters of an instance are `[a-z0-9]`; these are close to ours and nobody's.
        instance = server.traces.instance or ""
        self.near = instance[:-1] + ("a" if instance[-1] != "a" else "b")
        self.names = [f"cp{instance}x-1", f"cp{self.near}-1", f"xcp{instance}-1", f"cp{instance}-", f"cp{instance}-1x"]
        self.groups = [
            path
            for point in self._roots()
            for path in (point / f"clawpot/{self.near}/{'q' * 16}-1", point / f"stranger-{os.getpid()}")
        ]
        self.rules = (
            f"add table inet clawpot_{self.near}\n"
            f"add set inet clawpot_{self.near} s {{ type ipv4_addr; elements = {{ 10.201.0.1 }}; }}\n"
            "add table ip stranger\n"
            "add chain ip stranger forward { type filter hook forward priority 5; policy accept; }\n"
        )
        self.pid: subprocess.Popen[bytes] | None = None

    def _roots(self) -> list[Path]:
        mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
        return [Path(words[1]) for words in mounts if words[2] == "cgroup2"]

    def _host(self, *words: object, stdin: str | None = None) -> str:
        return self.server.world.run(*words, stdin=stdin)

    def make(self) -> None:
        for name in self.names:
            run("ip", "netns", "add", name)
        for number, name in enumerate(self.names):
            if len(name) < 16:
                self._host("ip", "tuntap", "add", name, "mode", "tap")
                self._host("ip", "link", "set", name, "alias", "clawpot used")
            self._host("ip", "tuntap", "add", f"stranger{number}", "mode", "tap")
        self._host("nft", "-f", "-", stdin=self.rules)
        for group in self.groups:
            group.mkdir(parents=True)
        self.pid = subprocess.Popen(["sleep", "1000"])
        (self.groups[0] / "cgroup.procs").write_text(str(self.pid.pid))

    def slots_of_mine(self) -> list[str]:
        """Network namespaces of the server itself."""
        return [name for name in self.server.traces.netns_names() if name not in self.names]

    def seen(self) -> dict[str, Any]:
        """All that must not change."""
        assert self.pid is not None
        rules = self._host("nft", "list", "table", "inet", f"clawpot_{self.near}") + self._host(
            "nft", "list", "table", "ip", "stranger"
        )
        names = self.names + [f"stranger{number}" for number in range(len(self.names))]
        links = [line for line in self._host("ip", "-o", "link").splitlines() if any(f": {name}:" in line for name in names)]
        return {
            "netns": [os.stat(f"/run/netns/{name}").st_ino for name in self.names],
            "links": links,
            "rules": rules,
            "groups": [group.is_dir() for group in self.groups],
            "process": self.pid.poll(),
            "group": Path(f"/proc/{self.pid.pid}/cgroup").read_text(),
            "other": self.other.traces.now(),
            "other's elements": sorted(self.other.traces.nft_elements()),
        }

    def remove(self) -> None:
        if self.pid is not None:
            self.pid.kill()
            self.pid.wait()
        for group in self.groups:
            until(lambda group=group: _removed(group), what=f"the end of {group}")
            if group.parent.name == self.near:
                group.parent.rmdir()
        for number, name in enumerate(self.names):
            run("ip", "netns", "del", name, check=False)
            self.server.world.run("ip", "link", "del", name, check=False)
            self.server.world.run("ip", "link", "del", f"stranger{number}", check=False)
        for table in (f"inet clawpot_{self.near}", "ip stranger"):
            self.server.world.run("nft", "delete", "table", *table.split(), check=False)


def _removed(group: Path) -> bool:
    try:
        group.rmdir()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def test_strays_are_reaped_and_strangers_are_not(server: Server, vm: str, make_server: Callable[..., Server]) -> None:
    """A store older than a VM: its machine and its slot go after the grace time, its disk stays, nobody else's is touched."""
    del vm
    mine = make_server("strays", "--vmm", "qemu", "--warm-slots", "0").start()
    strangers = _Strangers(mine, server)
    try:
        strangers.make()
        server.steady()
        before = strangers.seen()
        backup = mine.state_dir.with_name("strays-backup.db")
        run(*mine.command("backup", backup))
        mine.cli("create", "--name", "stray", "debian").ok()
        vm_id = mine.cli.inspect("stray")["id"]
        until(lambda: mine.vmm_pids(vm_id), what="its machine")
        mine.kill9()
        for old in mine.state_dir.glob("state.db*"):
            old.unlink()
        shutil.move(backup, mine.state_dir / "state.db")
        # For as long as this takes.
        mine.start("--stray-grace-secs", "3600")
        assert mine.cli.ls() == []
        # It was the wrong backup, and the server goes again: what the machine needs stays, as that of one with a record does.
        needed = {thing for thing in mine.traces.now() if thing.startswith(("process", "netns", "nft"))}
        assert mine.stop() == 0, mine.tail()
        assert mine.vmm_pids(vm_id), "it was ended within the grace time"
        assert needed <= set(mine.traces.now()), needed - set(mine.traces.now())
        mine.start("--stray-grace-secs", "3600")
        # Its slot is given to nobody meanwhile.
        mine.cli("create", "--name", "next", "debian").ok()
        assert mine.vmm_pids(vm_id), "it was ended within the grace time"
        mine.kill9()
        mine.start("--stray-grace-secs", "1")
        until(lambda: not mine.vmm_pids(vm_id), seconds=60, what="the stray machine's end")
        until(lambda: len(strangers.slots_of_mine()) == 1, seconds=60, what="the stray slot's end")
        mine.cli("rm", "next").ok()
        mine.cli("image", "ls").ok()
        until(lambda: not strangers.slots_of_mine(), what="the end of the last slot")
        left = {thing for thing in mine.traces.now() if thing.startswith(("cgroup", "netns", "link", "nft", "process"))}
        assert not [thing for thing in left if vm_id in thing], left
        # What was written on it may be all that there is of that VM.
        assert (mine.state_dir / f"disks/{vm_id}.ext4").exists()
        mine.stop()
        mine.start()
        mine.stop()
        # What another server does in the background comes and goes.
        until(lambda: strangers.seen()["other"] == before["other"], what="the other server at rest")
        assert strangers.seen() == before
    finally:
        strangers.remove()
