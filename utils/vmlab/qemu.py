"""One QEMU process: how it is started, known again, and ended."""

import contextlib
import json
import os
import re
import select
import signal
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from . import host
from .accel import Accel
from .errors import LabError
from .recipe import script_library

#: What clawpot-vm-ready prints when sshd answers. To the line's end: it comes a few bytes at a time, and half a key is no key.
MARKER = re.compile(rb"clawpot-vm: ready golden=(\S+) kvm=(\S+) uptime=(\S+) hostkey=(\S+)[\r\n]")
#: From QEMU's start to the marker, seconds. Emulated, an idle machine takes 30; a loaded one has been seen to take 100.
BOOT_SECONDS = {"kvm": 120.0, "tcg": 480.0}
#: Until QEMU has set up its machine and gone into the background.
START_SECONDS = 60.0
#: QEMU of a VM that has been told to quit has only files to close.
QUIT_SECONDS = 10.0
#: One that was killed has its memory to give back, and writes under way to wait for.
KILL_SECONDS = 60.0


@dataclass(frozen=True)
class Spec:
    """What one start of a VM is made of."""

    #: In QEMU's command line, so that the process is known again: unique per VM.
    name: str
    #: Holds console, QMP socket and pid file.
    directory: Path
    golden: Path
    disk: Path
    cpus: int
    memory_mib: int
    accel: Accel
    #: On 127.0.0.1, leading to the guest's sshd; None for a machine that nobody visits.
    port: int | None = None
    public_key: str = ""
    #: The guest reaches nothing but what is forwarded to it.
    offline: bool = False
    #: Its second disk, read-only: the quick way in for much data, as no emulated processor has to decipher it.
    payload: Path | None = None

    @property
    def console(self) -> Path:
        return self.directory / "console.log"

    def command(self) -> list[str]:
        kernel = "console=ttyS0 net.ifnames=0 panic=-1 quiet systemd.show_status=0 mitigations=off "
        # An emulated clock is late under load, and the kernel would take it for broken.
        kernel += f"tsc=reliable clawpot.name={self.name} clawpot.key={self.public_key.replace(' ', ':')}"
        network = f"user,id=net,restrict={'on' if self.offline else 'off'}"
        if self.port is not None:
            network += f",hostfwd=tcp:127.0.0.1:{self.port}-10.0.2.15:22"
        more: list[str] = []
        if self.payload:
            more += ["-drive", f"file={comma(self.payload)},if=none,id=payload,format=raw,readonly=on"]
            more += ["-device", "virtio-blk-pci,drive=payload"]
        return [
            *("qemu-system-x86_64", "-name", f"guest={self.name}", "-machine", "pc", *self.accel.qemu()),
            *("-smp", str(self.cpus), "-m", str(self.memory_mib)),
            *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-rtc", "base=utc"),
            *("-kernel", str(self.golden / "vmlinux"), "-initrd", str(self.golden / "initrd"), "-append", kernel),
            *("-drive", f"file={comma(self.disk)},if=none,id=disk,format=qcow2,cache=writeback,discard=unmap"),
            *("-device", "virtio-blk-pci,drive=disk", *more, "-device", "virtio-rng-pci"),
            *("-netdev", network, "-device", "virtio-net-pci,netdev=net,romfile="),
            *("-chardev", f"file,id=console,path={comma(self.console)}", "-serial", "chardev:console"),
            *("-qmp", f"unix:{comma(self.directory / 'qmp')},server=on,wait=off"),
            *("-pidfile", str(self.directory / "qemu.pid"), "-daemonize"),
        ]


def comma(path: Path) -> str:
    """A comma separates QEMU's options; doubled it is a comma."""
    return str(path).replace(",", ",,")


class PortTaken(LabError):
    """Someone else was faster; another port will do."""


def spawn(spec: Spec) -> "Process":
    """QEMU in the background; an error with its own words when it does not start."""
    script_library()
    from signals import held

    if len(str(spec.directory / "qmp")) > 100:
        raise LabError(f"{spec.directory}: too long a path for a socket", "set CLAWPOT_VM_DIR to a shorter one")
    if spec.console.exists():
        spec.console.rename(spec.directory / "console.log.1")
    command = spec.command()
    command[0] = host.tool(command[0]) or command[0]
    with (spec.directory / "qemu.log").open("wb") as log:
        process: subprocess.Popen[bytes] | None = None
        try:
            with held():
                # The daemon keeps this as its standard error: no pipe that a caller would wait on.
                process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
            code = process.wait(START_SECONDS)
        except BaseException as why:
            if process is not None:
                abandon(spec, process)
            if isinstance(why, subprocess.TimeoutExpired):
                raise LabError(f"QEMU did not start within {START_SECONDS:g} s", f"see {log.name}") from None
            raise
    said = host.tail(spec.directory / "qemu.log", 5)
    if code != 0:
        kind = PortTaken if "host forwarding rule" in said else LabError
        raise kind(f"QEMU did not start (status {code}): {said}")
    pid = int((spec.directory / "qemu.pid").read_text())
    return Process.of(pid, spec.name)


