"""The server dies after each of its effects in turn; the next one finishes what was asked for, and nothing is left.

Guests do not boot in most of these lives: what the host is asked for is over when a guest's kernel begins. Two servers side by
side, one that makes its network slots when they are asked for, one with a slot ahead.
"""

import hashlib
import io
import json
import os
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from conftest import LIVING
from harness import images
from harness.cli import binaries
from harness.crashes import AFTERMATH, ODD, VERBS, Lives, Mortal, Tally, all_points, program, together
from harness.server import ASSETS, VMM
from harness.tools import until, within
from harness.world import World

#: Points that not every host has: this one needs version-1 hierarchies.
ELSEWHERE = {"host.cgroup_confined"}
#: Points that only one VMM has; what the others are reached under is the suite's VMM.
FIRECRACKERS = "firecracker."
QEMUS = {"vmm.served"}
#: Of what these lives have none of: volumes (test_volumes.py), images and builds (below).
OTHERS = ("volume.", "library.", "build.")
#: Random lives, each with up to four deaths; `make crash-cycles N=200`.
CYCLES = int(os.environ.get("CLAWPOT_CRASH_CYCLES", "10"))
SEED = int(os.environ.get("CLAWPOT_CRASH_SEED", str(int(time.time()))))
#: What a server that died left half made, and no record knows, goes this much after the next one came up, seconds.
GRACE = 1
#: Orders for one point before it is taken for one that is never reached.
TRIES = 6


@pytest.fixture(scope="module")
def lives(world: World, workdir: Path) -> Iterator[list[Lives]]:
    servers = [
        Mortal(world, workdir / f"mortal{slots}", "--warm-slots", slots, "--stray-grace-secs", GRACE) for slots in (0, 1)
    ]
    LIVING.extend(servers)
    made = [Lives(server, Tally(), SEED + number) for number, server in enumerate(servers)]
    # What is passed when guests boot is learnt once.
    together([lambda one=one, number=number: one.learn(booted=number == 0) for number, one in enumerate(made)])
    yield made
    left = [f"{server.state_dir.name}: {thing}" for server in servers for thing in server.close()]
    for server in servers:
        LIVING.remove(server)
    assert not left, "\n".join(left)


def _run(lives: list[Lives], next_life: Callable[[Lives], bool]) -> Tally:
    """Both go on until there is no next life or something is wrong."""
    tally = Tally()

    def work(one: Lives) -> None:
        one.tally = tally
        try:
            while not tally.wrong and next_life(one):
                pass
        except Exception as broken:
            tally.wrong.append(f"{one.server.state_dir.name}: {broken!r}")

    together([lambda one=one: work(one) for one in lives])
    print(f"seed {SEED}: {tally.told()}")
    assert not tally.wrong, f"seed {SEED}:\n" + "\n".join(tally.wrong)
    return tally


def _has(point: str) -> bool:
    """Whether the suite's VMM has this point."""
    return point not in QEMUS if VMM == "firecracker" else not point.startswith(FIRECRACKERS)


@pytest.mark.timeout(within(900))
def test_every_failpoint(lives: list[Lives]) -> None:
    """Each point once, in whichever verb passes it; one that is never passed is a test that is not made."""
    _die_at_each(lives, {point for point in all_points() if _has(point) and not point.startswith(OTHERS)})


@pytest.mark.firecracker
@pytest.mark.skipif(VMM != "firecracker", reason="Firecracker's points are reached in its lane: make test-firecracker")
def test_firecrackers_failpoints(lives: list[Lives]) -> None:
    """Of the points those that no other VMM has, for the lane's subset."""
    points = {point for point in all_points() if point.startswith(FIRECRACKERS)}
    assert len(points) == 4, points
    _die_at_each(lives, points)


def _die_at_each(lives: list[Lives], points: set[str]) -> None:
    assert not [wrong for one in lives for wrong in one.tally.wrong]
    todo = dict.fromkeys(sorted(points), TRIES)
    lock = threading.Lock()

    def choose(one: Lives, verb: str, chosen: dict[str, int]) -> tuple[str, int] | None:
        with lock:
            mine = [point for point in todo if point in one.known[verb]]
            if not mine:
                return None
            # The one that the fewest verbs pass: others get their turn elsewhere.
            point = min(mine, key=lambda point: sum(point in hits for hits in one.known.values()))
            chosen[point] = todo.pop(point)
            return point, one.random.randint(1, one.known[verb].count(point))

    def next_life(one: Lives) -> bool:
        with lock:
            mine = {verb: [point for point in todo if point in hits] for verb, hits in one.known.items()}
        if not any(mine.values()):
            return False
        chosen: dict[str, int] = {}
        booted = "control.guest_asked" in mine["stop"]
        usual = {point for verb in VERBS for point in one.known[verb]}
        odd = any(point not in usual for verb in ODD for point in mine[verb])
        one.live(lambda verb: choose(one, verb, chosen), sized=bool(mine["create sized"]), booted=booted, odd=odd)
        with lock:
            todo.update({point: tries - 1 for point, tries in chosen.items() if tries > 1 and not one.tally.deaths[point]})
        return True

    tally = _run(lives, next_life)
    missing = points - set(tally.deaths)
    assert not missing - ELSEWHERE, f"no server died there: {sorted(missing)}"


