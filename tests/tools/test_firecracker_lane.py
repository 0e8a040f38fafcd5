"""The Firecracker lane's own logic: it never passes without having run, and knows when its record is out of date."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO / "scripts" / "lib"))
import firecracker_lane as lane  # noqa: E402

SPECIFICATION = """# Specification

## Firecracker

| lane | commit | VMM | result |
|---|---|---|---|
| by hand | abc1234 | 1.16.1 | all pass |

Some words.
"""


def result(**changes: object) -> lane.Result:
    told = {"lane": "nested, subset", "commit": "0123456789", "vmm": "1.16.1", "status": 0, "seconds": 61.2}
    return lane.Result(**{**told, "passed": 40, "failed": 0, "skipped": 1, "collected": 41, **changes})


def test_without_firecracker_it_is_skipped_and_says_why(tmp_path: Path) -> None:
    """The whole script, as `make test-firecracker` runs it: nothing is built, and no exit code of success."""
    kept = {name: value for name, value in os.environ.items() if name not in ("FIRECRACKER_BIN", "JAILER_BIN")}
    env = {**kept, "CLAWPOT_IMAGE_DIR": str(tmp_path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([REPO / "scripts/test-firecracker"], env=env, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == lane.SKIPPED, done
    assert done.stdout.splitlines()[-1].startswith("firecracker lane: SKIPPED: no firecracker: ")
    alone = tmp_path / "firecracker"
    alone.write_text("#!/bin/sh\necho Firecracker v1.16.1\n")
    alone.chmod(0o755)
    env["FIRECRACKER_BIN"] = str(alone)
    done = subprocess.run([REPO / "scripts/test-firecracker"], env=env, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, "SKIPPED: no jailer" in done.stdout) == (lane.SKIPPED, True), done


@pytest.mark.parametrize(
    "changes",
    [
        {"failed": 1},
        {"status": 1},
        {"passed": 0},
        {"passed": lane.FEWEST - 1, "collected": lane.FEWEST},
        {"passed": 0, "skipped": 50},
        {"collected": 42},
        {"collected": 0},
    ],
)
def test_what_is_no_pass(changes: dict[str, int]) -> None:
    assert result().good
    assert not result(**changes).good


def test_a_report_is_counted(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    suite = '<testsuite tests="12" failures="1" errors="2" skipped="3">'
    told = '<properties><property name="collected" value="14"/></properties>'
    report.write_text(f"<testsuites>{suite}{told}</testsuite></testsuites>")
    assert lane.counted(report) == (6, 3, 3, 14)
    report.write_text(f"<testsuites>{suite}</testsuite></testsuites>")
    assert lane.counted(report) == (6, 3, 3, 0)


def test_a_run_that_was_cut_short_tells_how_many_tests_it_had(tmp_path: Path) -> None:
    """pytest itself, with the suite's own conftest: the second of three tests ends the run."""
    conftest = (REPO / "tests/integration/conftest.py").read_text()
    begin = conftest.index('@pytest.fixture(scope="session", autouse=True)')
    fixture = conftest[begin : conftest.index("\n\n\n", begin)]
    (tmp_path / "conftest.py").write_text(f"from collections.abc import Callable\nimport pytest\n{fixture}\n")
    tests = "def test_a(): pass\ndef test_b(): raise KeyboardInterrupt\ndef test_c(): pass\n"
    (tmp_path / "test_three.py").write_text(tests)
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--junitxml=report.xml", "test_three.py"]
    subprocess.run(words, cwd=tmp_path, capture_output=True, check=False, timeout=60)
    passed, failed, skipped, collected = lane.counted(tmp_path / "report.xml")
    assert (passed + failed + skipped < 3, collected) == (True, 3)
    assert not result(passed=passed, failed=failed, skipped=skipped, collected=collected).whole


def test_a_row_takes_the_place_of_the_last_one() -> None:
    once = lane.with_row(SPECIFICATION, result())
    assert lane.recorded(once) == [("nested, subset", "0123456789")]
    twice = lane.with_row(once, result(commit="ffff", failed=1))
    assert lane.recorded(twice) == [("nested, subset", "ffff")]
    assert "40 passed, 1 failed, 1 skipped; 61 s" in twice
    both = lane.with_row(twice, result(lane="nested, full suite"))
    assert [name for name, _ in lane.recorded(both)] == ["nested, subset", "nested, full suite"]
    assert both.endswith("|\n\nSome words.\n"), "the table stays one"


def test_a_tree_that_is_not_its_commit_is_not_recorded() -> None:
    with pytest.raises(lane.LaneError, match="not recorded"):
        lane.record(result(commit="0123456789+"))


