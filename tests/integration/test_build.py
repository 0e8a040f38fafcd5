"""`clawpot build`: a flake becomes an image in a VM of its own, whatever the flake does, and nothing else is left."""

import gzip
import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from harness import images
from harness.server import ASSETS, Server
from harness.tools import until, within

FLAKE = Path(__file__).resolve().parent / "fixtures/flake"

if not (ASSETS / "manifests/builder.json").exists():
    pytest.skip("no builder's image: scripts/setup-builder.sh makes it", allow_module_level=True)


@pytest.fixture(scope="module")
def flake(workdir: Path) -> Path:
    """The flake of fixtures/, with this host's kernel beside it."""
    copy = workdir / "machine"
    shutil.copytree(FLAKE, copy)
    kernel = images.boot_file(ASSETS, "kernel").read_bytes()
    (copy / "kernel.gz").write_bytes(gzip.compress(kernel, compresslevel=1))
    return copy


@pytest.fixture(scope="module")
def here(session_server: Callable[..., Server], workdir: Path) -> Server:
    """A server with a store of its own."""
    return session_server("build", image_dir=images.copy(ASSETS, workdir / "build-store")).start()


def nothing_left(server: Server) -> None:
    assert server.cli.ls() == []
    assert [path.name for path in (server.state_dir / "builds").iterdir()] == []
    assert list((server.state_dir / "disks").glob("*.ext4")) == []


def build(server: Server, flake: Path, attr: str = "", *more: object, timeout: float = 300):
    target = f"path:{flake}#{attr}" if attr else f"path:{flake}"
    return server.cli("build", target, *more, timeout=timeout)


@pytest.mark.firecracker
@pytest.mark.timeout(within(700))
def test_a_flake_becomes_an_image_that_boots(here: Server, flake: Path) -> None:
    before = here.steady()
    built = build(here, flake, "", "--tag", "machine", "--memory", "768").ok()
    assert built.text == "machine\n"
    # As nix said it, while it ran.
    assert "building the root file system" in built.stderr
    nothing_left(here)
    image = here.cli("image", "inspect", "machine", "-o", "json").ok().json
    told = [event for event in here.cli("events", "-o", "json").ok().lines if event["kind"] == "image.build"]
    assert [event["message"] for event in told] == [f"machine: {image['digest']}"]
    revision = image["revision"]
    assert image["kernel_digest"] == json.loads((ASSETS / "boot.json").read_text())["kernel"]["digest"]
    assert revision["attr"] == "" and revision["network"] == "none" and revision["lock_digest"] is None
    assert revision["source_digest"].startswith("sha256:") and revision["out_path"].startswith("/nix/store/")
    log = here.cli("image", "log", "machine").ok().text
    assert log.startswith(f"== path:{flake} as machine, for uid=0\n") and log.endswith(f"== built: {image['digest']}\n")
    assert "building the root file system" in log
    assert here.cli("image", "log", revision["build"]).ok().text == log
    assert revision["kernel_release"].startswith("6.") and revision["started_at"] < revision["finished_at"]

    ran = here.cli(
        "run",
        "--rm",
        "machine",
        "--",
        "/bin/sh",
        "-c",
        "/bin/cat /etc/hello; /bin/uname -r",
        timeout=within(90),
    ).ok()
    assert ran.text.splitlines() == ["built by a flake", revision["kernel_release"]]

    # The same again needs no VM, under this name and under another; and another name is not taken from what it means.
    again = build(here, flake, "", "--tag", "again", "-o", "json", timeout=90).ok()
    assert again.json["cached"] and again.json["digest"] == image["digest"] and "nothing ran" in again.stderr
    assert build(here, flake, "", "--tag", "machine", timeout=90).ok().text == "machine\n"
    told = [event for event in here.cli("events", "-o", "json").ok().lines if event["kind"] == "image.build"]
    assert told[1]["message"] == f"again: {image['digest']}, as built before" and told[1]["actor"] == "uid=0"
    build(here, flake, "", "--tag", "debian", timeout=90).fails(1, "debian", "means", "--replace")
    build(here, flake, "fails", "--tag", "machine", timeout=90).fails(1, "machine", "means", "--replace")
    nothing_left(here)
    assert not here.settle(before)


#: Attribute, further arguments, what is said.
BAD = {
    "no-such-attribute": ("there-is-none", (), ["the build failed"]),
    "fails": ("fails", (), ["this is the reason", "the build failed"]),
    "no-kernel": ("no-kernel", (), ["kernel"]),
    "strange-kernel": ("strange-kernel", (), ["6.9.9-strange", "VIRTIO_BLK", "CONFIG_EXT4_FS=y", "docs/build.md"]),
    "fills": ("fills", ("--disk", "64M"), ["No space left"]),
}


