"""Pages of docs/tutorials/: what stands in their `bash` blocks is run, what stands in a `text` block behind one must come out.

A page's blocks are one shell session, from top to bottom: variables, the directory and background jobs stay. The first command
that fails ends it. In a `text` block `…` stands for anything within a line, and a line of nothing else for any number of lines.
Other blocks are for readers only. A page may say what it needs, where readers do not see it:

    <!-- tutorial: tools=buildah,skopeo images=builder seconds=300 -->

Programs on PATH, names in the image store, and how long it may take.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from .server import Server
from .tools import REPO, within

PAGES = REPO / "docs/tutorials"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NEEDS = re.compile(r"^<!-- tutorial: (.*) -->$", re.MULTILINE)


@dataclass(frozen=True)
class Step:
    line: int
    script: str
    #: What the page shows of its output; nothing: it is not looked at.
    shown: str | None


@dataclass(frozen=True)
class Page:
    path: Path
    steps: list[Step]
    tools: list[str] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    seconds: int = 180

    def missing(self) -> list[str]:
        return [tool for tool in self.tools if not shutil.which(tool)]


def read(path: Path) -> Page:
    text = path.read_text(encoding="utf-8")
    steps: list[Step] = []
    before = None
    for block in FENCE.finditer(text):
        kind, body = block.groups()
        if kind == "text" and before == "bash":
            steps[-1] = Step(steps[-1].line, steps[-1].script, body)
        elif kind == "bash":
            steps.append(Step(text.count("\n", 0, block.start()) + 2, body, None))
        before = kind
    needs = dict(pair.split("=", 1) for found in NEEDS.finditer(text) for pair in found[1].split())
    unknown = needs.keys() - {"tools", "images", "seconds"}
    assert steps and not unknown, f"{path}: no bash block, or needs that nobody knows: {unknown}"
    words = {key: [word for word in needs.get(key, "").split(",") if word] for key in ("tools", "images")}
    return Page(path, steps, words["tools"], words["images"], int(needs.get("seconds", 180)))


def matches(shown: str, said: str) -> bool:
    lines = []
    for line in shown.splitlines():
        any_line = line.strip() == "…"
        lines.append(r"(?:.*\n)*" if any_line else ".*".join(map(re.escape, line.rstrip().split("…"))) + r"[ \t]*\n")
    return re.fullmatch("".join(lines), said if said.endswith("\n") or not said else said + "\n") is not None


def run(page: Page, server: Server, where: Path) -> None:
    """Runs the page as a user of `server` in an empty directory, in the host of its world."""
    home = where / "home"
    home.mkdir(parents=True)
    # Each step is a group of commands of one shell, so that only its output goes elsewhere.
    parts = [f"{{\n{step.script}}} >'{where}/{number}.out'\n" for number, step in enumerate(page.steps)]
    (where / "page.bash").write_text("set -euo pipefail\nPS4='+ '\nset -x\n" + "".join(parts), encoding="utf-8")
    log = where / "page.log"
    with log.open("wb") as errors:
        words = [*server.world.enter(), "bash", str(where / "page.bash")]
        shell = subprocess.Popen(
            words, cwd=home, env=_environment(server, where), stdin=subprocess.DEVNULL, stderr=errors, start_new_session=True
        )
        try:
            code: int | None = shell.wait(within(page.seconds))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            # With what it left in the background; the group is of this shell's making.
            _end(shell)
    done = sorted(int(path.stem) for path in where.glob("*.out"))
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-25:])
    for number in done:
        step, said = page.steps[number], (where / f"{number}.out").read_text(errors="replace")
        at = f"{os.path.relpath(page.path, REPO)}:{step.line}"
        if code != 0 and number == done[-1]:
            how = f"ended with {code}" if code is not None else f"took over {page.seconds} s"
            raise AssertionError(f"{at} {how}:\n{step.script}\n--- stdout\n{said[-2000:]}\n--- stderr\n{tail}")
        if step.shown is not None and not matches(step.shown, said):
            raise AssertionError(f"{at}: the page shows\n{step.shown}\nand it says\n{said[-2000:]}")
    assert code == 0, f"{page.path}: the shell ended with {code}:\n{tail}"


def _end(shell: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(shell.pid, signal.SIGKILL)
    shell.wait()


def _environment(server: Server, where: Path) -> dict[str, str]:
    # Where buildah and skopeo keep what they have, with a driver that needs no privilege.
    storage = where / "storage.conf"
    storage.write_text(f'[storage]\ndriver = "vfs"\ngraphroot = "{where}/containers"\nrunroot = "{where}/run"\n')
    own = {"HOME": str(where / "home"), "CONTAINERS_STORAGE_CONF": str(storage), "BUILDAH_ISOLATION": "chroot"}
    own["CLAWPOT_IMAGE_DIR"] = str(server.image_dir)
    path = f"{server.cli.binary.parent}:{os.environ['PATH']}"
    return {**server.cli.environment(), **own, "PATH": path, "LC_ALL": "C.UTF-8", "TMPDIR": str(where)}
