"""What every script says of itself, before it does anything."""

import os
import subprocess
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
#: Run in the inner VM alone, with arguments that are all pytest's.
WITHOUT = {"ci/run-tests"}
SCRIPTS = sorted(
    name
    for path in (*REPO.glob("scripts/*"), *REPO.glob("ci/*"), *REPO.glob("utils/*"))
    if path.is_file() and os.access(path, os.X_OK) and (name := str(path.relative_to(REPO))) not in WITHOUT
)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_a_help_and_does_nothing_else(script: str, tmp_path: Path) -> None:
    # Whatever it began would need one of these.
    env = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "CLAWPOT_IMAGE_DIR": str(tmp_path / "images")}
    env |= {"CARGO_TARGET_DIR": str(tmp_path / "target"), "CLAWPOT_VM_DIR": str(tmp_path / "vms")}
    done = subprocess.run(
        [REPO / script, "--help"], env=env, capture_output=True, text=True, check=False, timeout=60, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0 and not done.stderr, done
    assert len(done.stdout.splitlines()) > 1, done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_demo_has_no_arguments() -> None:
    done = subprocess.run([REPO / "scripts/demo", "--fast"], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1 and "unknown argument: --fast" in done.stderr, done
