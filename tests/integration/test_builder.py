"""nix in a builder VM: the protocol on port 21470, what a build leaves, and all that goes wrong in a build."""

import hashlib
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from harness import builder, images
from harness.builder import Talk
from harness.server import ASSETS, Server
from harness.tools import until, within

REQUIRED = "CLAWPOT_TEST_REQUIRE_TOOLS" in os.environ
MIB = 1 << 20
#: The guest's own reading and hashing of some 60 MiB, in an emulator.
pytestmark = [pytest.mark.timeout(within(600))]


@pytest.fixture(scope="module")
def built(session_server: Callable[..., Server], workdir: Path) -> Iterator[Server]:
    """A server on a store of its own, with a VM `builder` whose two directories are file systems of its memory."""
    if not (ASSETS / "manifests/builder.json").exists():
        assert not REQUIRED, "no image builder: scripts/setup-builder.sh"
        pytest.skip("no image builder: scripts/setup-builder.sh makes it")
    store = images.copy(ASSETS, workdir / "builder-store")
    server = session_server("builder", image_dir=store).start()
    server.cli("create", "--wait", "--name", "builder", "--memory", "1GiB", "--disk", "2GiB", "builder").ok()
    for name, size in {"/build-in": "64m", "/build-out": "90m"}.items():
        server.cli.sh("builder", f"mkdir {name} && {builder.MOUNT}", "-e", f"AT={name}", "-e", f"OPTIONS=size={size}").ok()
    flake = builder.staged(images.boot_file(store, "kernel"))
    server.cli("exec", "builder", "--", "tar", "-xC", "/", "--no-same-owner", stdin=flake).ok()
    yield server
    server.cli("rm", "--force", "builder").ok()


def _idle(server: Server) -> None:
    """No process of a build is left, and the next may come."""

    def nobody() -> bool:
        if server.cli.sh("builder", "! grep -lsE 'nix|sleep' /proc/[0-9]*/comm").code != 0:
            return False
        with Talk(server, "builder") as talk:
            return "already" not in talk.fails("", flake_ref="path:/nowhere")

    until(nobody, every=0.5, what="the end of the build")


def _waits(talk: Talk) -> bool:
    """Of the build that never ends, whether it has come so far; else it has ended."""
    while "Log" in (said := talk.hear()):
        if "now it waits" in said["Log"]["line"]:
            return True
    return False


def _left(server: Server) -> set[str]:
    return set(server.cli.sh("builder", "ls -A /build-out").ok().text.split())


@pytest.mark.firecracker
def test_a_client_made_of_the_published_crate_builds_a_machine_that_boots(built: Server, workdir: Path) -> None:
    """`mvm-guest` 0.3 as it is; then what it got runs here."""
    client = builder.client()
    if client is None:
        assert not REQUIRED, "no clawpot-mvm-client: scripts/lib/build.sh builds it"
        pytest.skip("no clawpot-mvm-client: cargo build in tests/mvm-client")
    # Where the crate looks: a name for the machine's directory, since a socket's path is short.
    instance = workdir / "mvm"
    (instance / "runtime").mkdir(parents=True)
    (instance / "runtime/v.sock").symlink_to(builder.directory(built, "builder") / "v.sock")
    words = [client, instance, builder.INPUT, "default", "300"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=within(330), check=False)
    said = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr}"
    assert said[0] == "Pong"
    assert said[-1]["Ok"]["out_path"].startswith("/nix/store/")
    assert any("building the root file system" in line["Log"]["line"] for line in said[1:-1])

    base = json.loads(built.cli.sh("builder", "cat /build-out/fc-base.json").ok().text)
    assert (base["vcpu_count"], base["mem_size_mib"], base["boot_args"]) == (1, 192, "quiet")
    kernel = built.cli.sh("builder", "sha256sum </build-out/vmlinux").ok().text.split()[0]
    assert base["kernel"] == {"file": "vmlinux", "digest": f"sha256:{kernel}", "size": base["kernel"]["size"]}
    assert kernel == hashlib.sha256(images.boot_file(built.image_dir, "kernel").read_bytes()).hexdigest()
    assert "building the root file system" in built.cli.sh("builder", "cat /build-out/build.log").ok().text

    rootfs = built.cli("exec", "builder", "--", "cat", "/build-out/rootfs.ext4", timeout=150).ok().stdout
    assert base["rootfs"]["digest"] == f"sha256:{hashlib.sha256(rootfs).hexdigest()}"
    images.add(built.image_dir, "of-a-flake", rootfs)
    done = built.cli("run", "--rm", "of-a-flake", "--", "sh", "-c", "cat /etc/hello; uname -s").ok()
    assert done.text == "built by a flake\nLinux\n"


