"""What a VMM that its guest has taken over could do: the process is looked at from outside, and its user tries the doors."""

import contextlib
import json
import os
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest

from harness.server import Server

pytestmark = pytest.mark.firecracker
#: Devices by major and minor number: null, urandom, tun, kvm.
DEVICES = {(1, 3): "null", (1, 9): "urandom", (10, 200): "tun", (10, 232): "kvm"}
#: What the kernel calls descriptors that lead to no file.
ANONYMOUS = ("[eventfd]", "[eventpoll]", "[signalfd]", "[timerfd]", "kvm-vm", "kvm-vcpu:")
#: The first slot's uid and the count of all slots' (`clawpot doctor` sees to it that nobody else has them).
FIRST_UID = 1_900_000_000
UIDS = 32 * 1024
CONTROLLERS = ("memory", "pids", "cpu")


def _jail(server: Server, vm: str) -> Path:
    found = server.cli.inspect(vm)
    (directory,) = server.state_dir.glob(f"jail/*/{found['id']}-{found['incarnation']}")
    return directory


def _pid(server: Server, vm: str) -> int:
    (pid,) = server.vmm_pids(server.cli.inspect(vm)["id"])
    return pid


def _proc(server: Server, vm: str) -> Path:
    return Path("/proc") / str(_pid(server, vm))


def _status(path: Path) -> dict[str, str]:
    lines = [line.split(":\t", 1) for line in (path / "status").read_text().splitlines() if ":\t" in line]
    return {words[0]: words[1].strip() for words in lines}


