"""The Firecracker lane's own logic: it never passes without having run, and knows when its record is out of date."""

import os
import subprocess
import sys
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
    assert specification.read_text() == SPECIFICATION
    lane.record(result(status=1, failed=1))
    assert "1 failed" in specification.read_text()


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