def test_a_part_of_the_suite_is_not_recorded_as_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before anything is built; a run that was cut short is found out at its end."""
    env = {**os.environ, "FIRECRACKER_BIN": str(tmp_path / "none")}
    for words, more in {
        ("--full", "--record", "--", "-k", "a crash"): {},
        ("--record", "--", "-x"): {},
        ("--record",): {"PYTEST_ADDOPTS": "--deselect test_x.py"},
    }.items():
        done = subprocess.run(
            [REPO / "scripts/test-firecracker", *words], env=env | more, capture_output=True, text=True, check=False, timeout=60
        )
        assert done.returncode == 1 and "FAILED: --record is for a whole run" in done.stderr, (words, done)
    # Without --record they are what they were.
    done = subprocess.run(
        [REPO / "scripts/test-firecracker", "--", "-k", "x"], env=env, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == lane.SKIPPED and "cannot be run" in done.stdout, done
    specification = tmp_path / "SPECIFICATION.md"
    specification.write_text(SPECIFICATION)
    monkeypatch.setattr(lane, "SPECIFICATION", specification)
    # pytest's exit code is 1, too, where what a test leaves behind is found after an interrupt.
    for changes in ({"status": 2, "collected": 50}, {"status": 1, "failed": 1, "collected": 50}, {"collected": 0}):
        with pytest.raises(lane.LaneError, match=r"not recorded: 4\d of "):
            lane.record(result(**changes))
    # All have a result, and yet it ended as no run of pytest's does: another run's report.
    with pytest.raises(lane.LaneError, match="not recorded: pytest ended with status 255"):
        lane.record(result(status=255))
    assert specification.read_text() == SPECIFICATION
    lane.record(result(status=1, failed=1))
    assert "1 failed" in specification.read_text()


def test_what_is_missing_is_said_before_anything_is_built(tmp_path: Path) -> None:
    """On a machine with few programs, and no apt to bring others."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("bash", "dirname", "sort"):
        (programs / name).symlink_to(str(shutil.which(name)))
    for name in ("firecracker", "jailer"):
        executable(programs / name, "exit 0")
    kept = {
        name: value for name, value in os.environ.items() if name not in ("FIRECRACKER_BIN", "JAILER_BIN", "CLAWPOT_BIN_DIR")
    }
    env = {**kept, "PATH": str(programs), "CLAWPOT_IMAGE_DIR": str(tmp_path)}
    for words, lacking in {(): True, ("--direct",): False}.items():
        done = subprocess.run([REPO / "scripts/test-firecracker", *words], env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 1 and done.stderr.startswith("error: missing: "), done
        assert " gcc " in done.stderr and (" rsync " in done.stderr) == lacking, done


def executable(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["#!/bin/bash", *lines, ""]))
    path.chmod(0o755)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A tree with the lane's program, what it stages, and a stand-in for devvm that runs commands right here."""
    made = tmp_path / "tree"
    (made / "scripts/lib").mkdir(parents=True)
    for name in ("firecracker_lane.py", "signals.py"):
        shutil.copy(REPO / "scripts/lib" / name, made / "scripts/lib")
    (made / "SPECIFICATION.md").write_text(SPECIFICATION)
    for name in (*lane.PROGRAMS, "firecracker", "jailer"):
        executable(made / "bin" / name, "echo Firecracker v1.2.3")
    for name in ("boot.json", "manifests/debian.json"):
        (made / "assets" / name).parent.mkdir(exist_ok=True)
        (made / "assets" / name).write_text("{}")
    executable(
        made / "utils/devvm",
        f'echo "$1 ${{2%% *}}" >>{tmp_path}/log',
        # As in bash -c of the VM: /work/clawpot is the directory "inside".
        f'case $1 in run) exec bash -c "${{2//\\/work\\/clawpot/{tmp_path}/inside}}" ;; status) exit ${{STATE:-0}} ;; esac',
    )
    (tmp_path / "inside/target/firecracker-lane").mkdir(parents=True)
    (tmp_path / "inside/tests/integration").mkdir(parents=True)
    return made


def begin(tree: Path, *words: str, **more: str) -> subprocess.Popen[str]:
    env = {**os.environ, "CLAWPOT_BIN_DIR": str(tree / "bin"), "CLAWPOT_IMAGE_DIR": str(tree / "assets"), **more}
    env |= {"FIRECRACKER_BIN": str(tree / "bin/firecracker"), "GIT_CEILING_DIRECTORIES": str(tree.parent)}
    command = [sys.executable, tree / "scripts/lib/firecracker_lane.py", "run", "--nested", *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=env, text=True, **pipes)  # type: ignore[call-overload]


