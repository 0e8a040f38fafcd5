"""Golden images: built once per recipe, verified by booting, never written to again.

A directory `golden/PROFILE-HASH-N` with `root.img`, `vmlinux`, `initrd` and `golden.json` is whole: it got that name when all
else was done. What is half made has a name that begins with a dot and is removed by the next build.
"""

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from . import accel, host, qemu
from .errors import LabError
from .recipe import Recipe

Say = Callable[[str], None]
#: Programs that building needs. `lz4` unpacks Debian's kernel.
TOOLS = ("mmdebstrap", "mke2fs", "unshare", "lz4", "qemu-img", "qemu-system-x86_64")


@dataclass(frozen=True)
class Golden:
    directory: Path
    profile: str
    recipe: str
    kernel: str
    seconds: float
    notes: tuple[str, ...]

    @classmethod
    def read(cls, directory: Path) -> "Golden":
        told = json.loads((directory / "golden.json").read_text())
        return cls(directory, told["profile"], told["recipe"], told["kernel"], told["seconds"], tuple(told["notes"]))


def home(state: Path) -> Path:
    return host.make_directory(state / "golden")


@contextlib.contextmanager
def lock(path: Path, busy: Callable[[], None] | None = None, shared: bool = False) -> Iterator[None]:
    """Held by one at a time; `busy` is called once when it has to be waited for."""
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    with path.open("ab") as file:
        host.give_to_caller(path)
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if busy:
                busy()
            fcntl.flock(file, kind)
        yield


def find(state: Path, recipe: Recipe) -> Golden | None:
    """The newest whole image of this recipe."""
    named = home(state).glob(f"{recipe.profile.name}-{recipe.hash()}-*/golden.json")
    found = sorted(named, key=lambda path: path.stat().st_mtime)
    return Golden.read(found[-1].parent) if found else None


def obtain(
    state: Path, recipe: Recipe, say: Say, rebuild: bool = False, claim: Callable[[Golden], None] | None = None
) -> Golden:
    """The image of this recipe, built when there is none. `claim` writes down who stands on it, before it could be dropped."""
    with lock(home(state) / f"lock-{recipe.profile.name}", lambda: say("waiting for another build of the golden image")):
        found = None if rebuild else find(state, recipe)
        image = found or build(state, recipe, say, rebuild)
        with contextlib.suppress(OSError):
            # When it was last wanted.
            os.utime(image.directory / "golden.json")
        if claim:
            claim(image)
        if not found:
            drop_unused(state, image, say)
        return image


def build(state: Path, recipe: Recipe, say: Say, fresh: bool = False) -> Golden:
    host.need_root("building the golden image")
    host.need_tools(TOOLS)
    host.need_disk(home(state), recipe.profile.room_mib, "building the golden image")
    for stale in home(state).glob(f".build-{recipe.profile.name}-*"):
        # We hold the profile's lock: whoever made it is no more, but the QEMU it booted may be.
        left = qemu.from_pid_file(stale / "boot", guest_name(stale))
        if left:
            left.kill()
        shutil.rmtree(stale)
    scratch = host.make_directory(home(state) / f".build-{recipe.profile.name}-{os.getpid()}")
    begun = time.monotonic()
    try:
        say(f"building golden image {recipe.profile.name} {recipe.hash()} ({recipe.release}, {recipe.kernel})")
        for note in recipe.notes:
            say(f"  {note}")
        make(recipe, scratch, say, fresh)
        verify(recipe, scratch, state, say)
        return keep(state, recipe, scratch, time.monotonic() - begun)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def told(say: Say, what: str) -> Iterator[None]:
    begun = time.monotonic()
    yield
    say(f"  {what}: {time.monotonic() - begun:.0f} s")


