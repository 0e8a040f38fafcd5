"""What every script says of itself, before it does anything."""

import os
import shutil
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


def test_lints_of_nothing_are_no_pass(tmp_path: Path) -> None:
    """The whole script where git names no file: what looked at none must not be told as done."""
    target = Path(os.environ.get("CARGO_TARGET_DIR", REPO / "target"))
    if not shutil.which("shellcheck") or not (target / "python-tools/wanted").exists():
        pytest.skip("what scripts/lint.sh installs is not here")
    tree = tmp_path / "tree"
    (tree / "scripts").mkdir(parents=True)
    shutil.copytree(REPO / "scripts/lib", tree / "scripts/lib", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPO / "scripts/lint.sh", tree / "scripts")
    (tree / "Cargo.toml").write_text('rust-version = "1.2"\n')
    cargo = tmp_path / "bin/cargo"
    cargo.parent.mkdir()
    cargo.write_text("#!/bin/sh\necho cargo 1.2.0\n")
    cargo.chmod(0o755)
    env = {"PATH": f"{cargo.parent}:{os.environ['PATH']}", "HOME": str(tmp_path), "CARGO_TARGET_DIR": str(target)}
    env["GIT_CEILING_DIRECTORIES"] = str(tmp_path)
    done = subprocess.run([tree / "scripts/lint.sh"], env=env, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1 and "✗ shellcheck" in done.stderr, done
    assert "✓ cargo fmt" in done.stderr and "not a git repository" in done.stderr, done
