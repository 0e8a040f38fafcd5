"""An image of 1 GB from a registry on loopback, against `tar x` of the same layers on the same disk, in turns.

    python bench_images.py [--rounds N] [--mib N]      as root; needs docker-registry, skopeo and zstd
    chrt -f 5 python bench_images.py                   on a host that does other work: all that is timed goes before that

Layers are files of this host's own Debian packages, every other one packed with gzip -6 and with zstd -3. What is timed: the
pull from nothing to an image that a VM can be made of (download, two digests of each layer, unpacking, file system, its digest,
everything synced), and `tar x` of the layers, one after the other, with `sync -f` behind it and without. Each round times both,
and the ratio is of one round. Whether the server's memory grows with the image is seen with a quarter of it, of another server.
JSON goes to bench/images.json.
"""

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from harness import images, registry
from harness.cli import binaries
from harness.server import ASSETS, Server
from harness.tools import REPO, run
from harness.world import World

LAYERS = 4
#: The part of the image that another server's memory is measured with.
SMALL = 4

PACKERS = (("gz", ["gzip", "-6"], "gzip"), ("zst", ["zstd", "-q", "-3"], "zstd"))


def layers(to: Path, mib: int) -> list[Path]:
    """Packed layers of about `mib` MiB in all, each with other files of /usr."""
    to.mkdir()
    parts: list[list[str]] = [[] for _ in range(LAYERS)]
    sizes = [0] * LAYERS
    for root, directories, files in os.walk("/usr"):
        directories[:] = sorted(name for name in directories if name != "src")
        for name in sorted(files):
            path = Path(root, name)
            if path.is_symlink() or not path.is_file() or sum(sizes) >= mib << 20:
                continue
            smallest = sizes.index(min(sizes))
            parts[smallest].append(str(path).lstrip("/"))
            sizes[smallest] += path.stat().st_size
    if sum(sizes) < mib << 20:
        raise SystemExit(f"/usr has {sum(sizes) >> 20} MiB of files: give --mib {sum(sizes) >> 20} or less")
    made = []
    for number, part in enumerate(parts):
        suffix, packer, _ = PACKERS[number % len(PACKERS)]
        path = to / f"layer-{number}.tar.{suffix}"
        words = ["tar", "-C", "/", "-cf", "-", "--null", "--no-recursion", "-T", "-"]
        with path.open("wb") as out:
            tar = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            pack = subprocess.Popen(packer, stdin=tar.stdout, stdout=out)
            assert tar.stdin is not None
            tar.stdin.write("\0".join(part).encode())
            tar.stdin.close()
            assert tar.wait() == 0 and pack.wait() == 0
        made.append(path)
    return made


