"""The command line of utils/devvm."""

import argparse
import contextlib
import fcntl
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO

from . import accel, golden, host, qemu, recipe, sizes, ssh
from .errors import LabError
from .machine import Machine, Record, new_id

#: Exit codes of `status`: as `systemctl status` has them.
STOPPED, NO_VM = 3, 4
ID_FILE = host.REPO / ".devvm"
INTERRUPTED = 130


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def current() -> Machine | None:
    """This tree's VM, if there is one."""
    try:
        id = ID_FILE.read_text().strip()
    except FileNotFoundError:
        return None
    if not re.fullmatch(r"[0-9a-f]{12}", id):
        return None
    return Machine.open(host.state_root(), id)


def needed(running: bool = True) -> Machine:
    machine = current()
    if machine is None:
        raise LabError("this work tree has no VM", "utils/devvm launch")
    if running and not machine.running():
        raise LabError("this work tree's VM is stopped", "utils/devvm start")
    return machine


@contextlib.contextmanager
def id_file() -> Iterator[IO[str]]:
    """`.devvm`, held: two launches in one tree would make two VMs, of which one would be lost."""
    while True:
        with ID_FILE.open("a+") as file:
            host.give_to_caller(ID_FILE)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise LabError("another launch or destroy of this work tree's VM is under way", "wait for it") from None
            # A destroy may have removed it between the two: an id in a file that has no name would be lost.
            if is_named(file):
                yield file
                return


def is_named(file: IO[str]) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), ID_FILE.stat())
    except FileNotFoundError:
        return False


def launch(arguments: argparse.Namespace) -> int:
    host.need_tools(["qemu-system-x86_64", "qemu-img", "ssh", "ssh-keygen", "rsync"])
    begun = time.monotonic()
    with id_file() as file:
        found = current()
        if found:
            state = "runs" if found.running() else "is stopped"
            follow = "utils/devvm run CMD" if found.running() else "utils/devvm start"
            raise LabError(
                f"this work tree has a VM, {found.record.id}, which {state}", f"{follow}; or utils/devvm destroy first"
            )
        try:
            machine, ready = make(arguments, file)
        except BaseException:
            ID_FILE.unlink(missing_ok=True)
            raise
    announce(machine, ready, time.monotonic() - begun)
    return 0


def make(arguments: argparse.Namespace, file: IO[str]) -> tuple[Machine, qemu.Ready]:
    """The VM, its id in `file`. A VM that never came up is of no use to anyone: it is removed."""
    wanted = recipe.current(arguments.profile)
    state = host.make_directory(host.state_root())
    memory = arguments.memory or wanted.profile.memory_mib
    # Before minutes of building for a VM that has no room.
    host.need_memory(memory, f"a VM of {memory} MiB")
    made: list[Machine] = []

    def claim(image: golden.Golden) -> None:
        cpus = arguments.cpus or 0
        record = Record(new_id(), "dev", str(image.directory), image.profile, cpus, memory, str(host.REPO))
        file.truncate(0)
        file.write(record.id + "\n")
        file.flush()
        made.append(Machine.create(state, record))

    try:
        golden.obtain(state, wanted, say, arguments.rebuild, claim)
        return made[0], made[0].start(say)
    except BaseException:
        for machine in made:
            machine.destroy()
        raise


def announce(machine: Machine, ready: qemu.Ready, seconds: float) -> None:
    inside = "/dev/kvm inside" if ready.kvm else "no /dev/kvm inside"
    say(f"✓ VM {machine.record.id} is up, {inside}; {seconds:.0f} s")


def start(arguments: argparse.Namespace) -> int:
    del arguments
    machine = needed(running=False)
    ready = machine.start(say)
    announce(machine, ready, machine.record.ready_seconds)
    return 0


def stop(arguments: argparse.Namespace) -> int:
    del arguments
    machine = needed()
    machine.stop()
    say(f"✓ VM {machine.record.id} is stopped; its disk is kept")
    return 0


def destroy(arguments: argparse.Namespace) -> int:
    state = host.state_root()
    with id_file():
        machine = current()
        if machine:
            machine.destroy()
        ID_FILE.unlink(missing_ok=True)
    if machine:
        say(f"✓ VM {machine.record.id} is gone")
    elif not arguments.golden:
        say("this work tree has no VM")
    if arguments.golden:
        for name in golden.drop_all_unused(state):
            say(f"✓ golden image {name} is gone")
    return 0


def sync(arguments: argparse.Namespace) -> int:
    machine = needed()
    ssh.sync(machine, host.REPO, [Path(path) for path in arguments.extra], verbose=arguments.verbose)
    return 0


