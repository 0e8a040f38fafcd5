"""Sweeps away what runs of these tests left that were killed themselves: `python -m harness.sweep`."""

import contextlib
import os
import re
import shutil
from pathlib import Path

from .server import Server
from .tools import REPO, children_of_mount, run
from .world import World


def sweep() -> None:
    """Of every run whose process is gone; those that live are left alone."""
    root = Path(os.environ.get("CLAWPOT_TEST_DIR", REPO / "tests/integration/.work"))
    for work in sorted(root.glob("*")) if root.exists() else []:
        if _lives(work.name):
            continue
        world = World()
        world.host, world.internet = f"cpt-host-{work.name}", f"cpt-net-{work.name}"
        for instance in sorted(work.rglob("instance")):
            for left in Server(world, instance.parent).sweep():
                print(f"swept: {left}")
        for mount in sorted(children_of_mount(work), reverse=True):
            run("umount", "-l", mount, check=False)
        shutil.rmtree(work, ignore_errors=True)
    for name in run("ip", "netns", "list").split():
        if (found := re.fullmatch(r"cpt-(host|net|hand)-(\d+)", name)) and not _lives(found[2]):
            for pid in run("ip", "netns", "pids", name, check=False).split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), 9)
            run("ip", "netns", "del", name, check=False)


def _lives(name: str) -> bool:
    pid = name.rpartition("-")[2]
    return Path(f"/proc/{pid}").exists()


if __name__ == "__main__":
    sweep()
