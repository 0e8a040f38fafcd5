"""An image of 1 GB from a registry on loopback, against `tar x` of the same layers on the same disk, in turns.

    python bench_images.py [--rounds N] [--mib N]      as root; needs docker-registry and skopeo

Layers are files of this host's own Debian packages. What is timed: the pull from nothing to an image that a VM can be made
of (download, two digests of each layer, unpacking, file system, its digest, everything synced), and `tar xzf` of the layers
with a `sync` behind it. JSON goes to bench/images.json.
"""

import argparse
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
from harness.server import ASSETS, Server
from harness.tools import REPO, run
from harness.world import World

LAYERS = 4


def layers(to: Path, mib: int) -> list[Path]:
    """Packed layers of about `mib` MiB in all, each with other files of /usr."""
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
    made = []
    for number, part in enumerate(parts):
        path = to / f"layer-{number}.tar.gz"
        words = ["tar", "-C", "/", "-cf", "-", "--null", "--no-recursion", "-T", "-"]
        with path.open("wb") as out:
            tar = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            gzip = subprocess.Popen(["gzip", "-6"], stdin=tar.stdout, stdout=out)
            assert tar.stdin is not None
            tar.stdin.write("\0".join(part).encode())
            tar.stdin.close()
            assert tar.wait() == 0 and gzip.wait() == 0
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
        unpacked = subprocess.run(f"gzip -dc {path} | sha256sum", shell=True, check=True, capture_output=True, text=True)
        diff_ids.append("sha256:" + unpacked.stdout.split()[0])
    config = {"architecture": "amd64", "os": "linux", "config": {}, "rootfs": {"type": "layers", "diff_ids": diff_ids}}
    kind = "application/vnd.oci.image"
    manifest = {
        "schemaVersion": 2,
        "config": {"mediaType": f"{kind}.config.v1+json"} | put(json.dumps(config).encode()),
        "layers": [{"mediaType": f"{kind}.layer.v1.tar+gzip"} | put(path.read_bytes()) for path in packed],
    }
    entry = {"mediaType": f"{kind}.manifest.v1+json", "annotations": {"org.opencontainers.image.ref.name": "1"}}
    index = {"schemaVersion": 2, "manifests": [entry | put(json.dumps(manifest).encode())]}
    (to / "index.json").write_text(json.dumps(index))
    (to / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    return f"oci:{to}:1"


def untar(packed: list[Path], to: Path) -> float:
    to.mkdir()
    began = time.monotonic()
    for path in packed:
        run("tar", "-C", to, "-xzf", path)
    run("sync", "-f", to)
    took = time.monotonic() - began
    shutil.rmtree(to)
    return took


class Memory:
    """The most that a process has had while this was watching, KiB."""

    def __init__(self, pid: int) -> None:
        self.pid, self.most, self._over = pid, self.now(pid), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    @staticmethod
    def now(pid: int) -> int:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))

    def _watch(self) -> None:
        while not self._over.wait(0.05):
            self.most = max(self.most, self.now(self.pid))

    def end(self) -> int:
        self._over.set()
        self._thread.join()
        return self.most


def measure(where: Path, world: World, rounds: int, mib: int) -> dict[str, Any]:
    packed = layers(where, mib)
    hub = registry.Registry(world, where / "hub", registry.free_port()).start()
    server = Server(world, where / "s", image_dir=images.copy(ASSETS, where / "store"))
    pulls, untars, seconds = [], [], []
    try:
        hub.push(layout(where / "layout", packed), "bench/app:1")
        name = f"{hub.address}/bench/app:1"
        server.start()
        before = Memory.now(server.pid)
        memory = Memory(server.pid)
        for _ in range(rounds):
            untars.append(untar(packed, where / "tree"))
            pulls.append(server.cli("image", "pull", name, timeout=600).ok().seconds)
            seconds.append(server.cli("image", "pull", name).ok().seconds)
            server.cli("image", "rm", name).ok()
            server.cli("image", "gc", "--all").ok()
        most = memory.end()
    finally:
        server.close()
        hub.stop()
    ratio = statistics.median(pulls) / statistics.median(untars)
    return {
        "unpacked_mib": mib,
        "packed_mib": sum(path.stat().st_size for path in packed) >> 20,
        "rounds": rounds,
        "tar_x_s": untars,
        "pull_s": pulls,
        "second_pull_s": seconds,
        "pull_over_tar_x": round(ratio, 2),
        "server_idle_kib": before,
        "server_most_kib": most,
        "met": {"ratio_2_5": ratio <= 2.5, "second_pull_1_s": statistics.median(seconds) <= 1},
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
        found = measure(where, world, arguments.rounds, arguments.mib)
    finally:
        world.close()
        shutil.rmtree(where, ignore_errors=True)
    found["profile"] = "release" if "release" in os.environ.get("CLAWPOT_BIN_DIR", "") else "debug"
    print(json.dumps(found, indent=2))
    (REPO / "bench/images.json").write_text(json.dumps(found, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