def abandon(spec: Spec, process: subprocess.Popen[bytes]) -> None:
    """Ends a QEMU on its way into the background: the daemon would come up after us, and nobody know of it."""
    # It writes its pid before it lets go of the process that we started.
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(QUIT_SECONDS)
    process.kill()
    process.wait()
    if left := from_pid_file(spec.directory, spec.name):
        left.kill()


def start_time(pid: int) -> int | None:
    """Clock ticks from the machine's boot to the process's start: with the pid it names a process for good."""
    found = _stat(pid)
    return None if found is None or found[0] in "ZX" else found[1]


def _stat(pid: int) -> tuple[str, int] | None:
    """State and start time; also of one that has ended and that nobody waited for yet."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat[stat.rindex(")") + 2 :].split()
    return fields[0], int(fields[19])


@dataclass(frozen=True)
class Process:
    """A QEMU that was ours when we looked. Nothing is ever sent to a pid alone."""

    pid: int
    started: int
    name: str

    @classmethod
    def of(cls, pid: int, name: str) -> "Process":
        return cls(pid, start_time(pid) or 0, name)

    def alive(self) -> bool:
        return start_time(self.pid) == self.started and self._is_ours()

    def _is_ours(self) -> bool:
        return f"guest={self.name}".encode() in self._words()

    def _words(self) -> list[bytes]:
        """Its command line: none of a process that is gone, or on its way there."""
        try:
            said = Path(f"/proc/{self.pid}/cmdline").read_bytes()
        except OSError:
            return []
        return said.split(b"\0") if said else []

    def wait(self, seconds: float) -> bool:
        """Whether it ended in time, to its last thread: its command line is gone before its port and its disk are free."""
        try:
            handle = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return True
        try:
            # Looked at after it was opened: the descriptor is that process's, or of another that is no matter of ours.
            found = _stat(self.pid)
            if found is None or found[1] != self.started:
                return True
            poll = select.poll()
            poll.register(handle, select.POLLIN)
            return bool(poll.poll(seconds * 1000))
        finally:
            os.close(handle)

    def kill(self) -> None:
        """By a descriptor, so that the pid cannot become another's between the check and the signal."""
        try:
            handle = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return
        try:
            if self.alive():
                try:
                    signal.pidfd_send_signal(handle, signal.SIGKILL)
                except ProcessLookupError:
                    pass
                except PermissionError:
                    # Another user's stays; the caller looks again and says so.
                    return
            elif self._words():
                return
        finally:
            os.close(handle)
        self.wait(KILL_SECONDS)


def from_pid_file(directory: Path, name: str) -> Process | None:
    """A QEMU of whose start nothing more was written down."""
    try:
        pid = int((directory / "qemu.pid").read_text())
    except (OSError, ValueError):
        return None
    found = Process.of(pid, name)
    return found if found.alive() else None


def qmp(directory: Path, execute: str, seconds: float = 5) -> bool:
    """One command to QEMU itself. False when it does not answer: it may just have ended."""
    try:
        with socket.socket(socket.AF_UNIX) as link:
            link.settimeout(seconds)
            link.connect(str(directory / "qmp"))
            lines = link.makefile("rwb")
            lines.readline()
            for word in ("qmp_capabilities", execute):
                lines.write(json.dumps({"execute": word}).encode() + b"\n")
                lines.flush()
                lines.readline()
    except OSError:
        return False
    return True


@dataclass(frozen=True)
class Ready:
    """What the boot marker told."""

    golden: str
    kvm: bool
    uptime: float
    host_key: str


def wait_ready(spec: Spec, process: Process, seconds: float | None = None) -> Ready:
    """Waits for the boot marker; the error shows the console's end."""
    limit = BOOT_SECONDS[spec.accel.name] if seconds is None else seconds
    deadline = time.monotonic() + limit
    while True:
        # In this order: a machine that printed its marker and ended has been ready.
        alive = process.alive()
        with contextlib.suppress(FileNotFoundError):
            found = MARKER.search(spec.console.read_bytes())
            if found:
                golden, kvm, uptime, key = (word.decode() for word in found.groups())
                return Ready(golden, kvm == "yes", float(uptime), key.replace(":", " "))
        if not alive:
            raise LabError(f"the VM ended before it was ready; its console:\n{console_tail(spec)}")
        if time.monotonic() > deadline:
            raise LabError(f"the VM was not ready within {limit:g} s; its console:\n{console_tail(spec)}")
        time.sleep(0.2)


def console_tail(spec: Spec) -> str:
    said = host.tail(spec.console) or "(it said nothing)"
    # What emulation lacks is listed at every start, and is never the reason.
    told = host.tail(spec.directory / "qemu.log", 40).splitlines()
    qemu = [line for line in told if "TCG doesn't support requested feature" not in line]
    return "\n".join(f"  | {line}" for line in [*said.splitlines(), *(f"qemu: {line}" for line in qemu)])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
