"""The server dies; its VMs do not."""

import hashlib
import os
import signal
import threading
import time
from collections.abc import Callable

import pytest

from harness.server import Server
from harness.tools import until, within

COUNT = 250


def _boot_id(server: Server, vm: str) -> str:
    return server.cli.sh(vm, "cat /proc/sys/kernel/random/boot_id").ok().text


@pytest.mark.firecracker
def test_a_killed_server_adopts_its_vms(server: Server, vm: str, sibling: str) -> None:
    boots = _boot_id(server, vm), _boot_id(server, sibling)
    before = server.cli.inspect(vm)
    pids = server.vmm_pids(before["id"])
    server.kill9()
    assert server.vmm_pids(before["id"]) == pids
    server.start()
    assert (_boot_id(server, vm), _boot_id(server, sibling)) == boots
    after = server.cli.inspect(vm)
    assert (after["phase"], after["incarnation"], after["address"]) == ("running", before["incarnation"], before["address"])
    assert server.vmm_pids(before["id"]) == pids


def test_a_stopped_server_leaves_its_vms(server: Server, vm: str) -> None:
    boot = _boot_id(server, vm)
    assert server.stop() == 0
    assert not server.socket.exists() or server.cli("ls").code == 1
    server.start()
    assert _boot_id(server, vm) == boot


@pytest.mark.firecracker
def test_a_running_exec_misses_nothing(server: Server, vm: str) -> None:
    script = f"i=0; while [ $i -lt {COUNT} ]; do echo $i; i=$((i+1)); sleep 0.02; done; echo end >&2; exit 5"
    process = server.cli.start("exec", vm, "--", "sh", "-c", script)
    assert process.stdout is not None
    head = [process.stdout.readline() for _ in range(20)]
    for _ in range(2):
        server.kill9()
        time.sleep(0.5)
        server.start()
        time.sleep(1)
    out, errors = process.communicate(timeout=within(90))
    assert process.returncode == 5, errors
    assert b"".join(head) + out == b"".join(b"%d\n" % n for n in range(COUNT))
    assert errors.endswith(b"end\n") and b"looking for it" in errors, errors


@pytest.mark.firecracker
def test_standard_input_survives_it(server: Server, vm: str) -> None:
    """Some of it had been sent, some acknowledged, some neither: each byte arrives once."""
    process = server.cli.start("exec", vm, "--", "sh", "-c", "echo ready; exec sha256sum", stdin=-1)
    assert process.stdin is not None and process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    data = os.urandom(1 << 20) * 12
    sent = 0

    def feed() -> None:
        nonlocal sent
        assert process.stdin is not None
        for at in range(0, len(data), 1 << 18):
            process.stdin.write(data[at : at + (1 << 18)])
            sent = at
            time.sleep(0.05)
        process.stdin.close()

    feeder = threading.Thread(target=feed)
    feeder.start()
    until(lambda: sent > 2 << 20, what="some of it on its way")
    server.kill9()
    time.sleep(0.3)
    server.start()
    feeder.join(within(120))
    out = process.stdout.read()
    assert process.wait(within(60)) == 0
    assert out.split()[0].decode() == hashlib.sha256(data).hexdigest()


def test_an_exec_that_ended_meanwhile_is_told(server: Server, vm: str) -> None:
    process = server.cli.start("exec", vm, "--", "sh", "-c", "echo started; sleep 1; echo done; exit 9")
    assert process.stdout is not None
    assert process.stdout.readline() == b"started\n"
    server.kill9()
    time.sleep(2.5)
    server.start()
    out, errors = process.communicate(timeout=within(60))
    assert (out, process.returncode) == (b"done\n", 9), errors


def _interrupted(server: Server, moment: float, *words: str) -> None:
    """The server is killed `moment` seconds after the start of the command, which then succeeds with the next server."""
    process = server.cli.start(*words)
    time.sleep(moment)
    server.kill9()
    server.start()
    errors = process.communicate(timeout=within(60))[1].decode()
    if process.returncode != 0:
        assert "connecting" in errors, errors
        server.cli(*words).ok()


@pytest.mark.firecracker
def test_killed_at_odd_moments_of_a_create_and_of_a_delete(make_server: Callable[..., Server]) -> None:
    """Whatever it was doing: the next server brings the VM up or takes it away, and nothing is left."""
    server = make_server("odd", "--warm-slots", "0").start()
    before = server.steady()
    for moment in (0.0, 0.01, 0.03, 0.1, 0.6):
        _interrupted(server, moment, "create", "--name", "odd", "debian")
        assert [vm["name"] for vm in server.cli.ls()] == ["odd"]
        if moment == 0.6:
            server.cli("wait", "odd").ok()
            assert server.cli.sh("odd", "echo fine").ok().text == "fine\n"
        _interrupted(server, moment / 4, "rm", "odd")
        assert server.cli.ls() == []
    assert not server.settle(before)


@pytest.mark.firecracker
def test_a_vmm_that_died_while_no_server_ran(server: Server, sibling: str) -> None:
    vm_id = server.cli.inspect(sibling)["id"]
    pids = server.vmm_pids(vm_id)
    server.kill9()
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    until(lambda: not server.vmm_pids(vm_id), what="the VMM's end")
    server.start()
    server.cli("wait", "--for", "failed", "--timeout", f"{within(60):.0f}s", sibling).ok()
    assert server.cli.inspect(sibling)["failure"]["during"] == "running"
    server.cli("start", sibling).ok()