@pytest.mark.timeout(within(300 + 60 * CYCLES))
def test_random_deaths(lives: list[Lives]) -> None:
    """Any point at any hit, of up to four verbs of a life and of the server that comes up after it."""
    left = CYCLES
    lock = threading.Lock()

    def next_life(one: Lives) -> bool:
        nonlocal left
        with lock:
            if not left:
                return False
            left -= 1
        chance = one.random.random
        one.live(
            lambda verb: one.pick(verb) if chance() < 0.75 else None,
            sized=chance() < 0.2,
            booted=chance() < 0.2,
            odd=chance() < 0.25,
            doubly=0.2,
        )
        return True

    tally = _run(lives, next_life)
    assert tally.lives == CYCLES
    assert tally.deaths.total() >= CYCLES, tally.told()
    assert AFTERMATH and tally.missed.total() <= tally.deaths.total() / 2, dict(tally.missed)


FLAKE = Path(__file__).resolve().parent / "fixtures/flake"


@pytest.fixture(scope="module")
def maker(world: World, workdir: Path) -> Iterator[Mortal]:
    """A server with a store of its own, that makes images."""
    store = images.copy(ASSETS, workdir / "maker-store")
    helper = program().with_name("clawpot-unpack")
    # Where it was built, it is; what was carried elsewhere is whole files.
    if not helper.exists():
        helper.symlink_to(binaries() / "clawpot-unpack")
    server = Mortal(world, workdir / "maker", "--warm-slots", 0, "--stray-grace-secs", GRACE, image_dir=store)
    LIVING.append(server)
    yield server.start()
    left = server.close()
    LIVING.remove(server)
    assert not left, "\n".join(left)


def _archive(path: Path, text: str) -> None:
    """As `docker save` writes it: an image of one file that says `text`."""

    def tar(files: dict[str, bytes]) -> bytes:
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as archive:
            for name, data in files.items():
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))
        return packed.getvalue()

    layer = tar({"etc/text": text.encode()})
    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer).hexdigest()}"]},
    }
    saved = [{"Config": "config.json", "RepoTags": [], "Layers": ["layer.tar"]}]
    files = {"config.json": json.dumps(config).encode(), "layer.tar": layer, "manifest.json": json.dumps(saved).encode()}
    path.write_bytes(tar(files))


def _dies(server: Mortal, point: str, *words: object) -> None:
    """At this point of a command, which its client is told of; the next server comes up."""
    server.arm(point, 1)
    server.cli(*words).fails(1)
    until(server.died, what=f"its death at {point}")
    assert server.hits()[-1] == point
    server.process = None
    server.start()


def test_images_of_a_server_that_dies(maker: Mortal, workdir: Path) -> None:
    """At each point of an import; the next server has the image whole or not at all, and an import gives it."""
    points = [point for point in all_points() if point.startswith("library.")]
    assert len(points) == 7, points
    archive = workdir / "archive.tar"
    for number, point in enumerate(points):
        _archive(archive, f"text {number}")
        name = f"made{number}"
        _dies(maker, point, "image", "import", archive, "--name", name)
        there = maker.cli("image", "inspect", name).code == 0
        assert there == (point == "library.named"), point
        maker.cli("image", "import", archive, "--name", name).ok()
        maker.cli("image", "inspect", name).ok()
        cache = maker.image_dir / "cache"
        until(lambda cache=cache: not [path for path in cache.iterdir() if path.is_dir()], what=f"nothing half made of {point}")
        maker.cli("image", "rm", name).ok()


def test_builds_of_a_server_that_dies(maker: Mortal) -> None:
    """Before anything is built: of the build nothing is left, its VM neither. Whatever image the builder is to be of."""
    points = [point for point in all_points() if point.startswith("build.")]
    assert len(points) == 3, points
    before = maker.steady()
    for point in points:
        _dies(maker, point, "build", f"path:{FLAKE}", "--builder", "debian", "--tag", "built")
        until(lambda: not maker.cli.ls() and not list((maker.state_dir / "builds").iterdir()), what=f"nothing left of {point}")
        assert not maker.settle(before)
