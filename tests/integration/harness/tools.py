"""Small things that all others use."""

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

REPO = Path(__file__).resolve().parents[3]

#: How many times slower this host is than the one that the tests' limits were written for: an emulator in an emulator is.
#: It stretches every limit, and no test asserts less.
SLOWNESS = float(os.environ.get("CLAWPOT_TEST_SLOWNESS", "1"))

T = TypeVar("T")


def within(seconds: float) -> float:
    """A limit of this many seconds, as long as it has to be on this host."""
    return seconds * SLOWNESS


def run(*argv: object, check: bool = True, stdin: str | None = None, seconds: float = 120) -> str:
    """A tool's stdout; what it said on stderr is in the error."""
    words = [str(word) for word in argv]
    done = subprocess.run(words, input=stdin, capture_output=True, text=True, timeout=within(seconds), check=False)
    if check and done.returncode != 0:
        raise RuntimeError(f"{' '.join(words)}: exit {done.returncode}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def until(look: Callable[[], T | None], seconds: float = 60, what: str = "it", every: float = 0.05) -> T:
    """The first true value that `look` gives."""
    deadline = time.monotonic() + within(seconds)
    while True:
        if found := look():
            return found
        if time.monotonic() > deadline:
            raise AssertionError(f"{what}: not so within {seconds:g} s")
        time.sleep(every)


def children_of_mount(prefix: Path) -> list[str]:
    """Mount points at or below `prefix`."""
    points = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return [point for point in points if point == str(prefix) or point.startswith(f"{prefix}/")]