@pytest.mark.parametrize("case", BAD)
def test_what_goes_wrong_is_told_and_nothing_is_left(here: Server, flake: Path, case: str) -> None:
    attr, more, words = BAD[case]
    small = flake.parent / "small"
    shutil.copytree(FLAKE, small, dirs_exist_ok=True)
    failed = build(here, small, attr, "--tag", "bad", "--memory", "512", *more)
    failed.fails(1, *words)
    nothing_left(here)
    # All of it can be read afterwards, by the command that the error names.
    named = re.search(r"clawpot image log (build-[a-z0-9]{16})", failed.stderr)
    assert named, failed.stderr
    log = here.cli("image", "log", named[1]).ok().text
    assert "\n== failed: " in log
    assert all(line in failed.stderr for line in log.splitlines() if not line.startswith("=="))
    here.cli("image", "inspect", "bad").fails(1)


@pytest.mark.timeout(within(500))
def test_a_build_that_never_ends_is_ended(here: Server) -> None:
    # On a busy machine nix may need more than that until it builds.
    for limit in (20, 120):
        done = build(here, FLAKE, "never-ends", "--tag", "bad", "--memory", "512", "--timeout", f"{limit}s", timeout=250)
        if "now it waits" in done.stderr:
            break
    done.fails(1, "now it waits", f"took longer than {limit} s")
    nothing_left(here)
    here.cli("image", "inspect", "bad").fails(1)


def test_a_build_that_prints_without_end_costs_no_memory(here: Server) -> None:
    def memory() -> int:
        lines = Path(f"/proc/{here.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))

    # From here on: at its most it may have been more before.
    Path(f"/proc/{here.pid}/clear_refs").write_text("5")
    before = memory()
    printed = build(here, FLAKE, "prints", "--tag", "bad", "--memory", "512", timeout=270)
    # It comes to its end, and its result is no kernel.
    printed.fails(1, "x" * 1000, "kernel")
    # KiB. It prints 100 MB, of which the builder lets 16 MiB through.
    grown = memory() - before
    print(f"{grown} KiB more at its most")
    assert grown < 12 << 10
    assert "bytes of output left out here]" in printed.stderr
    nothing_left(here)


def started(server: Server, flake: Path) -> subprocess.Popen[bytes]:
    """A build that runs and never ends."""
    words = [
        *server.world.enter(),
        str(server.cli.binary),
        "build",
        f"path:{flake}#never-ends",
        "--tag",
        "bad",
        "--memory",
        "512",
    ]
    log = server.state_dir.with_suffix(".build")
    with log.open("wb") as out:
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stderr=out, env=server.cli.environment())
    until(
        lambda: "now it waits" in log.read_text(errors="replace"),
        seconds=240,
        what="the build's output",
    )
    return process


def test_an_interrupt_ends_the_build_and_its_vm(here: Server) -> None:
    process = started(here, FLAKE)
    vm = here.cli.ls()[0]
    assert vm["name"].startswith("build-") and vm["labels"] == {"build": "bad"}
    process.send_signal(signal.SIGINT)
    assert process.wait(within(60)) == 130
    until(lambda: here.cli.ls() == [], seconds=60, what="the end of the build's VM")
    until(
        lambda: not list((here.state_dir / "builds").iterdir()),
        seconds=60,
        what="the end of its files",
    )
    nothing_left(here)


def test_a_server_that_dies_leaves_nothing_of_a_build(here: Server) -> None:
    process = started(here, FLAKE)
    assert len(list((here.state_dir / "builds").iterdir())) == 1
    name = here.cli.ls()[0]["name"]
    here.kill9()
    assert process.wait(within(60)) == 1
    here.start()
    until(lambda: here.cli.ls() == [], seconds=60, what="the end of the build's VM")
    until(
        lambda: not list((here.state_dir / "builds").iterdir()),
        seconds=60,
        what="the end of its files",
    )
    nothing_left(here)
    assert "now it waits" in here.cli("image", "log", name).ok().text


def test_what_needs_no_vm_is_told_without_one(here: Server, workdir: Path, make_server: Callable[..., Server]) -> None:
    empty = workdir / "empty"
    empty.mkdir()
    here.cli("build", empty).fails(2, "flake.nix")
    here.cli("build", "github:owner/repo", "--tag", "x").fails(1, "network", "--network default")
    here.cli("build", f"path:{FLAKE}#--impure", "--tag", "x").fails(1, "attr")
    here.cli("build", f"path:{FLAKE}", "--tag", "Not A Name").fails(2)
    store = images.copy(ASSETS, workdir / "builderless")
    (store / "manifests/builder.json").unlink()
    server = make_server("builderless", image_dir=store).start()
    server.cli("build", f"path:{FLAKE}", "--tag", "x").fails(1, "builder", "scripts/setup-builder.sh")
    nothing_left(server)
    assert os.listdir(here.state_dir / "builds") == []
    server.cli("image", "log", "debian").fails(1, "not built here")
    server.cli("image", "log", "build-aaaaaaaaaaaaaaaa").fails(1, "no log")
    # What comes with a kernel for which there are neither drivers nor modules is no VM that does not boot.
    images.add(store, "strange", b"\0" * 4096, kernel=b"Linux version 6.9.9-strange (nobody)\0")
    refused = server.cli("create", "strange").fails(1, "image strange", "6.9.9-strange", "VIRTIO_BLK")
    assert "CONFIG_VIRTIO_NET=y" in refused.stderr
    assert server.cli.ls() == []