def make(recipe: Recipe, scratch: Path, say: Say, fresh: bool) -> None:
    from . import tree  # brings what only a build needs

    with told(say, "packages, kernel and files"):
        root = tree.fill(recipe, scratch, fresh)
    with told(say, "file system"):
        tree.pack(recipe, root, scratch / "root.img")
        shutil.rmtree(root)


def guest_name(scratch: Path) -> str:
    return f"clawpot-golden{scratch.name.replace('.build', '')}"


def overlay(golden: Path, disk: Path) -> None:
    """A disk of one VM's own over the image."""
    host.run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", golden / "root.img", disk)


def verify(recipe: Recipe, scratch: Path, state: Path, say: Say) -> None:
    """Boots it: an image that does not come up is never kept."""
    how = accel.choose(scratch / "vmlinux", state / "accel.json")
    boot = scratch / "boot"
    boot.mkdir()
    overlay(scratch, boot / "disk.qcow2")
    memory = min(recipe.profile.memory_mib, 1024)
    host.need_memory(memory, "booting the golden image")
    spec = qemu.Spec(guest_name(scratch), boot, scratch, boot / "disk.qcow2", how.default_cpus(), memory, how, offline=True)
    process: qemu.Process | None = None
    try:
        process = qemu.spawn(spec)
        with told(say, f"first boot under {how.name.upper()}"):
            try:
                ready = qemu.wait_ready(spec, process)
            except LabError as error:
                raise LabError(
                    f"the new golden image does not boot: {error.args[0]}",
                    "it was thrown away; mend the recipe and launch again",
                ) from error
        if ready.golden != recipe.hash():
            raise LabError(f"the VM says it is golden image {ready.golden}, not {recipe.hash()}", "launch --rebuild")
        if how.nested and not ready.kvm:
            say("  warning: no /dev/kvm inside")
    finally:
        # A signal may have come as it was up, and not yet known here.
        if left := process or qemu.from_pid_file(boot, spec.name):
            left.kill()
    shutil.rmtree(boot)


def keep(state: Path, recipe: Recipe, scratch: Path, seconds: float) -> Golden:
    number = 1
    while (final := home(state) / f"{recipe.profile.name}-{recipe.hash()}-{number}").exists():
        number += 1
    record = {
        "profile": recipe.profile.name,
        "recipe": recipe.hash(),
        "kernel": recipe.kernel,
        "seconds": round(seconds, 1),
        "notes": list(recipe.notes),
    }
    (scratch / "golden.json").write_text(json.dumps(record, indent=1) + "\n")
    for path in (scratch / name for name in ("root.img", "vmlinux", "initrd")):
        path.chmod(0o444)
    os.sync()
    scratch.rename(final)
    host.give_to_caller(final, *final.iterdir())
    return Golden.read(final)


def users(state: Path) -> set[str]:
    """Names of the images that VMs stand on."""
    found = set()
    for record in (state / "vms").glob("*/vm.json"):
        # What cannot be read may stand on anything: the error is the caller's to hear.
        found.add(Path(json.loads(record.read_text())["golden"]).name)
    return found


def drop_unused(state: Path, newest: Golden, say: Say) -> None:
    """Images of the profile that no VM stands on, but for one: two recipes in turn (with Firecracker, without) are usual."""
    used = {newest.directory.name, *users(state)}
    others = [path for path in home(state).glob(f"{newest.profile}-*/golden.json") if path.parent.name not in used]
    for path in sorted(others, key=lambda path: path.stat().st_mtime)[:-1]:
        shutil.rmtree(path.parent)
        say(f"  removed the older image {path.parent.name}")


def drop_all_unused(state: Path) -> list[str]:
    """Every image that no VM stands on and nobody builds or claims just now."""
    gone = []
    for path in sorted(home(state).glob("*/golden.json")):
        image = Golden.read(path.parent)
        with lock(home(state) / f"lock-{image.profile}"):
            if image.directory.name not in users(state):
                shutil.rmtree(image.directory)
                gone.append(image.directory.name)
    return gone
