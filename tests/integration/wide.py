"""Many creates at once on a real VMM: all have to run a command and go, and nothing may be left.

uv run python wide.py [--wide N] [--rounds N]
"""

import argparse
import os
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from harness.server import ASSETS, VMM, Server
from harness.tools import REPO, within
from harness.world import World


def burst(server: Server, names: list[str]) -> list[float]:
    """Seconds from each create to its VM's answer."""

    def live(name: str) -> float:
        began = time.monotonic()
        patience = within(300)
        server.cli("create", "--wait", "--name", name, "debian", timeout=patience).ok()
        assert server.cli("exec", name, "--", "echo", name, timeout=patience).ok().text == f"{name}\n"
        return time.monotonic() - began

    with ThreadPoolExecutor(len(names)) as pool:
        seconds = list(pool.map(live, names))
        for result in pool.map(lambda name: server.cli("rm", name, timeout=within(90)), names):
            result.ok()
    return seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wide", type=int, default=8, help="VMs at once")
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    workdir = Path(os.environ.get("CLAWPOT_TEST_DIR", REPO / "tests/integration/.work")) / f"wide-{os.getpid()}"
    workdir.mkdir(parents=True)
    world = World()
    # A busy host takes long to boot so many at once: that is no failure of the server's.
    server = Server(world, workdir / "server", "--vmm", VMM, "--boot-timeout-secs", 300, image_dir=ASSETS)
    try:
        world.start()
        server.start()
        for number in range(arguments.rounds):
            seconds = sorted(burst(server, [f"wide-{number}-{n}" for n in range(arguments.wide)]))
            print(f"{arguments.wide} at once on {VMM}: {seconds[0]:.1f} to {seconds[-1]:.1f} s", flush=True)
    except BaseException:
        print(server.tail(), file=sys.stderr)
        raise
    finally:
        left = server.close()
        world.close()
        shutil.rmtree(workdir, ignore_errors=True)
    if left:
        print("left behind by the server:\n" + "\n".join(left), file=sys.stderr)
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
