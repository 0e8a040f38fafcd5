"""One VM from launch to destroy: what is known of it is in `vms/ID/vm.json`, all that it has is in `vms/ID`."""

import contextlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from . import accel, golden, host, qemu, ssh
from .errors import LabError

#: QEMU's own memory beside the guest's, mostly translated code.
OVERHEAD_MIB = 384
#: Less is left and a VM's first writes would fail.
DISK_MIB = 1024
#: A guest that was told to power off; an emulated systemd takes five to twenty.
POWEROFF_SECONDS = 90.0


@dataclass
class Record:
    """What outlives a command. Written whole, by rename."""

    id: str
    #: Why it is there: `dev` or `ci`.
    kind: str
    golden: str
    profile: str
    cpus: int
    memory_mib: int
    #: The tree it belongs to, or the build.
    belongs_to: str
    offline: bool = False
    #: A file that the VM sees as its second disk, read-only; none when empty.
    payload: str = ""
    created: float = 0.0
    #: Who ends it at the latest when they end: pid and start time; none for a VM that stays.
    owner: tuple[int, int] | None = None
    #: Of the latest start.
    pid: int = 0
    started: int = 0
    port: int = 0
    accel: dict[str, Any] = field(default_factory=dict)
    kvm_inside: bool = False
    ready_seconds: float = 0.0
    version: int = 1


class Machine:
    def __init__(self, directory: Path, record: Record) -> None:
        self.directory = directory
        self.record = record

    @property
    def name(self) -> str:
        return f"clawpot-{self.record.kind}-{self.record.id}"

    @property
    def disk(self) -> Path:
        return self.directory / "disk.qcow2"

    @property
    def console(self) -> Path:
        return self.directory / "console.log"

    @classmethod
    def open(cls, state: Path, id: str) -> "Machine | None":
        """The VM of that id; nothing when there is none. What cannot be read is an error, not an absence."""
        directory = state / "vms" / id
        try:
            told = json.loads((directory / "vm.json").read_text())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise LabError(
                f"{directory}/vm.json cannot be read: {error}", "run it as the user that launched the VM, or with sudo"
            ) from None
        if told.get("version") != 1:
            raise LabError(f"{directory}/vm.json is of another version", "use the devvm that made it, or remove it by hand")
        told["owner"] = tuple(told["owner"]) if told["owner"] else None
        return cls(directory, Record(**told))

    @classmethod
    def create(cls, state: Path, record: Record) -> "Machine":
        """Disk, key and record of a VM that has never run."""
        host.need_disk(state, DISK_MIB, "a VM's disk")
        directory = host.make_directory(state / "vms" / record.id)
        record.created = time.time()
        machine = cls(directory, record)
        try:
            # First of all, so that whatever is made after this is found again.
            machine.save()
            golden.overlay(Path(record.golden), machine.disk)
            host.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", machine.name, "-f", directory / "key")
            host.give_to_caller(*directory.iterdir())
        except BaseException:
            shutil.rmtree(directory)
            raise
        return machine

    def save(self) -> None:
        half = self.directory / ".vm.json"
        half.write_text(json.dumps(asdict(self.record), indent=1) + "\n")
        host.give_to_caller(half)
        half.rename(self.directory / "vm.json")

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """One change at a time; the record is read anew."""
        with golden.lock(self.directory / "lock"):
            fresh = Machine.open(self.directory.parent.parent, self.record.id)
            if fresh is None:
                raise LabError("the VM was destroyed meanwhile")
            self.record = fresh.record
            yield

    def process(self) -> qemu.Process | None:
        """Its QEMU, if it runs."""
        if self.record.pid:
            known = qemu.Process(self.record.pid, self.record.started, self.name)
            if known.alive():
                return known
        return qemu.from_pid_file(self.directory, self.name)

    def running(self) -> bool:
        return self.process() is not None

    def start(self, say: Callable[[str], None]) -> qemu.Ready:
        with self.locked():
            if self.running():
                raise LabError("the VM is running already")
            image = Path(self.record.golden)
            if not (image / "golden.json").exists():
                raise LabError(f"its golden image {image} is gone", "destroy this VM and launch another")
            how = accel.choose(image / "vmlinux", self.directory.parent.parent / "accel.json")
            host.need_memory(self.record.memory_mib + OVERHEAD_MIB, f"a VM of {self.record.memory_mib} MiB")
            if self.record.cpus == 0:
                self.record.cpus = how.default_cpus()
            begun = time.monotonic()
            process: qemu.Process | None = None
            try:
                spec, process = self._spawn(how)
                say(f"booting under {how.words}")
                ready = qemu.wait_ready(spec, process)
                (self.directory / "known_hosts").write_text(f"{self.name} {ready.host_key}\n")
                host.give_to_caller(*self.directory.iterdir())
                ssh.wait(self)
            except BaseException:
                # A signal may have come as it was up, and not yet known here.
                if left := process or self.process():
                    left.kill()
                raise
            self.record.kvm_inside = ready.kvm
            self.record.ready_seconds = round(time.monotonic() - begun, 1)
            self.save()
            return ready

    def _spawn(self, how: accel.Accel) -> tuple[qemu.Spec, qemu.Process]:
        for attempt in range(5):
            port = qemu.free_port()
            spec = qemu.Spec(
                name=self.name,
                directory=self.directory,
                golden=Path(self.record.golden),
                disk=self.disk,
                cpus=self.record.cpus,
                memory_mib=self.record.memory_mib,
                accel=how,
                port=port,
                public_key=(self.directory / "key.pub").read_text().strip().rsplit(" ", 1)[0],
                offline=self.record.offline,
                payload=Path(self.record.payload) if self.record.payload else None,
            )
            try:
                process = qemu.spawn(spec)
            except qemu.PortTaken:
                if attempt == 4:
                    raise
                continue
            self.record.port, self.record.pid, self.record.started = port, process.pid, process.started
            self.record.accel = asdict(how)
            self.save()
            return spec, process
        raise AssertionError("unreachable")

    def stop(self, seconds: float = POWEROFF_SECONDS) -> None:
        """Powers it off in order; by force when it does not obey in time."""
        with self.locked():
            process = self.process()
            if process is None:
                raise LabError("the VM is not running")
            if not ssh.power_off(self):
                qemu.qmp(self.directory, "system_powerdown")
            if not process.wait(seconds):
                self._end(process)
            ssh.forget(self)

    def _end(self, process: qemu.Process) -> None:
        qemu.qmp(self.directory, "quit")
        if not process.wait(qemu.QUIT_SECONDS):
            process.kill()

    def destroy(self) -> None:
        """Nothing of it stays but the golden image."""
        with self.locked():
            ssh.forget(self)
            process = self.process()
            if process is not None:
                self._end(process)
            if (left := self.process()) is not None:
                raise LabError(
                    f"its QEMU (pid {left.pid}) does not end", "run the same as the user that started it, or with sudo"
                )
            shutil.rmtree(self.directory)

    def disk_mib(self) -> int:
        return self.disk.stat().st_blocks * 512 >> 20


def new_id() -> str:
    return secrets.token_hex(6)


def all_machines(state: Path) -> list[Machine]:
    found = []
    for path in sorted((state / "vms").glob("*/vm.json")):
        machine = Machine.open(state, path.parent.name)
        if machine:
            found.append(machine)
    return found


def me() -> tuple[int, int]:
    return os.getpid(), qemu.start_time(os.getpid()) or 0
