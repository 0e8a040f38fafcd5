"""Inner VMs: one per run of the integration tests, offline, gone afterwards. What `ci/inner-vm` and `ci/run-local` do."""

import contextlib
import shlex
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from . import golden, host, machine, qemu, recipe, ssh
from .errors import LabError
from .machine import Machine, Record

Say = Callable[[str], None]
PROFILE = "small"
#: Room for two guests, the image builder's of 1 GiB, server and tests.
MEMORY_MIB = 3072
#: No run of CI takes longer: seconds. An inner VM that is older is nobody's, whatever its record says.
OLDEST = 6 * 3600
#: What is worth keeping of a run: where it is inside, and what it is called outside.
KEPT = {"/work/clawpot/tests/integration/report": "report", "/var/log/clawpot-ci": "inner"}
#: And what lies beside the VM outside. The first is there whenever a VM was started.
BESIDE = ("console.log", "console.log.1", "qemu.log")


def build_golden(say: Say, rebuild: bool = False) -> golden.Golden:
    state = host.make_directory(host.state_root())
    return golden.obtain(state, recipe.current(PROFILE), say, rebuild)


@dataclass(frozen=True)
class Wanted:
    """What an inner VM is launched with."""

    #: Commit or build, for people.
    belongs_to: str
    #: Whoever's end is its end; none: it stays until it is destroyed or too old.
    owner: tuple[int, int] | None = None
    #: A tar that the VM finds unpacked in its /work/clawpot.
    payload: Path | None = None
    memory_mib: int = MEMORY_MIB
    #: 0: as many as are good here.
    cpus: int = 0


def launch(say: Say, wanted: Wanted) -> Machine:
    """Boots one; on a failure nothing of it is left."""
    host.need_tools(["qemu-system-x86_64", "qemu-img", "ssh", "ssh-keygen", "rsync"])
    # Before minutes of building for a VM that cannot come up.
    if wanted.payload and not wanted.payload.is_file():
        raise LabError(f"--payload: {wanted.payload} is not a file", "ci/package --out FILE makes one")
    host.need_memory(wanted.memory_mib + machine.OVERHEAD_MIB, f"an inner VM of {wanted.memory_mib} MiB")
    state = host.make_directory(host.state_root())
    made: list[Machine] = []

    def claim(image: golden.Golden) -> None:
        sizes = (wanted.cpus, wanted.memory_mib)
        record = Record(machine.new_id(), "ci", str(image.directory), image.profile, *sizes, wanted.belongs_to)
        record.offline, record.owner = True, wanted.owner
        record.payload = str(wanted.payload.absolute()) if wanted.payload else ""
        made.append(Machine.create(state, record))

    try:
        golden.obtain(state, recipe.current(PROFILE), say, claim=claim)
        made[0].start(say)
        if wanted.payload:
            ssh.output(made[0], f"mkdir -p {ssh.INSIDE} && tar -xf /dev/vdb -C {ssh.INSIDE}", seconds=1200)
    except BaseException:
        for each in made:
            each.destroy()
        raise
    return made[0]


def find(id: str) -> Machine:
    """An inner VM by its id. A dev VM is not ours to touch."""
    found = Machine.open(host.state_root(), id)
    if found is None or found.record.kind != "ci":
        raise LabError(f"there is no inner VM {id!r}", "ci/inner-vm list")
    return found


def inner_vms() -> list[Machine]:
    return [each for each in machine.all_machines(host.state_root()) if each.record.kind == "ci"]


def collect(inner: Machine, to: Path, say: Say) -> None:
    """What tells how a run went. A VM that answers no more leaves its console at least."""
    host.make_directory(to)
    for name in BESIDE:
        with contextlib.suppress(FileNotFoundError):
            (to / name).write_bytes((inner.directory / name).read_bytes())
    if not inner.running():
        say("  the inner VM does not run: only its console is kept")
        return
    with contextlib.suppress(LabError):
        journal = "mkdir -p /var/log/clawpot-ci; journalctl -b --no-pager >/var/log/clawpot-ci/journal.log; "
        ssh.output(inner, journal + "dmesg >/var/log/clawpot-ci/dmesg.log; df -h >/var/log/clawpot-ci/df", seconds=120)
    for inside, name in KEPT.items():
        try:
            if ssh.output(inner, f"test -d {shlex.quote(inside)} && echo yes || true", seconds=60).strip():
                ssh.copy_out(inner, inside, to / name)
        except LabError as error:
            say(f"  {inside} could not be copied: {error}")


def need_own(to: Path) -> None:
    """That what is in this directory is an earlier run's: it is going to be removed."""
    names = {path.name for path in to.iterdir()} if to.is_dir() else set()
    ours = {*BESIDE, *KEPT.values()}
    if (to.exists() and not to.is_dir()) or not names <= ours or (names and BESIDE[0] not in names):
        other = ", ".join(sorted(names - ours)[:3]) or "no run's console"
        raise LabError(f"{to} is no directory of artifacts: there is {other} in it", "name one that is empty or not there yet")


def clear(to: Path) -> None:
    """Removes what an earlier run left there, and nothing else."""
    for path in (to / name for name in (*BESIDE, *KEPT.values())):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def orphans(oldest: float = OLDEST) -> list[tuple[Machine, str]]:
    """Inner VMs whose run is over, and why we think so."""
    found = []
    for each in inner_vms():
        owner = each.record.owner
        if owner and qemu.start_time(owner[0]) != owner[1]:
            found.append((each, f"its run (pid {owner[0]}) has ended"))
        elif time.time() - each.record.created > oldest:
            found.append((each, f"it is older than {oldest / 3600:g} h"))
    return found


def sweep(say: Say, oldest: float = OLDEST) -> int:
    """Destroys orphans; how many there were."""
    found = orphans(oldest)
    for each, why in found:
        each.destroy()
        say(f"✓ inner VM {each.record.id} of {each.record.belongs_to} is gone: {why}")
    return len(found)
