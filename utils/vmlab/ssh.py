"""The way into a VM: commands, terminals and files over ssh."""

import os
import shlex
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from . import host
from .errors import LabError

if TYPE_CHECKING:
    from .machine import Machine

#: Where the tree is in the VM.
INSIDE = "/work/clawpot"
#: Never synchronised unless asked for: made again inside, or no business of the VM's.
NOT_SYNCED = ("/.git", "/.devvm", "/target", "/assets", "__pycache__/", ".venv/", ".work/", ".pytest_cache/", "*.pyc")
#: sshd answers within a second of the boot marker; an emulated one under load within ten.
CONNECT_SECONDS = 60.0
#: The shared connection is a process of this machine.
ANSWER_SECONDS = 20.0


def options(machine: "Machine", multiplexed: bool = True) -> list[str]:
    directory = machine.directory
    found = [
        *("-F", "/dev/null", "-i", str(directory / "key"), "-o", "IdentitiesOnly=yes", "-o", "BatchMode=yes"),
        *("-o", f"UserKnownHostsFile={quoted(directory / 'known_hosts')}", "-o", "StrictHostKeyChecking=yes"),
        *("-o", f"HostKeyAlias={machine.name}", "-o", "GlobalKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR"),
        *("-o", "ServerAliveInterval=30", "-o", "ServerAliveCountMax=20", "-o", f"ConnectTimeout={CONNECT_SECONDS:.0f}"),
        # Emulated processors are quickest with these.
        *("-o", "KexAlgorithms=curve25519-sha256", "-o", "Ciphers=chacha20-poly1305@openssh.com,aes128-gcm@openssh.com"),
        *("-p", str(machine.record.port)),
    ]
    if multiplexed and len(str(directory)) < 80:
        found += ["-o", f"ControlPath={quoted(directory / 'ctl')}"]
    return found


def quoted(path: Path) -> str:
    """For an option of ssh, in which spaces separate and per cent signs stand for something."""
    return '"' + str(path).replace("%", "%%") + '"'


def ssh(machine: "Machine", *words: str, multiplexed: bool = True) -> list[str]:
    return [host.tool("ssh") or "ssh", *options(machine, multiplexed), *words]


def connect(machine: "Machine") -> None:
    """One connection that the commands after it share: a handshake with an emulated machine costs a second or two.

    It ends by itself after ten idle minutes, and with the VM. Without it commands still work, each with its own handshake.
    """
    if len(str(machine.directory)) >= 80:
        return
    target = "root@127.0.0.1"
    if not quietly(ssh(machine, "-O", "check", target), ANSWER_SECONDS):
        (machine.directory / "ctl").unlink(missing_ok=True)
        quietly(ssh(machine, "-M", "-N", "-f", "-o", "ControlPersist=600", target), CONNECT_SECONDS + 30)


def quietly(words: Sequence[str], seconds: float) -> bool:
    """Whether it did what it should, in time."""
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    try:
        done = subprocess.run(words, check=False, start_new_session=True, timeout=seconds, **quiet)  # type: ignore[call-overload]
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def forget(machine: "Machine") -> None:
    """Ends the shared connection. One that does not answer ends with the VM."""
    if (machine.directory / "ctl").exists():
        quietly(ssh(machine, "-O", "exit", "root@127.0.0.1"), ANSWER_SECONDS)
        (machine.directory / "ctl").unlink(missing_ok=True)


def wait(machine: "Machine", seconds: float = CONNECT_SECONDS) -> None:
    """Returns when a command runs inside."""
    deadline = time.monotonic() + seconds
    while True:
        words = ssh(machine, "root@127.0.0.1", "true", multiplexed=False)
        done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return
        if time.monotonic() > deadline:
            raise LabError(f"no ssh to the VM within {seconds:g} s: {done.stderr.strip()[-400:]}", "utils/devvm logs")
        time.sleep(0.5)


def power_off(machine: "Machine") -> bool:
    words = ssh(machine, "root@127.0.0.1", "systemctl poweroff --no-block")
    try:
        done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=30)
    except subprocess.TimeoutExpired:
        return False
    # The connection may break before the answer comes.
    return done.returncode in (0, 255)


def login_shell(command: str) -> str:
    # Without `exec`: a command that a signal ends gives 128 + its number, where ssh itself would say 255.
    return f"bash -lc {shlex.quote(command)}; exit $?"


def run(machine: "Machine", command: str, **how: object) -> int:
    """The command's exit status; stdin, stdout and stderr are the caller's. A signal gives 128 + its number, as in a shell."""
    connect(machine)
    terminal = ["-t"] if os.isatty(0) and os.isatty(1) else []
    done = subprocess.run(ssh(machine, *terminal, "root@127.0.0.1", login_shell(command)), check=False, **how)  # type: ignore[call-overload]
    return done.returncode if done.returncode >= 0 else 128 - done.returncode


def output(machine: "Machine", command: str, seconds: float = 300) -> str:
    connect(machine)
    return host.run(*ssh(machine, "root@127.0.0.1", login_shell(command)), seconds=seconds)


def interactive(machine: "Machine") -> list[str]:
    """The command to become."""
    return ssh(machine, "-t", "root@127.0.0.1", f"cd {INSIDE} 2>/dev/null; exec bash -l")


def rsync(machine: "Machine", words: Sequence[str]) -> None:
    connect(machine)
    shell = shlex.join(ssh(machine))
    command = [host.tool("rsync") or "rsync", "-e", shell, *words]
    done = subprocess.run(command, check=False, stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        raise LabError(f"rsync failed with status {done.returncode}", "utils/devvm logs shows whether the VM is well")


def sync(machine: "Machine", tree: Path, extra: Sequence[Path], verbose: bool = False) -> None:
    """The tree, and what of the excluded is asked for. What the VM made itself under excluded names stays."""
    host.need_tools(["rsync", "ssh"])
    output(machine, f"mkdir -p {INSIDE}")
    told = ["--info=stats1"] if verbose else []
    # Times and modes, not owners: inside all is root's.
    common = ["-rlptDS", *told]
    excludes = [f"--exclude={pattern}" for pattern in NOT_SYNCED]
    rsync(machine, [*common, "--delete", *excludes, f"{tree}/", f"root@127.0.0.1:{INSIDE}/"])
    for path in extra:
        inside_tree = relative(path, tree)
        if not (tree / inside_tree).exists():
            raise LabError(f"sync --with: {path} does not exist", "name a file or directory of this tree")
        # The name after "/./" is kept: target/debug/clawpot stays at its place.
        rsync(machine, [*common, "-H", "--relative", f"{tree}/./{inside_tree}", f"root@127.0.0.1:{INSIDE}/"])


def relative(path: Path, tree: Path) -> Path:
    full = path if path.is_absolute() else tree / path
    try:
        return full.relative_to(tree)
    except ValueError:
        raise LabError(f"sync --with: {path} is not in {tree}", "only what is in the tree has a place in the VM") from None


def copy_out(machine: "Machine", inside: str, to: Path) -> None:
    host.make_directory(to)
    rsync(machine, ["-rltS", f"root@127.0.0.1:{inside.rstrip('/')}/", f"{to}/"])


def copy_in(machine: "Machine", source: Path, inside: str) -> None:
    rsync(machine, ["-rlptDS", str(source), f"root@127.0.0.1:{inside}"])
