"""Whether guests run on hardware here. /dev/kvm's existence proves nothing: a kernel is booted on it."""

import contextlib
import json
import os
import select
import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from . import host

#: A kernel on working KVM prints its first line within half a second, on a loaded machine within two. Hosts whose /dev/kvm is
#: of no use took 13 to 42; the Firecracker lane judges by the same.
PROBE_SECONDS = 5.0
KVM = Path("/dev/kvm")


@dataclass(frozen=True)
class Accel:
    """How VMs run here, and how that was found out."""

    name: str
    why: str
    #: Whether /dev/kvm will exist inside.
    nested: bool

    @property
    def words(self) -> str:
        if self.name == "kvm":
            return f"KVM ({self.why})"
        return f"TCG, with AMD SVM emulated ({self.why})"

    def qemu(self) -> list[str]:
        if self.name == "kvm":
            return ["-accel", "kvm", "-cpu", "host"]
        # Nested paging is what makes emulated SVM fast enough; 512 MiB keep translated code of two levels of guests.
        return ["-accel", "tcg,thread=multi,tb-size=512", "-cpu", "EPYC,+svm,+npt"]

    def default_cpus(self) -> int:
        # Emulated processors that wait for each other cost more than the second one brings.
        return max(2, os.cpu_count() or 2) if self.name == "kvm" else 1


def choose(kernel: Path, cache: Path) -> Accel:
    """Asks once per boot of this machine. CLAWPOT_VM_ACCEL=kvm or tcg decides without asking."""
    forced = os.environ.get("CLAWPOT_VM_ACCEL")
    if forced in ("kvm", "tcg"):
        return Accel(forced, "as CLAWPOT_VM_ACCEL says", forced == "tcg" or nested_kvm())
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        kept = json.loads(cache.read_text())
        if kept.pop("asked") == asked():
            return Accel(**kept)
    found = probe(kernel)
    cache.write_text(json.dumps({"asked": asked(), **asdict(found)}))
    host.give_to_caller(cache)
    return found


def asked() -> str:
    """When and for whom: another boot has another kernel, another user other rights."""
    return f"{host.boot_id()} uid {os.geteuid()}"


def nested_kvm() -> bool:
    for vendor in ("intel", "amd"):
        with contextlib.suppress(OSError):
            if Path(f"/sys/module/kvm_{vendor}/parameters/nested").read_text().strip() in ("1", "Y"):
                return True
    return False


def probe(kernel: Path, seconds: float = PROBE_SECONDS) -> Accel:
    if not KVM.exists():
        return Accel("tcg", "no /dev/kvm here", True)
    if not os.access(KVM, os.R_OK | os.W_OK):
        return Accel("tcg", "this user may not open /dev/kvm", True)
    said = boots(kernel, seconds)
    if said:
        return Accel("tcg", f"/dev/kvm is here, but {said}", True)
    nested = nested_kvm()
    return Accel("kvm", "a kernel boots on it" + ("" if nested else "; nested is off, so no /dev/kvm inside"), nested)


def boots(kernel: Path, seconds: float) -> str:
    """Why a kernel does not boot on KVM; nothing when it does."""
    command = [host.tool("qemu-system-x86_64") or "qemu-system-x86_64", "-accel", "kvm", "-cpu", "host", "-m", "256"]
    command += ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio", "-kernel", str(kernel)]
    command += ["-append", "console=ttyS0 earlyprintk=ttyS0 panic=-1"]
    silence = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    deadline = time.monotonic() + seconds
    said = b""
    with subprocess.Popen(command, **silence) as process:  # type: ignore[call-overload]
        try:
            while (left := deadline - time.monotonic()) > 0:
                if not select.select([process.stdout], [], [], left)[0]:
                    break
                chunk = os.read(process.stdout.fileno(), 65536)
                said += chunk
                if b"Linux version" in said:
                    return ""
                if not chunk:
                    last = said.decode(errors="replace").strip().splitlines()[-1:] or ["nothing"]
                    return f"QEMU ended on it, saying: {last[0][:200]}"
        finally:
            process.kill()
    return f"a kernel booted on it printed nothing within {seconds:g} s"