def run(arguments: argparse.Namespace) -> int:
    words = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    if not words:
        raise LabError("run what?", 'utils/devvm run "cd /work/clawpot && cargo build"')
    return ssh.run(needed(), words[0] if len(words) == 1 else shlex.join(words))


def shell(arguments: argparse.Namespace) -> int:
    del arguments
    machine = needed()
    ssh.connect(machine)
    words = ssh.interactive(machine)
    os.execv(words[0], words)


def logs(arguments: argparse.Namespace) -> int:
    console = needed(running=False).console
    if not console.exists():
        raise LabError(f"{console} is not there yet", "utils/devvm start")
    if arguments.follow:
        return subprocess.run(["tail", "-n", "50", "-F", console], check=False).returncode
    sys.stdout.write(host.tail(console, arguments.lines) + "\n")
    return 0


def status(arguments: argparse.Namespace) -> int:
    machine = current()
    if machine is None:
        print(json.dumps({"state": "none"}) if arguments.json else "this work tree has no VM: utils/devvm launch")
        return NO_VM
    running = machine.running()
    record = machine.record
    if arguments.json:
        told = {**asdict(record), "state": "running" if running else "stopped", "directory": str(machine.directory)}
        print(json.dumps(told, indent=1))
        return 0 if running else STOPPED
    image = golden.Golden.read(Path(record.golden))
    fresh = image.recipe == recipe.current(record.profile).hash()
    how = accel.Accel(**record.accel) if record.accel else None
    age = "" if fresh else ", outdated: destroy and launch makes a new one"
    size = f"{record.cpus} CPU{'s' if record.cpus > 1 else ''}, {record.memory_mib} MiB"
    rows = {
        "state": "running" if running else "stopped (utils/devvm start)",
        "acceleration": how.words if how else "never started",
        "/dev/kvm inside": "yes" if record.kvm_inside else "no",
        "size": f"{size}, {machine.disk_mib()} MiB of disk written",
        "ssh": f"127.0.0.1:{record.port}" if running else "-",
        "golden image": f"{record.profile} {image.recipe} ({image.kernel}){age}",
        "files": str(machine.directory),
    }
    print(f"VM {record.id} of {record.belongs_to}")
    for name, value in rows.items():
        print(f"  {name + ':':<17} {value}")
    return 0 if running else STOPPED


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="devvm", description="A VM with /dev/kvm to build and test this work tree in. See docs/devvm.md."
    )
    verbs = top.add_subparsers(metavar="COMMAND", required=True)

    def verb(name: str, does: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        made = verbs.add_parser(name, help=text, description=text)
        made.set_defaults(does=does)
        return made

    up = verb("launch", launch, "makes this work tree's VM and boots it")
    up.add_argument(
        "--rebuild", action="store_true", help="build the golden image anew, although nothing in its recipe changed"
    )
    up.add_argument("--cpus", type=sizes.cpus, help="default: all of the machine's with KVM, 1 emulated")
    up.add_argument("--memory", type=sizes.memory, metavar="MIB", help="default: 4096; 2048 with --profile small")
    up.add_argument("--profile", choices=sorted(recipe.PROFILES), default="dev", help="small: no compilers and no Rust")
    send = verb("sync", sync, f"copies the work tree to {ssh.INSIDE} in the VM")
    what = "also this of the excluded (.git, target, assets, .venv); may be repeated"
    send.add_argument("--with", dest="extra", action="append", nargs="+", default=[], metavar="PATH", help=what)
    send.add_argument("-v", "--verbose", action="store_true")
    command = verb("run", run, "runs a command in a login shell in the VM; exit code, stdin and output are the command's")
    command.add_argument("command", nargs=argparse.REMAINDER, metavar="CMD")
    verb("ssh", shell, "a shell in the VM")
    state = verb("status", status, "what there is; exit code 0 running, 3 stopped, 4 none")
    state.add_argument("--json", action="store_true")
    verb("stop", stop, "powers the VM off; its disk is kept")
    verb("start", start, "boots it again")
    gone = verb("destroy", destroy, "removes the VM with its disk; the golden image stays for the next")
    gone.add_argument("--golden", action="store_true", help="remove golden images on which no VM stands as well")
    tell = verb("logs", logs, "the VM's console")
    tell.add_argument("-f", "--follow", action="store_true")
    tell.add_argument("-n", "--lines", type=int, default=1000)
    return top


def main(words: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(words)
    if hasattr(arguments, "extra"):
        arguments.extra = [path for paths in arguments.extra for path in paths]
    # A time limit from outside ends it in order: what was half made is removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        return int(arguments.does(arguments))
    except LabError as error:
        say(f"devvm: {error}")
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        # A directory that may not be written, a full disk: the system's own words name it.
        say(f"devvm: {error}")
        return 1
