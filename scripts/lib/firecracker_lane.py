"""The Firecracker lane: where it runs, what it needs, what came of it. Called by scripts/test-firecracker."""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

from signals import held

REPO = Path(__file__).resolve().parents[2]
ASSETS = Path(os.environ.get("CLAWPOT_IMAGE_DIR", REPO / "assets"))
TARGET = Path(os.environ.get("CARGO_TARGET_DIR", REPO / "target"))
#: What goes into the dev VM, and what comes back: in the tree, since only that has a place in there.
STAGE = REPO / "target" / "firecracker-lane"
#: The tree in the dev VM.
INSIDE = "/work/clawpot"
SPECIFICATION = REPO / "SPECIFICATION.md"
#: As automake's and Meson's tests have it.
SKIPPED = 77
#: A first line of a guest's kernel takes 0.1 s on hardware. A host with a `/dev/kvm` of another kind took 13 to 42 s.
PROBE_SECONDS = 5
#: Fewer than this would not be the subset.
FEWEST = 10
#: MiB of the dev VM: each guest in it takes 256 and its VMM, beside the server, pytest and Debian.
MEMORY = 3584
#: How much slower guests are in an emulated machine (see tests/integration/harness/tools.py): a boot takes 10 s there.
NESTED_SLOWNESS = 4
#: Seconds that pytest gives a test (tests/integration/pyproject.toml), times the above.
TEST_SECONDS = 180
#: For what is told to end: pytest ends the VMs of a test, and devvm the VM that it was making.
ENDING_SECONDS = 120
MARK = "`make test-firecracker`"
#: The last dies where a test says (crates/failpoint).
PROGRAMS = ("clawpot", "clawpot-server", "clawpot-edge", "clawpot-unpack", "failpoints/clawpot-server")
#: A client made of another project's crate, for the builder's test; skipped without it.
OPTIONAL = ("clawpot-mvm-client",)


class LaneError(Exception):
    """What went wrong, for people."""


class Skip(Exception):
    """Why the lane cannot run here."""


@dataclasses.dataclass(frozen=True)
class Programs:
    firecracker: Path
    jailer: Path

    def describe(self) -> str:
        said = subprocess.run([self.firecracker, "--version"], capture_output=True, text=True, check=False).stdout
        version = re.search(r"v(\S+)", said)
        digest = hashlib.sha256(self.firecracker.read_bytes()).hexdigest()[:16]
        return f"{version[1] if version else '?'}, sha256:{digest}…, {'static' if is_static(self.firecracker) else 'dynamic'}"


def is_static(program: Path) -> bool:
    """An ELF file whose program headers name no interpreter (type 3)."""
    data = program.read_bytes()
    start, size, count = (int.from_bytes(data[at : at + width], "little") for at, width in ((32, 8), (54, 2), (56, 2)))
    return all(int.from_bytes(data[start + n * size :][:4], "little") != 3 for n in range(count))


def find_programs() -> Programs:
    """From FIRECRACKER_BIN, PATH, or what scripts/install-vm-assets.sh fetched."""
    fetched = sorted(ASSETS.glob("firecracker/*/firecracker"))
    named = os.environ.get("FIRECRACKER_BIN") or shutil.which("firecracker") or (str(fetched[-1]) if fetched else None)
    if not named:
        raise Skip("no firecracker: FIRECRACKER_BIN is not set, none is on PATH, scripts/install-vm-assets.sh fetched none")
    firecracker = Path(named).resolve()
    if not os.access(firecracker, os.X_OK):
        raise Skip(f"no firecracker: {firecracker} cannot be run")
    beside = os.environ.get("JAILER_BIN") or firecracker.with_name("jailer")
    jailer = Path(beside) if Path(beside).exists() else Path(shutil.which("jailer") or "")
    if not jailer.is_file():
        raise Skip(f"no jailer: none beside {firecracker}, none on PATH; take both from one release")
    return Programs(firecracker, jailer.resolve())