@pytest.mark.firecracker
def test_what_is_no_request_and_no_flake_is_an_error_and_no_end(built: Server) -> None:
    with Talk(built, "builder") as talk:
        talk.raw(b"nonsense")
        assert talk.hear()["Err"]["message"].startswith("not a request")
        talk.ping()
        assert "does not provide attribute" in talk.fails("no-such-thing")
        assert "nix build failed" in talk.fails("x", flake_ref="; rm -rf /")
        assert "nix build failed" in talk.fails("$(touch /tmp/pwned)", flake_ref="`touch /tmp/pwned`")
        assert talk.fails("x", flake_ref="--help").startswith("flake_ref: begins with -")
        assert "this is the reason" in talk.build("fails")[0][-2] or "exit code 3" in talk.fails("fails")
        talk.ping()
    built.cli.sh("builder", "test ! -e /tmp/pwned && test -e /bin/sh").ok()


def test_a_result_that_is_no_machine_says_what_it_lacks(built: Server) -> None:
    with Talk(built, "builder") as talk:
        message = talk.fails("no-kernel")
        assert message.startswith("no kernel in the result") and "rootfs.ext4, something" in message
        assert _left(built) == {"build.log"}
        assert "leads out of the store, to /etc/passwd" in talk.fails("leads-out")


def test_a_build_that_prints_without_end_is_bounded(built: Server) -> None:
    def memory() -> int:
        """Of the agent at its most, bytes."""
        return int(built.cli.sh("builder", "grep VmHWM /proc/1/status").ok().text.split()[1]) << 10

    # From here on: at its most it may have been more before.
    built.cli.sh("builder", "echo 5 > /proc/1/clear_refs").ok()
    before = memory()
    with Talk(built, "builder") as talk:
        lines, said = talk.build("prints")
    assert "Ok" in said
    assert max(map(len, lines)) <= 4096
    assert 16 * MIB <= sum(map(len, lines)) <= 17 * MIB
    # 100 MB were printed.
    note = next(line for line in lines if line.endswith("bytes of output left out here]"))
    assert int(note.strip("[").split()[0]) > 100_000_000 - 17 * MIB
    size = int(built.cli.sh("builder", "stat -c %s /build-out/build.log").ok().text)
    assert size <= 17 * MIB
    grown = memory() - before
    print(f"{grown} bytes more at its most")
    assert grown < 8 * MIB


def test_a_build_that_never_ends_is_killed_and_others_are_answered_meanwhile(built: Server) -> None:
    with Talk(built, "builder") as talk, Talk(built, "builder") as other:
        # On a busy machine nix may need more than that until it builds.
        for limit in (30, 300):
            begun = time.monotonic()
            talk.start("never-ends", round(within(limit)))
            # What follows is to come before its end.
            waits = _waits(talk)
            if waits and time.monotonic() - begun < within(limit / 2):
                break
            if waits:
                talk.until_answer()
            _idle(built)
        other.ping()
        talk.ping()
        assert other.fails("default").startswith("a build is already running")
        message = talk.until_answer()[1]["Err"]["message"]
        assert message.startswith("the build took longer than") and message.endswith("and was killed")
    _idle(built)


def test_a_host_that_hangs_up_ends_its_build(built: Server) -> None:
    with Talk(built, "builder") as talk:
        talk.start("never-ends", 600)
        assert _waits(talk)
    _idle(built)


def test_an_output_disk_that_is_too_small_is_called_that(built: Server) -> None:
    built.cli.sh("builder", builder.UNMOUNT, "-e", "AT=/build-out").ok()
    built.cli.sh("builder", builder.MOUNT, "-e", "AT=/build-out", "-e", "OPTIONS=size=8m").ok()
    with Talk(built, "builder") as talk:
        assert talk.fails("large").startswith("the output disk is full: it has 8 MiB in all, too little for vmlinux")
    assert _left(built) == {"build.log"}


def test_a_builder_without_disks_says_so(built: Server) -> None:
    built.cli.sh("builder", builder.UNMOUNT, "-e", "AT=/build-out").ok()
    with Talk(built, "builder") as talk:
        message = talk.fails("default")
    assert message.startswith("output disk /dev/vdb: ") and "the host has not attached one" in message