def _threads(proc: Path) -> list[dict[str, str]]:
    """What is known of each; those that QEMU has for its disks come and go."""
    found = []
    for thread in (proc / "task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found.append(_status(thread))
    return found


def _vmm(server: Server, vm: str) -> str:
    return str(server.cli.inspect(vm)["vmm"])


def _static(program: Path) -> bool:
    """An ELF file without an interpreter: program headers of type 3 name one."""
    data = program.read_bytes()
    start, size, count = (int.from_bytes(data[at : at + width], "little") for at, width in ((32, 8), (54, 2), (56, 2)))
    return all(int.from_bytes(data[start + n * size :][:4], "little") != 3 for n in range(count))


def test_it_is_nobody_and_may_become_nobody_else(server: Server, vm: str, sibling: str) -> None:
    seen = set()
    for name in (vm, sibling):
        for status in _threads(_proc(server, name)):
            uids, gids = status["Uid"].split(), status["Gid"].split()
            assert len({*uids, *gids}) == 1 and FIRST_UID <= int(uids[0]) < FIRST_UID + UIDS, status
            assert status["Groups"] == "", status["Groups"]
            for kind in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
                assert int(status[kind], 16) == 0, f"{kind} {status[kind]}"
            # What the jailer keeps in the bounding set a process without new privileges cannot get.
            assert int(status["CapBnd"], 16) == 0 or _vmm(server, name) == "firecracker", status["CapBnd"]
            assert status["NoNewPrivs"] == "1"
        seen.add(uids[0])
    assert len(seen) == 2, "two VMs share a user"


def test_every_thread_has_a_seccomp_filter(server: Server, vm: str) -> None:
    if _vmm(server, vm) == "firecracker" and not _static(server.state_dir / "firecracker/firecracker"):
        pytest.skip("this Firecracker is no official (static) build: it carries no seccomp filter")
    threads = _threads(_proc(server, vm))
    modes = {(thread["Name"], thread["Seccomp"]) for thread in threads}
    assert threads and {mode for _, mode in modes} == {"2"}, modes


def test_where_it_stands_and_what_it_holds_open(server: Server, vm: str) -> None:
    proc, jail = _proc(server, vm), _jail(server, vm)
    vmm = _vmm(server, vm)
    # Firecracker's root is its jail; QEMU only stands in it.
    here = proc / ("root" if vmm == "firecracker" else "cwd")
    assert os.path.samestat(os.stat(here), os.stat(jail / "root"))
    files = {os.stat(jail / "root" / name).st_ino: name for name in ("kernel", "initramfs", "rootfs", "disk")}
    console = os.stat(jail / "console").st_ino
    found: dict[str, list[str]] = {}
    for fd in (proc / "fd").iterdir():
        # The server's questions come over connections that come and go.
        with contextlib.suppress(FileNotFoundError):
            what = _kind(fd, files, console, _unix_sockets(server, proc))
            assert what, f"descriptor {fd.name}: {os.readlink(fd)}"
            found.setdefault(what, []).append(fd.name)
    # What it must have, so that an empty list proves nothing.
    assert {"console", "disk", "rootfs", "tun"} <= set(found), found
    assert len(found["tun"]) == (2 if vmm == "qemu" else 1)
    modes = {what: {_flags(proc, fd) & os.O_ACCMODE for fd in found[what]} for what in ("rootfs", "disk")}
    assert modes == {"rootfs": {os.O_RDONLY}, "disk": {os.O_RDWR}}


def _flags(proc: Path, fd: str) -> int:
    line = (proc / "fdinfo" / fd).read_text().splitlines()[1]
    return int(line.removeprefix("flags:"), 8)


def _kind(fd: Path, files: dict[int, str], console: int, sockets: set[int]) -> str | None:
    """What an open descriptor is; nothing when it is none of those that a VMM may have."""
    target, found = os.readlink(fd), fd.stat()
    if stat.S_ISCHR(found.st_mode):
        return DEVICES.get((os.major(found.st_rdev), os.minor(found.st_rdev)))
    if stat.S_ISREG(found.st_mode):
        return files.get(found.st_ino)
    if stat.S_ISFIFO(found.st_mode):
        return "console" if found.st_ino == console else None
    if stat.S_ISSOCK(found.st_mode):
        return "socket" if found.st_ino in sockets else None
    return "anonymous" if target.removeprefix("anon_inode:").startswith(ANONYMOUS) else None


def _unix_sockets(server: Server, proc: Path) -> set[int]:
    """Inodes of the Unix sockets of its network namespace and of the server's, which made one for QEMU."""
    server_proc = Path("/proc") / str(server.pid)
    lines = [line for one in (proc, server_proc) for line in (one / "net/unix").read_text().splitlines()[1:]]
    return {int(line.split()[6]) for line in lines}


def test_its_network_and_its_limits(server: Server, vm: str) -> None:
    proc, found = _proc(server, vm), server.cli.inspect(vm)
    named = {os.stat(f"/run/netns/{name}").st_ino for name in server.traces.netns_names()}
    own = os.stat(proc / "ns/net").st_ino
    assert own in named and own != os.stat("/proc/self/ns/net").st_ino != os.stat(f"/proc/{server.pid}/ns/net").st_ino
    limits = {line[:25].strip(): line[25:].split()[:2] for line in (proc / "limits").read_text().splitlines()}
    assert limits["Max core file size"] == ["0", "0"], "a guest's memory could be written to disk"
    assert int(limits["Max open files"][1]) <= 2048
    # Its disk is as large as it will ever be, and it can write into no other file.
    disk = str((_jail(server, vm) / "root/disk").stat().st_size)
    assert limits["Max file size"] == [disk, disk]
    group = f"clawpot/{server.traces.instance}/{found['id']}-{found['incarnation']}"
    lines = [line.split(":", 2) for line in (proc / "cgroup").read_text().splitlines()]
    assert [path.endswith(group) for number, _, path in lines if number == "0"] == [True]


def _limit(controller: str, group: str) -> Path | None:
    """The group's directory where this controller limits, in either version; nothing where the host lacks it."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    for _, point, kind, options, *_ in mounts:
        if kind == "cgroup" and controller in options.split(","):
            return Path(point, group)
    for _, point, kind, *_ in mounts:
        if kind == "cgroup2" and controller in Path(point, group, "cgroup.controllers").read_text().split():
            return Path(point, group)
    return None


@pytest.mark.parametrize("controller", CONTROLLERS)
def test_its_group_limits_it(server: Server, vm: str, controller: str) -> None:
    found = server.cli.inspect(vm)
    group = _limit(controller, f"clawpot/{server.traces.instance}/{found['id']}-{found['incarnation']}")
    if group is None:
        pytest.skip(f"this host has no cgroup controller {controller}")
    # It is in there, in version 1 too.
    assert str(_pid(server, vm)) in (group / "cgroup.procs").read_text().split()

    def first(*names: str) -> int:
        (text,) = [(group / name).read_text() for name in names if (group / name).exists()]
        return int(text.split()[0])

    if controller == "memory":
        memory = int(found["memory_mib"]) << 20
        limit = first("memory.max", "memory.limit_in_bytes")
        assert memory < limit < 2 * memory + (1 << 30)
        for name, want in {"memory.swap.max": 0, "memory.swappiness": 0, "memory.memsw.limit_in_bytes": limit}.items():
            assert not (group / name).exists() or first(name) == want, name
    elif controller == "pids":
        assert 1 <= first("pids.max") <= 256
    else:
        assert 100_000 <= first("cpu.max", "cpu.cfs_quota_us") <= 100_000 * (1 + int(found["vcpus"]))


def _own_memory(server: Server, vm: str) -> float:
    """What is resident of its VMM beside the guest's memory, MiB."""
    mappings: list[tuple[str, dict[str, int]]] = []
    for line in (_proc(server, vm) / "smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            mappings.append((words[1], {}))
        elif words[-1] == "kB":
            mappings[-1][1][words[0]] = int(words[1])
    guest = int(server.cli.inspect(vm)["memory_mib"]) << 10
    # A VMM keeps it in one mapping, and only QEMU has another that is as large.
    large = [told for rights, told in mappings if rights.startswith("rw-") and told["Size:"] >= guest]
    assert large, f"no mapping of {guest} KiB"
    memory = min(large, key=lambda told: told["Size:"])
    # The kernel may show a piece of the VMM's heap as one with it: no more than the guest's is taken off.
    return (sum(told["Rss:"] for _, told in mappings) - min(memory["Rss:"], guest)) / 1024


def test_what_it_takes_beside_its_guest_is_no_more_than_what_is_counted(server: Server, vm: str) -> None:
    """Admission counts it (crates/core/src/admission.rs): a host full of VMs must not be out of memory by what is not."""

    def counted() -> int:
        return int(server.cli("host", "-o", "json").ok().json["budgets"]["vmm_memory_mib"])

    each = int(server.cli("host", "-o", "json").ok().json["budgets"]["vmm_memory_each_mib"])
    _stays_within(server, vm, each)
    before = counted()
    server.cli("create", "--wait", "--name", "pair", "--cpus", "2", "--memory", "256MiB", "debian").ok()
    _stays_within(server, "pair", counted() - before)
    server.cli("rm", "--force", "pair").ok()


def _stays_within(server: Server, name: str, budget: int) -> None:
    idle = _own_memory(server, name)
    # Disk, processors and the way of output, all at once.
    busy = "head -c 8m /dev/urandom >/root/busy; sync; md5sum /root/busy; cat /root/busy"
    work = f"for n in $(seq $(nproc)); do ({busy}) & done; wait; rm /root/busy"
    assert len(server.cli.sh(name, work, timeout=120).ok().stdout) > 8 << 20
    at_work = _own_memory(server, name)
    print(f"{_vmm(server, name)} of {name}: {idle:.1f} MiB idle, {at_work:.1f} at work, {budget} counted")
    assert idle > 0 and at_work <= budget, f"{idle:.1f} MiB, then {at_work:.1f}; {budget} are counted"


#: Tries each door and prints what came of it: "open", or the error's name.
DOORS = r"""
import errno, json, os, socket, sys
def read(path): os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK))
def write(path): os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
def make(path): os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)); os.unlink(path)
def listing(path): os.listdir(path)
def connect(path):
    at = os.open(os.path.dirname(path), os.O_PATH)  # a socket's name may have 107 bytes
    with socket.socket(socket.AF_UNIX) as s: s.connect(f"/proc/self/fd/{at}/{os.path.basename(path)}")
def signal(pid): os.kill(int(pid), 0)
def link(path): os.readlink(path)
found = {}
for door in sys.argv[1:]:
    kind, target = door.split(" ", 1)
    try:
        globals()[kind](target)
        found[door] = "open"
    except OSError as error:
        found[door] = errno.errorcode.get(error.errno, str(error))
print(json.dumps(found))
"""


def _try(doors: list[str], uid: int | None, cwd: Path) -> dict[str, str]:
    words = ["/usr/bin/python3", "-c", DOORS, *doors]
    if uid is not None:
        ids = [f"--reuid={uid}", f"--regid={uid}", "--clear-groups"]
        words = ["setpriv", *ids, "--no-new-privs", "--inh-caps=-all", "--bounding-set=-all", *words]
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_its_user_reaches_no_other_vm_and_not_the_server(server: Server, vm: str, sibling: str) -> None:
    """What it holds open is its own; everything else is behind a directory or a right that it lacks."""
    own, other = _jail(server, vm), _jail(server, sibling)
    uid = int(_status(_proc(server, vm))["Uid"].split()[0])
    neighbour, found = _pid(server, sibling), server.cli.inspect(sibling)
    (log,) = server.state_dir.glob(f"logs/{found['id']}/console.log")
    doors = [
        *[f"listing {path}" for path in (other, other / "root", own, server.state_dir / "disks", log.parent)],
        *[f"read {path}" for path in (other / "root/disk", other / "root/rootfs", other / "machine.json", log)],
        *[f"read {path}" for path in (own / "machine.json", server.state_dir / "state.db", f"/proc/{neighbour}/mem")],
        *[f"write {path}" for path in (other / "root/disk", own / "console", other / "console", own / "root/rootfs")],
        *[f"make {path}" for path in (own / "root/new", other / "root/new", "/run/netns/new", "new")],
        *[f"connect {path}" for path in (server.socket, server.metrics_socket, other / "v.sock", other / "root/api.sock")],
        *[f"signal {pid}" for pid in (neighbour, server.pid, 1)],
        *[f"link /proc/{pid}/{name}" for pid in (neighbour, server.pid) for name in ("cwd", "root", "fd/0")],
        *[f"read /proc/{pid}/{name}" for pid in (neighbour, server.pid) for name in ("ns/net", "environ", "maps")],
    ]
    # With the right to, each of them opens: none is shut only because nothing is there.
    shut = {door: came for door, came in _try(doors, None, own / "root").items() if came != "open"}
    assert not shut, shut
    tried = _try(doors, uid, own / "root")
    assert not [door for door, came in tried.items() if came not in ("EACCES", "EPERM")], tried
    # Of its own directory it reaches what it was given, and can add nothing.
    assert _try(["read disk", "write disk", "read rootfs", "write rootfs", "write kernel"], uid, own / "root") == {
        "read disk": "open",
        "write disk": "open",
        "read rootfs": "open",
        "write rootfs": "EACCES",
        "write kernel": "EACCES",
    }