def test_a_broken_run_is_not_given_the_report_of_the_last_one(tree: Path, tmp_path: Path) -> None:
    report = tmp_path / "inside/target/firecracker-lane/report.xml"
    report.write_text('<testsuites><testsuite tests="41" failures="0" errors="0" skipped="0"/></testsuites>')
    executable(tmp_path / "inside/target/integration-venv/bin/python", "exit 255")
    run = begin(tree, "--record")
    out, err = run.communicate(timeout=60)
    assert run.returncode == 1 and "no report came out of the dev VM; the tests in it ended with status 255" in err, (out, err)
    assert "passed" not in out
    assert (tree / "SPECIFICATION.md").read_text() == SPECIFICATION


@pytest.mark.parametrize("during", ["launch", "run"])
def test_a_lane_that_is_told_to_end_leaves_no_dev_vm(tree: Path, tmp_path: Path, during: str) -> None:
    """It waits for what it runs, which ends in order, and destroys what it launched."""
    devvm = (tree / "utils/devvm").read_text().splitlines()
    waits, log = tmp_path / "waits", tmp_path / "log"
    told = f"trap 'kill $!; sleep 0.5; echo told >>{log}; exit 143' TERM"
    slow = f"if [[ $1 == {during} ]]; then {told}; sleep 600 & touch {waits}; wait $!; fi"
    executable(tree / "utils/devvm", devvm[1], slow, *devvm[2:])
    run = begin(tree, STATE="4")
    until(waits.exists, run)
    run.send_signal(signal.SIGTERM)
    assert run.wait(60) == 143
    run.communicate()
    assert log.read_text().splitlines()[-2:] == {"launch": ["launch --profile", "told"], "run": ["told", "destroy "]}[during]


def test_what_was_just_begun_is_told_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal comes between the child's start and our knowing of it."""
    begun: list[subprocess.Popen[bytes]] = []
    really = subprocess.Popen

    def interrupted(*words: object, **how: object) -> subprocess.Popen[bytes]:
        begun.append(really(*words, **how))  # type: ignore[call-overload]
        os.kill(os.getpid(), signal.SIGTERM)
        return begun[0]

    monkeypatch.setattr(subprocess, "Popen", interrupted)
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        with pytest.raises(SystemExit, match="143"):
            lane.call(["sleep", "600"], signal.SIGTERM)
        assert begun[0].poll() == -signal.SIGTERM, "it runs, and nobody knows of it"
    finally:
        signal.signal(signal.SIGTERM, before)
        begun[0].kill()
        begun[0].wait()


def until(reached: Callable[[], bool], run: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not reached():
        assert run.poll() is None, run.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(lane, "REPO", tmp_path)
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "crates/vmm").mkdir(parents=True)
    commit(tmp_path, "crates/vmm/lib.rs", "one")
    return tmp_path


def commit(repository: Path, name: str, text: str) -> str:
    (repository / name).write_text(text)
    who = ("-c", "user.name=test", "-c", "user.email=test@example.invalid", "-c", "commit.gpgsign=false")
    for words in (["init", "-q"], ["add", "-A"], [*who, "commit", "-q", "-m", "a change"]):
        subprocess.run(["git", *words], cwd=repository, check=True, capture_output=True)
    return lane.git("rev-parse", "--short=10", "HEAD")


def test_a_change_of_the_driver_makes_the_record_old(repository: Path) -> None:
    first = lane.commit()
    text = lane.with_row(SPECIFICATION, result(commit=first))
    assert lane.check(text) == [f"nested, subset: current: crates/vmm is as it was in {first}"]
    commit(repository, "README.md", "another room")
    assert "current" in lane.check(text)[0]
    (repository / "crates/vmm/lib.rs").write_text("not committed")
    assert lane.check(text)[0].startswith(f"nested, subset: not run since {first}: 0 commits and the work tree")
    assert lane.commit().endswith("+")
    commit(repository, "crates/vmm/lib.rs", "two")
    assert lane.check(text) == [f"nested, subset: not run since {first}: 1 commit changed crates/vmm"]


def test_what_cannot_be_told_is_not_called_current(repository: Path) -> None:
    del repository
    assert lane.check(SPECIFICATION) == ["never run: SPECIFICATION.md has no row of it"]
    (said,) = lane.check(lane.with_row(SPECIFICATION, result(commit="0123456789")))
    assert "cannot tell" in said
