"""This machine: its programs, its room, and for whom we work on it."""

import contextlib
import os
import pwd
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path

from .errors import LabError, Lacking

REPO = Path(__file__).resolve().parents[2]
#: Programs that we call, and the Debian packages they are in.
PACKAGES = {
    "debugfs": "e2fsprogs",
    "e2fsck": "e2fsprogs",
    "lz4": "lz4",
    "mke2fs": "e2fsprogs",
    "mmdebstrap": "mmdebstrap",
    "qemu-img": "qemu-utils",
    "qemu-system-x86_64": "qemu-system-x86",
    "rsync": "rsync",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "sfdisk": "fdisk",
    "unshare": "util-linux",
}
#: Where a program may be although PATH of an ordinary user lacks it.
SBIN = ("/usr/local/sbin", "/usr/sbin", "/sbin")


def tool(name: str) -> str | None:
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", os.defpath), *SBIN]))


def need_tools(names: Iterable[str]) -> None:
    missing = [name for name in names if not tool(name)]
    if missing:
        packages = " ".join(sorted({PACKAGES[name] for name in missing}))
        raise Lacking(f"not installed here: {', '.join(missing)}", f"apt-get install --no-install-recommends {packages}")


def need_root(what: str) -> None:
    if os.geteuid() != 0:
        raise LabError(f"{what} needs root", "run the same with sudo")


def memory_available_mib() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) >> 10
    return 0


def disk_free_mib(path: Path) -> int:
    while not path.exists():
        path = path.parent
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize >> 20


def need_disk(path: Path, mib: int, what: str) -> None:
    free = disk_free_mib(path)
    if free < mib:
        raise Lacking(f"{what} needs {mib} MiB in {path}, and {free} MiB are free", "make room, or set CLAWPOT_VM_DIR")


def need_memory(mib: int, what: str) -> None:
    free = memory_available_mib()
    if free < mib:
        raise Lacking(
            f"{what} needs {mib} MiB of memory, and {free} MiB are available", "end something, or ask for --memory less"
        )


def caller() -> pwd.struct_passwd:
    """The person behind sudo: what is made for them belongs to them."""
    uid = os.getuid()
    if uid == 0 and os.environ.get("SUDO_UID", "0").isdigit():
        uid = int(os.environ.get("SUDO_UID", "0"))
    try:
        return pwd.getpwuid(uid)
    except KeyError:
        raise LabError(f"uid {uid} is in no passwd file", "set HOME and run as a user that is") from None


def state_root() -> Path:
    """Golden images and VMs of this user; the same with and without sudo."""
    named = os.environ.get("CLAWPOT_VM_DIR")
    if named:
        return Path(named).absolute()
    return Path(caller().pw_dir, ".cache", "clawpot", "vms")


def give_to_caller(*paths: Path) -> None:
    """What root made on someone's behalf."""
    if os.geteuid() != 0:
        return
    who = caller()
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            os.chown(path, who.pw_uid, who.pw_gid, follow_symlinks=False)


def make_directory(path: Path) -> Path:
    """`mkdir -p`, each new directory the caller's and nobody else's to read."""
    if not path.exists():
        make_directory(path.parent)
        path.mkdir(mode=0o700, exist_ok=True)
        give_to_caller(path)
    return path


def run(*words: object, seconds: float = 60, env: Mapping[str, str] | None = None, input: bytes | None = None) -> str:
    """A command's output; an error that names it and shows what it said when it fails or takes too long."""
    command = [str(word) for word in words]
    command[0] = tool(command[0]) or command[0]
    quiet = {"stdin": subprocess.DEVNULL} if input is None else {"input": input}
    try:
        done = subprocess.run(command, capture_output=True, timeout=seconds, check=False, env=env, **quiet)  # type: ignore[call-overload]
    except FileNotFoundError:
        raise Lacking(
            f"{command[0]} is not installed here", f"apt-get install {PACKAGES.get(command[0], command[0])}"
        ) from None
    except subprocess.TimeoutExpired:
        raise LabError(f"{Path(command[0]).name} did not end within {seconds:g} s: {' '.join(command)[:300]}") from None
    if done.returncode != 0:
        said = (done.stderr or done.stdout).decode(errors="replace").strip()[-2000:]
        raise LabError(f"{Path(command[0]).name} failed with status {done.returncode}: {said or 'it said nothing'}")
    return done.stdout.decode(errors="replace")


def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def tail(path: Path, lines: int = 25) -> str:
    """The end of a log, without what a terminal would obey."""
    try:
        text = path.read_bytes()[-65536:].decode(errors="replace")
    except OSError:
        return ""
    clean = "".join(c for c in text.replace("\r", "") if c.isprintable() or c in "\n\t")
    return "\n".join(clean.splitlines()[-lines:])