def git(*words: str) -> str:
    done = subprocess.run(["git", "-C", REPO, *words], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise LaneError(f"git {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout.strip()


def commit() -> str:
    """HEAD; with a plus when the work tree differs from it."""
    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=10", "HEAD") + ("+" if changed else "")
    except LaneError:
        return "unknown"


@dataclasses.dataclass(frozen=True)
class Result:
    lane: str
    commit: str
    vmm: str
    passed: int
    failed: int
    skipped: int
    seconds: float
    status: int
    #: Tests that the run chose: not all of them have a result where it was cut short.
    collected: int

    @property
    def whole(self) -> bool:
        # An error after a test that passed counts beside it.
        return 0 < self.collected <= self.passed + self.failed + self.skipped

    @property
    def good(self) -> bool:
        return self.status == 0 and self.failed == 0 and self.passed >= FEWEST and self.whole

    def counts(self) -> str:
        return f"{self.passed} passed, {self.failed} failed, {self.skipped} skipped; {self.seconds:.0f} s"

    def row(self) -> str:
        return f"| {MARK}, {self.lane} | {self.commit} | {self.vmm} | {self.counts()} |"


def counted(report: Path) -> tuple[int, int, int, int]:
    """Passed, failed, skipped and collected of a JUnit report; the last is told by tests/integration/conftest.py."""
    root = ElementTree.parse(report).getroot()
    suites = list(root.iter("testsuite"))
    told = [int(each.get("value", "0")) for each in root.iter("property") if each.get("name") == "collected"]
    total, failures, errors, skipped = (
        sum(int(suite.get(name, "0")) for suite in suites) for name in ("tests", "failures", "errors", "skipped")
    )
    return total - failures - errors - skipped, failures + errors, skipped, sum(told)


def probe() -> tuple[bool, str]:
    """Whether the server's own probe VM runs here, in its words."""
    if not Path("/dev/kvm").exists():
        return False, "this host has no /dev/kvm"
    sys.path.insert(0, str(REPO / "tests" / "integration"))
    from harness.server import Server  # needs binaries, which are there by now
    from harness.world import World

    world = World()
    world.start()
    try:
        with tempfile.TemporaryDirectory(prefix="clawpot-probe-", dir=TARGET) as directory:
            # However patient the tests are to be: where a kernel needs longer than this, the suite would need a day.
            server = Server(
                world, Path(directory, "state"), "--vmm", "auto", "--warm-slots", "0", "--probe-timeout-secs", PROBE_SECONDS
            )
            try:
                server.start()
                host = server.cli("host", "-o", "json").ok().json
            finally:
                server.close()
    finally:
        world.close()
    return host["vmm"] == "firecracker", host["vmm_reason"]


def pytest_words(python: object, marked: bool, factor: int, report: object, more: Sequence[str]) -> list[str]:
    # A line for each test as it ends: a run takes an hour, and what fails is looked into while the rest goes on.
    words = [str(python), "-m", "pytest", "-v", f"--timeout={TEST_SECONDS * factor}", f"--junitxml={report}"]
    return [*words, *(["-m", "firecracker"] if marked else []), *more]


def environment(bin_dir: object, images: object, programs: Programs, factor: int) -> dict[str, str]:
    return {
        "CLAWPOT_BIN_DIR": str(bin_dir),
        "CLAWPOT_IMAGE_DIR": str(images),
        "CLAWPOT_TEST_VMM": "firecracker",
        "CLAWPOT_TEST_SLOWNESS": str(factor),
        "FIRECRACKER_BIN": str(programs.firecracker),
        "JAILER_BIN": str(programs.jailer),
    }


def slowness(usual: int) -> int:
    """As CLAWPOT_TEST_SLOWNESS says, for a machine that does other work besides."""
    return int(os.environ.get("CLAWPOT_TEST_SLOWNESS", usual))


def run_direct(programs: Programs, more: Sequence[str]) -> tuple[int, Path]:
    STAGE.mkdir(parents=True, exist_ok=True)
    report = STAGE / "report.xml"
    report.unlink(missing_ok=True)
    python = TARGET / "integration-venv" / "bin" / "python"
    given = environment(os.environ["CLAWPOT_BIN_DIR"], ASSETS, programs, slowness(1))
    words = pytest_words(python, False, slowness(1), report, more)
    # What a test has begun pytest ends on Ctrl-C alone.
    status = call(words, signal.SIGINT, cwd=REPO / "tests" / "integration", env={**os.environ, **given})
    return status, report


def call(words: Sequence[object], end: signal.Signals, **how: object) -> int:
    """A command's status. When we are told to end, it is told by that signal, and has the time to end in order."""
    child: subprocess.Popen[bytes] | None = None
    try:
        with held():
            child = subprocess.Popen(words, stdin=subprocess.DEVNULL, **how)  # type: ignore[call-overload]
        return child.wait()
    except BaseException as why:
        if child is not None:
            # Of Ctrl-C the terminal has told it.
            if not isinstance(why, KeyboardInterrupt):
                child.send_signal(end)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(ENDING_SECONDS)
            child.kill()
            child.wait()
        raise


def devvm(*words: str, **how: object) -> int:
    return call([REPO / "utils" / "devvm", *words], signal.SIGTERM, **how)


def ensure_vm() -> bool:
    """Whether it was launched for this run."""
    state = devvm("status", "--json", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    if state == 0:
        return False
    if state == 3:
        if devvm("start") != 0:
            raise LaneError("the dev VM does not start")
        return False
    if devvm("launch", "--profile", "small", "--memory", str(MEMORY)) != 0:
        raise LaneError("no dev VM could be launched")
    return True


def stage(programs: Programs) -> Programs:
    """What the dev VM lacks, in one directory; the programs' places in the dev VM."""
    shutil.rmtree(STAGE, ignore_errors=True)
    for name in ("bin", "bin/failpoints", "images/blobs/sha256", "images/manifests", "firecracker"):
        (STAGE / name).mkdir(parents=True)
    for name in (*PROGRAMS, *OPTIONAL):
        source, to = Path(os.environ["CLAWPOT_BIN_DIR"], name), STAGE / "bin" / name
        if name in OPTIONAL and not source.exists():
            continue
        strip = shutil.which("strip")
        # Debug information is most of a program, and the way in is narrow.
        if not strip or subprocess.run([strip, "-g", "-o", to, source], check=False).returncode != 0:
            shutil.copy(source, to)
    for source, name in ((programs.firecracker, "firecracker"), (programs.jailer, "jailer")):
        shutil.copy(source, STAGE / "firecracker" / name)
    stage_images()
    inside = Path(INSIDE, "target/firecracker-lane/firecracker")
    return Programs(inside / "firecracker", inside / "jailer")


def stage_images() -> None:
    """Kernel, initramfs and the images: what the suite boots."""
    texts = [ASSETS / "boot.json", ASSETS / "manifests" / "debian.json"]
    # Only where it was made; its tests are skipped otherwise.
    texts += [path for path in [ASSETS / "manifests" / "builder.json"] if path.exists()]
    for text in texts:
        shutil.copy(text, STAGE / "images" / text.relative_to(ASSETS))
    named = {digest for text in texts for digest in re.findall(r"sha256:([0-9a-f]{64})", text.read_text())}
    for digest in sorted(named):
        source, to = ASSETS / "blobs" / "sha256" / digest, STAGE / "images/blobs/sha256" / digest
        if not source.exists():
            continue
        try:
            os.link(source, to)
        except OSError:
            shutil.copy2(source, to)


def run_nested(programs: Programs, marked: bool, keep: bool, more: Sequence[str]) -> tuple[int, Path]:
    inside = stage(programs)
    launched = ensure_vm()
    try:
        lane, venv = STAGE.relative_to(REPO), Path("target/integration-venv")
        if devvm("sync", "--with", str(lane), str(venv)) != 0:
            raise LaneError("the tree could not be copied into the dev VM")
        report = f"{INSIDE}/{lane}/report.xml"
        # A VM that was kept has the last run's.
        if devvm("run", f"rm -f {report}") != 0:
            raise LaneError("the dev VM does not run commands; utils/devvm logs")
        given = environment(f"{INSIDE}/{lane}/bin", f"{INSIDE}/{lane}/images", inside, slowness(NESTED_SLOWNESS))
        # The golden image brings them, and the builder's image is copied in: what is missing is a failure.
        given["CLAWPOT_TEST_REQUIRE_TOOLS"] = "1"
        words = pytest_words(f"{INSIDE}/{venv}/bin/python", marked, slowness(NESTED_SLOWNESS), report, more)
        command = (
            f"cd {INSIDE}/tests/integration && env {quoted(f'{name}={value}' for name, value in given.items())} {quoted(words)}"
        )
        status = devvm("run", command)
        fetched = fetch(f"cat {report}", STAGE / "report.xml")
        if status != 0:
            # Logs and consoles of what failed.
            fetch(f"tar -C {INSIDE}/tests/integration -cz report", STAGE / "report.tar.gz")
        if not fetched:
            raise LaneError(f"no report came out of the dev VM; the tests in it ended with status {status}")
        return status, STAGE / "report.xml"
    finally:
        if launched and not keep:
            devvm("destroy")


def quoted(words: Sequence[str] | object) -> str:
    return shlex.join(words)  # type: ignore[arg-type]


def fetch(command: str, to: Path) -> bool:
    with to.open("wb") as file:
        return devvm("run", command, stdout=file) == 0


def may_record(words: argparse.Namespace) -> None:
    """A row stands for a whole run: a part of it would hide what was not run."""
    if not words.record:
        return
    chosen = words.pytest or shlex.split(os.environ.get("PYTEST_ADDOPTS", ""))
    if chosen:
        raise LaneError(
            f"--record is for a whole run, and pytest's arguments may leave tests out: {shlex.join(chosen)}; "
            "run it without them, or without --record"
        )


def record(result: Result) -> None:
    """Its row in SPECIFICATION.md, in place of the lane's earlier one."""
    if "+" in result.commit or result.commit == "unknown":
        raise LaneError(f"not recorded: the work tree is not the commit {result.commit.rstrip('+')}")
    if not result.whole:
        ran = result.passed + result.failed + result.skipped
        raise LaneError(f"not recorded: {ran} of {result.collected} tests have run; pytest ended with status {result.status}")
    # pytest's: all passed, some failed. Others are of a run that broke (255: the way into the VM).
    if result.status not in (0, 1):
        raise LaneError(f"not recorded: pytest ended with status {result.status}")
    SPECIFICATION.write_text(with_row(SPECIFICATION.read_text(), result))


def with_row(text: str, result: Result) -> str:
    lines = text.splitlines()
    begin = next(number for number, line in enumerate(lines) if line.startswith("## Firecracker"))
    rows = [number for number in range(begin, len(lines)) if lines[number].startswith("|")]
    head = f"| {MARK}, {result.lane} |"
    old = [number for number in rows if lines[number].startswith(head)]
    if old:
        lines[old[0]] = result.row()
    else:
        lines.insert(rows[-1] + 1, result.row())
    return "\n".join(lines) + "\n"


def recorded(text: str) -> list[tuple[str, str]]:
    """Lane and commit of each recorded run."""
    rows = re.findall(rf"^\| {re.escape(MARK)}, ([^|]*?) \| ([0-9a-f]+) \|", text, re.MULTILINE)
    return [(lane, commit) for lane, commit in rows]


def check(text: str) -> list[str]:
    """What is to be said of each recorded run, as the work tree stands."""
    rows = recorded(text)
    if not rows:
        return ["never run: SPECIFICATION.md has no row of it"]
    said = []
    for lane, since in rows:
        try:
            changes = git("log", "--format=%h", f"{since}..HEAD", "--", "crates/vmm").split()
            changed = git("status", "--porcelain", "--", "crates/vmm")
        except LaneError as error:
            said.append(f"{lane}: cannot tell whether {since} is current: {error}")
            continue
        if changes or changed:
            more = f"{len(changes)} commit{'' if len(changes) == 1 else 's'}" + (" and the work tree" if changed else "")
            said.append(f"{lane}: not run since {since}: {more} changed crates/vmm")
        else:
            said.append(f"{lane}: current: crates/vmm is as it was in {since}")
    return said


def run(words: argparse.Namespace) -> int:
    programs = find_programs()
    begun, at, vmm = time.monotonic(), commit(), programs.describe()
    direct, why = (False, "as asked") if words.nested else probe()
    print(f"Firecracker runs guests here: {'yes' if direct else 'no'}: {why}", flush=True)
    if words.direct and not direct:
        raise Skip(f"Firecracker runs no guests here, and --direct was given: {why}")
    if direct:
        lane = "direct, full suite"
        status, report = run_direct(programs, words.pytest)
    else:
        lane = f"nested (emulated SVM), {'full suite' if words.full else 'marked subset'}"
        status, report = run_nested(programs, not words.full, words.keep, words.pytest)
    passed, failed, skipped, collected = counted(report)
    result = Result(lane, at, vmm, passed, failed, skipped, time.monotonic() - begun, status, collected)
    (STAGE / "result.json").write_text(json.dumps(dataclasses.asdict(result), indent=1) + "\n")
    word = "PASSED" if result.good else "FAILED"
    print(f"firecracker lane: {word}: {lane}: {result.counts()}; commit {at}, Firecracker {vmm}", flush=True)
    if words.record:
        record(result)
    return 0 if result.good else 1


def parser() -> argparse.ArgumentParser:
    usage = "scripts/test-firecracker [--full] [--direct|--nested] [--keep] [--record] [-- PYTEST ARGUMENT…]"
    top = argparse.ArgumentParser(prog="test-firecracker", usage=usage)
    verbs = top.add_subparsers(dest="verb", required=True)
    verbs.add_parser("check")
    # Both get the script's arguments: what is wrong with them is said before anything is built.
    for verb in (verbs.add_parser(name, prog="test-firecracker", usage=usage) for name in ("find", "run")):
        for flag in ("--full", "--keep", "--record"):
            verb.add_argument(flag, action="store_true")
        where = verb.add_mutually_exclusive_group()
        where.add_argument("--direct", action="store_true")
        where.add_argument("--nested", action="store_true")
        verb.add_argument("pytest", nargs="*")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    words = parser().parse_args(argv)
    # A time limit from outside: the dev VM that was launched for this is destroyed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        if words.verb == "check":
            print("\n".join(f"firecracker lane: {line}" for line in check(SPECIFICATION.read_text())))
            return 0
        may_record(words)
        if words.verb == "find":
            find_programs()
            return 0
        return run(words)
    except Skip as skip:
        print(f"firecracker lane: SKIPPED: {skip}", flush=True)
        return SKIPPED
    except (LaneError, OSError, ElementTree.ParseError) as error:
        print(f"firecracker lane: FAILED: {error}", file=sys.stderr, flush=True)
        return 1


if __name__ == "__main__":
    sys.exit(main())