def layout(to: Path, packed: list[Path]) -> str:
    blobs = to / "blobs/sha256"
    blobs.mkdir(parents=True)

    def put(data: bytes) -> dict[str, Any]:
        digest = hashlib.sha256(data).hexdigest()
        (blobs / digest).write_bytes(data)
        return {"digest": f"sha256:{digest}", "size": len(data)}

    diff_ids = []
    for path in packed:
        unpack = {".gz": "gzip", ".zst": "zstd"}[path.suffix]
        unpacked = subprocess.run(f"{unpack} -dc {path} | sha256sum", shell=True, check=True, capture_output=True, text=True)
        diff_ids.append("sha256:" + unpacked.stdout.split()[0])
    config = {"architecture": "amd64", "os": "linux", "config": {}, "rootfs": {"type": "layers", "diff_ids": diff_ids}}
    kind = "application/vnd.oci.image"
    manifest = {
        "schemaVersion": 2,
        "config": {"mediaType": f"{kind}.config.v1+json"} | put(json.dumps(config).encode()),
        "layers": [
            {"mediaType": f"{kind}.layer.v1.tar+{PACKERS[number % len(PACKERS)][2]}"} | put(path.read_bytes())
            for number, path in enumerate(packed)
        ],
    }
    entry = {"mediaType": f"{kind}.manifest.v1+json", "annotations": {"org.opencontainers.image.ref.name": "1"}}
    index = {"schemaVersion": 2, "manifests": [entry | put(json.dumps(manifest).encode())]}
    (to / "index.json").write_text(json.dumps(index))
    (to / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    return f"oci:{to}:1"


def untar(packed: list[Path], to: Path) -> tuple[float, float]:
    """Seconds of `tar x`, and of that with everything on the disk behind it."""
    to.mkdir()
    run("sync", "-f", to)
    began = time.monotonic()
    for path in packed:
        run("tar", "-C", to, "-xf", path, seconds=600)
    unpacked = time.monotonic() - began
    run("sync", "-f", to, seconds=600)
    took = time.monotonic() - began
    shutil.rmtree(to)
    run("sync", "-f", to.parent, seconds=600)
    return unpacked, took


def children(pid: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(stat.read_text().rsplit(") ", 1)[1].split()[1]) == pid:
                found.append(int(stat.parent.name))
    return found


class Memory:
    """The most that a server and its helpers have had while this was watching, KiB by name of the program."""

    def __init__(self, pid: int) -> None:
        self.pid, self._over = pid, threading.Event()
        self.most: dict[str, int] = {}
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    @staticmethod
    def now(pid: int) -> int:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return next((int(line.split()[1]) for line in lines if line.startswith("VmRSS:")), 0)

    def _look(self) -> None:
        for pid in [self.pid, *children(self.pid)]:
            with contextlib.suppress(OSError):
                name = Path(f"/proc/{pid}/comm").read_text().strip()
                self.most[name] = max(self.most.get(name, 0), self.now(pid))

    def _watch(self) -> None:
        while not self._over.wait(0.1):
            with contextlib.suppress(OSError):
                self._look()

    def end(self) -> dict[str, int]:
        self._over.set()
        self._thread.join()
        return self.most


def cpu(pid: int) -> float:
    """Seconds of CPU of a server and of its helpers that have ended."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()
    return sum(int(field) for field in fields[11:15]) / os.sysconf("SC_CLK_TCK")


#: What a server may have more at its busiest than idle, KiB: buffers of three downloads, whatever the image's size.
FLAT = 32 << 10


class Rig:
    """A registry with the image `name` and a server that has nothing of it."""

    def __init__(self, where: Path, world: World, mib: int) -> None:
        self.where = where
        where.mkdir()
        # Each tree in another part of the disk, as the server has it: an ext4 without a journal is slow to take inodes that
        # were freed just now, and neither side is to pay for the other's.
        run("chattr", "+T", where, check=False)
        self.packed = layers(where / "layers", mib)
        self.hub = registry.Registry(world, where / "hub", registry.free_port()).start()
        self.server = Server(world, where / "s", image_dir=images.copy(ASSETS, where / "store"))
        self.name = f"{self.hub.address}/bench/app:1"
        self.idle = 0

    def start(self) -> Memory:
        self.hub.push(layout(self.where / "layout", self.packed), "bench/app:1")
        self.server.start()
        time.sleep(2)
        self.idle = Memory.now(self.server.pid)
        return Memory(self.server.pid)

    def pull(self) -> float:
        return self.server.cli("image", "pull", self.name, timeout=900).ok().seconds

    def forget(self) -> None:
        self.server.cli("image", "rm", self.name).ok()
        self.server.cli("image", "gc", "--all").ok()
        run("sync", "-f", self.where, seconds=600)

    def close(self) -> None:
        self.server.close()
        self.hub.stop()


def small(where: Path, world: World, mib: int) -> dict[str, int]:
    """What a server takes for an image of `mib` MiB, KiB."""
    rig = Rig(where, world, mib)
    try:
        memory = rig.start()
        try:
            rig.pull()
        finally:
            most = memory.end()
    finally:
        rig.close()
    return {"idle_kib": rig.idle, "most_kib": most["clawpot-server"]}


def measure(where: Path, world: World, rounds: int, mib: int) -> dict[str, Any]:
    rig = Rig(where, world, mib)
    pulls, plain, synced, seconds, cpus = [], [], [], [], []
    try:
        memory = rig.start()
        try:
            for number in range(rounds):
                unpacked, all_of_it = untar(rig.packed, where / f"tree-{number}")
                plain.append(unpacked)
                synced.append(all_of_it)
                spent = cpu(rig.server.pid)
                pulls.append(rig.pull())
                cpus.append(round(cpu(rig.server.pid) - spent, 2))
                seconds.append(rig.pull())
                rig.forget()
                print(f"tar x {unpacked:.1f} s, with sync {all_of_it:.1f} s; pull {pulls[-1]:.1f} s", file=sys.stderr)
        finally:
            most = memory.end()
    finally:
        rig.close()
    ratio = statistics.median(pull / tar for pull, tar in zip(pulls, synced, strict=True))
    return {
        "unpacked_mib": mib,
        "packed_mib": sum(path.stat().st_size for path in rig.packed) >> 20,
        "layers": [path.name for path in rig.packed],
        "rounds": rounds,
        "load": round(os.getloadavg()[0], 1),
        "before_other_work": os.sched_getscheduler(0) != os.SCHED_OTHER,
        "tar_x_s": [round(one, 2) for one in plain],
        "tar_x_and_sync_s": [round(one, 2) for one in synced],
        "pull_s": [round(one, 2) for one in pulls],
        "pull_cpu_s": cpus,
        "second_pull_s": [round(one, 3) for one in seconds],
        "pull_over_tar_x_and_sync": round(ratio, 2),
        "pull_over_tar_x": round(statistics.median(pull / tar for pull, tar in zip(pulls, plain, strict=True)), 2),
        "server_idle_kib": rig.idle,
        "most_kib": most,
        "met": {
            "ratio_2_5": ratio <= 2.5,
            "second_pull_1_s": statistics.median(seconds) <= 1,
            "memory_flat": most.get("clawpot-server", 0) - rig.idle <= FLAT,
        },
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--mib", type=int, default=1024)
    arguments = parser.parse_args()
    where = Path(os.environ.get("CLAWPOT_TEST_DIR", Path(__file__).parent / ".work")) / f"bench-{os.getpid()}"
    where.mkdir(parents=True)
    world = World()
    try:
        world.start()
        other = small(where / "small", world, arguments.mib // SMALL)
        found = measure(where / "whole", world, arguments.rounds, arguments.mib)
        found[f"server_with_{arguments.mib // SMALL}_mib"] = other
        found["met"]["memory_flat"] &= other["most_kib"] - other["idle_kib"] <= FLAT
    finally:
        world.close()
        shutil.rmtree(where, ignore_errors=True)
    found["profile"] = "release" if binaries().name.startswith("release") else "debug"
    print(json.dumps(found, indent=2))
    (REPO / "bench/images.json").write_text(json.dumps(found, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
