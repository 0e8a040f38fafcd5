"""From create to delete, and what a VM's owner is told when it goes wrong on the way."""

import concurrent.futures
import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from harness import images
from harness.api import Api
from harness.cli import Cli
from harness.server import ASSETS, VMM, Server
from harness.tools import until, within


def _uids(server: Server, vm: str) -> set[str]:
    pids = server.vmm_pids(server.cli.inspect(vm)["id"])
    assert pids, f"{vm} has no process"
    return {line for pid in pids for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("Uid:")}


def _netns(server: Server, vm: str) -> set[str]:
    return {os.readlink(f"/proc/{pid}/ns/net") for pid in server.vmm_pids(server.cli.inspect(vm)["id"])}


@pytest.mark.firecracker
def test_two_vms_share_nothing(server: Server, vm: str, sibling: str) -> None:
    one, other = server.cli.inspect(vm), server.cli.inspect(sibling)
    assert one["address"] != other["address"]
    assert one["id"] != other["id"]
    assert not _uids(server, vm) & _uids(server, sibling)
    assert not any("0" in line.split()[1:] for line in _uids(server, vm)), "the VMM runs as root"
    assert not _netns(server, vm) & _netns(server, sibling)
    mark = "mkdir -p /srv && echo %s > /srv/mark && sync"
    server.cli.sh(vm, mark % "one").ok()
    assert server.cli.sh(sibling, "cat /srv/mark 2>&1").code == 1
    server.cli.sh(sibling, mark % "other").ok()
    assert server.cli.sh(vm, "cat /srv/mark").ok().text == "one\n"


@pytest.mark.firecracker
def test_stop_and_start_keep_the_disk(server: Server, sibling: str) -> None:
    server.cli.sh(sibling, "echo kept > /root/kept; dd if=/dev/urandom of=/root/big bs=1M count=8 2>/dev/null").ok()
    digest = server.cli.sh(sibling, "sha256sum /root/big").ok().text
    before = server.cli.inspect(sibling)
    stopped = server.cli("stop", sibling, "-o", "json").ok().json
    assert stopped["phase"] == "stopped"
    assert not server.vmm_pids(before["id"])
    server.cli("exec", sibling, "--", "true").fails(125, "stopped")
    # Stopping what is stopped changes nothing.
    assert server.cli("stop", sibling, "-o", "json").ok().json["generation"] == stopped["generation"]
    started = server.cli("start", sibling, "-o", "json").ok().json
    assert started["incarnation"] == before["incarnation"] + 1
    assert started["address"] == before["address"]
    assert server.cli.sh(sibling, "cat /root/kept; sha256sum /root/big").ok().text == f"kept\n{digest}"
    timings = {timing["name"] for timing in started["timings"]}
    assert {"preparing", "booting"} <= timings and any(name.startswith("booting.") for name in timings)


def _attached(server: Server, vm: str, script: str) -> subprocess.Popen[bytes]:
    """A command that has begun in the guest."""
    process = server.cli.start("exec", vm, "--", "sh", "-c", f"echo up; {script}")
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    return process


#: Less than a minute, which is how long the server waits for a guest that it asks to end, seconds.
AT_ONCE = 45


@pytest.mark.firecracker
def test_a_killed_vmm_is_noticed_and_told(server: Server, sibling: str) -> None:
    server.cli.sh(sibling, "echo the last words > /dev/console").ok()
    until(lambda: "the last words" in server.cli("logs", sibling).ok().text, what="them on the console")
    vm_id = server.cli.inspect(sibling)["id"]
    running = _attached(server, sibling, "exec sleep 1000")
    for pid in server.vmm_pids(vm_id):
        os.kill(pid, signal.SIGKILL)
    server.cli("wait", "--for", "failed", "--timeout", f"{within(60):.0f}s", sibling).ok()
    failure = server.cli.inspect(sibling)["failure"]
    assert failure["during"] == "running"
    assert "ended by itself" in failure["message"] and "signal 9" in failure["message"], failure
    assert any("the last words" in line for line in failure["console_tail"]), failure["console_tail"]
    assert "the last words" in server.cli("logs", sibling).ok().text
    kinds = [event["message"] for event in server.cli("events", "-o", "json", sibling).ok().lines]
    assert any("running → failed" in message for message in kinds), kinds
    # Who was attached is told, and is not left waiting.
    errors = running.communicate(timeout=within(60))[1].decode()
    assert running.returncode == 125 and "failed" in errors, f"exit {running.returncode}: {errors}"
    server.cli("exec", sibling, "--", "true").fails(125, "failed")
    server.cli("start", sibling).ok()
    assert server.cli.sh(sibling, "echo again").ok().text == "again\n"


def test_create_twice_with_one_request_id_is_one_vm(server: Server) -> None:
    spec = {"image": "debian"}
    with Api(server.socket) as api:
        api.call("VmService", "ListVms")
        ask = {"request_id": f"twice-{os.getpid()}", "name": "twice", "spec": spec}
        with concurrent.futures.ThreadPoolExecutor() as pool:
            both = [pool.submit(api.call, "VmService", "CreateVm", **ask) for _ in range(2)]
        made = {call.result().id for call in both if not call.exception()}
        # One of two at the very same moment may be asked to come again.
        assert all(call.exception().code() == grpc.StatusCode.ABORTED for call in both if call.exception())
        assert made == {api.call("VmService", "CreateVm", **ask).id}
        assert [vm["name"] for vm in server.cli.ls()].count("twice") == 1
        with pytest.raises(grpc.RpcError) as refused:
            api.call("VmService", "CreateVm", **{**ask, "name": "thrice"})
        assert refused.value.code() == grpc.StatusCode.ALREADY_EXISTS
        assert "another body" in refused.value.details()
    # A delete wins while it boots, at once.
    gone = server.cli("rm", "twice").ok()
    assert gone.seconds < within(AT_ONCE)


def test_prefixes_labels_and_pages(server: Server, vm: str, sibling: str) -> None:
    one = server.cli.inspect(vm)
    assert server.cli.inspect(one["id"][:6])["name"] == vm
    server.cli("inspect", "").fails(1)
    server.cli("inspect", "nobody").fails(1, "nobody")
    assert {row["name"] for row in server.cli.ls()} >= {vm, sibling}
    assert server.cli("ls", "-l", "team=none", "-o", "json").ok().json == []
    with Api(server.socket) as api:
        page = api.call("VmService", "ListVms", page_size=1)
        assert len(page.vms) == 1 and page.next_page_token
        rest = api.call("VmService", "ListVms", page_size=1000, page_token=page.next_page_token)
        assert {vm.name for vm in rest.vms} | {page.vms[0].name} >= {vm, sibling}
        with pytest.raises(grpc.RpcError) as refused:
            api.call("VmService", "ListVms", page_token="0.aaaaaaaaaaaaaaaa")
        assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_rm_is_enforced_by_the_server_when_the_client_is_killed(make_server: Callable[..., Server]) -> None:
    # 10 s instead of a minute, which is much longer than a client may take from its VM's boot to its command.
    server = make_server("abandoned", "--warm-slots", "0", "--abandoned-secs", round(within(10))).start()
    before = server.steady()
    process = server.cli.start("run", "--rm", "--name", "orphan", "debian", "--", "sh", "-c", "echo up; sleep 1000")
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
    finally:
        process.kill()
        process.wait()
    until(lambda: "orphan" not in [vm["name"] for vm in server.cli.ls()], seconds=60, what="the VM's end")
    assert not server.settle(before)


def test_a_vm_without_rm_stays_and_is_named(server: Server) -> None:
    done = server.cli("run", "-l", "kind=stays", "debian", "--", "true").ok()
    (stays,) = server.cli("ls", "-l", "kind=stays", "-o", "json").ok().json
    assert stays["name"] in done.stderr and stays["phase"] == "running"
    server.cli("rm", stays["name"]).ok()
    server.cli("inspect", stays["name"]).fails(1)


@pytest.fixture
def broken(make_server: Callable[..., Server], workdir: Path) -> Callable[..., tuple[Server, Path]]:
    """A server with a copy of the image store that may be broken before it starts."""

    def make(name: str, *options: object) -> tuple[Server, Path]:
        store = images.copy(ASSETS, workdir / f"{name}-images")
        return make_server(name, "--vmm", VMM, *options, image_dir=store), store

    return make


def _fails_to_boot(cli: Cli, *words: str) -> dict[str, object]:
    """A VM that fails; the client and the record say the same."""
    cli("create", "--wait", "--name", "broken", "debian").fails(1, *words)
    found = cli.inspect("broken")
    assert found["phase"] == "failed"
    return dict(found["failure"])


@pytest.mark.firecracker
def test_a_kernel_that_panics(broken: Callable[..., tuple[Server, Path]]) -> None:
    """Right in digest and size: an initramfs with nothing in it. The console's last lines say what the kernel said."""
    server, store = broken("panics")
    images.set_boot_file(store, "initramfs", images.cpio({}))
    server.start()
    failure = _fails_to_boot(server.cli, "booting", "kernel panic")
    assert failure["during"] == "booting"
    tail = failure["console_tail"]
    assert isinstance(tail, list) and any("Kernel panic" in line for line in tail), tail
    assert "Kernel panic" in server.cli("logs", "broken").ok().text
    vm_id = server.cli.inspect("broken")["id"]
    # A failed VM holds its disk and its slot, and no process.
    assert not server.vmm_pids(vm_id)
    server.cli("rm", "broken").ok()
    assert not [name for name in server.traces.now() if vm_id in name]


def test_a_kernel_that_is_none(broken: Callable[..., tuple[Server, Path]]) -> None:
    """An ELF file, but no kernel: the VMM's own words are told."""
    server, store = broken("nokernel")
    images.set_boot_file(store, "kernel", Path("/bin/true").read_bytes())
    server.start()
    failure = _fails_to_boot(server.cli, "booting")
    assert failure["console_tail"], failure


def test_a_guest_that_never_says_hello(broken: Callable[..., tuple[Server, Path]]) -> None:
    server, store = broken("silent")
    images.set_boot_file(store, "initramfs", images.cpio({"init": images.silent_init(b"nobody home\n")}))
    # On a busy machine a kernel may need more than that until it comes to its init.
    for limit in (8, 80):
        server.start("--boot-timeout-secs", limit)
        failure = _fails_to_boot(server.cli, f"did not answer within {limit} s")
        said = str(failure["console_tail"])
        if "nobody home" in said:
            break
        server.cli("rm", "broken").ok()
        server.stop()
    assert "nobody home" in said, said


@pytest.mark.parametrize("what", ["kernel", "initramfs"])
def test_boot_files_that_are_missing_or_damaged(broken: Callable[..., tuple[Server, Path]], what: str) -> None:
    server, store = broken(f"no{what[:4]}")
    server.start()
    images.truncate(store, what)
    failure = _fails_to_boot(server.cli, what, "bytes")
    assert failure["during"] == "preparing"
    server.cli("rm", "broken").ok()
    images.boot_file(store, what).unlink()
    _fails_to_boot(server.cli, what)
    server.cli("rm", "broken").ok()
    (store / "boot.json").unlink()
    server.cli("create", "debian").fails(1, "kernel", "install-vm-assets.sh")
    assert server.cli.ls() == []


def test_a_bit_flipped_in_the_kernel(broken: Callable[..., tuple[Server, Path]]) -> None:
    server, store = broken("flipped")
    images.damage(store, "kernel")
    server.start()
    _fails_to_boot(server.cli, "kernel", "digest")


def test_console_follows(server: Server, vm: str) -> None:
    process = server.cli.start("logs", "-f", "-n", "1", vm, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    try:
        process.stdout.readline()
        server.cli.sh(vm, "echo a line for the console > /dev/console").ok()
        while b"a line for the console" not in (line := process.stdout.readline()):
            assert line, "the console ended"
    finally:
        process.kill()
        process.wait()


def test_stopping_ends_what_runs(server: Server, sibling: str) -> None:
    """Whoever is attached hears how his command ended; one that hears nothing is killed within the grace."""
    gentle = _attached(server, sibling, "exec sleep 1000")
    deaf = server.cli.start("exec", sibling, "--", "sh", "-c", "trap '' TERM; echo deaf; while :; do sleep 1; done")
    assert deaf.stdout is not None
    assert deaf.stdout.readline() == b"deaf\n"
    told = server.cli("events", "-o", "json", sibling).ok().lines
    follower = server.cli.start("events", "-f", "-o", "json", sibling, stderr=subprocess.DEVNULL)
    assert follower.stdout is not None
    assert [json.loads(follower.stdout.readline())["id"] for _ in told] == [event["id"] for event in told]
    # Half of it is the guest's for its processes, the other half for its own end.
    stopped = server.cli("stop", "--grace", "12s", sibling).ok()
    # Its own grace, not the server's usual one.
    assert stopped.seconds < within(AT_ONCE)
    # Why it ended is of the same change as the phase it came to, and has the same id: a follower is told both.
    while not told[-1]["message"].endswith("→ stopped"):
        told.append(json.loads(follower.stdout.readline()))
    follower.kill()
    follower.wait()
    assert told == server.cli("events", "-o", "json", sibling).ok().lines
    assert "vm.exit" in {event["kind"] for event in told}
    for process, code in ((gentle, 143), (deaf, 137)):
        errors = process.communicate(timeout=within(60))[1].decode()
        assert process.returncode == code, errors


def test_deleting_ends_what_runs(server: Server, sibling: str) -> None:
    running = _attached(server, sibling, "sleep 1000")
    assert server.cli("rm", sibling).ok().seconds < within(AT_ONCE)
    errors = running.communicate(timeout=within(60))[1].decode()
    assert running.returncode == 125 and "deleted" in errors, errors


@pytest.mark.firecracker
def test_a_vmm_that_does_not_react(server: Server, sibling: str) -> None:
    """Stopped by a signal, it hears nothing: stop waits for its grace, delete for nothing."""
    (pid,) = server.vmm_pids(server.cli.inspect(sibling)["id"])
    os.kill(pid, signal.SIGSTOP)
    assert 1 < server.cli("stop", "--grace", "2s", sibling).ok().seconds < within(AT_ONCE)
    server.cli("start", sibling).ok()
    (pid,) = server.vmm_pids(server.cli.inspect(sibling)["id"])
    os.kill(pid, signal.SIGSTOP)
    assert server.cli("rm", sibling).ok().seconds < within(AT_ONCE)


@pytest.mark.firecracker
@pytest.mark.parametrize(("told", "number"), [("power off", 0x4321FEDC), ("halt", 0xCDEF0123)])
def test_a_guest_that_goes_down_by_itself(server: Server, sibling: str, told: str, number: int) -> None:
    """As `poweroff -f` and `halt -f` do it. No power can be switched off in Firecracker, and a halt is nobody's end: what
    waits for nothing any more is stopped all the same."""
    del told
    asked = server.cli.start("exec", sibling, "--", "python3", "-c", f"import ctypes; ctypes.CDLL(None).reboot({number})")
    server.cli("wait", "--for", "stopped", "--timeout", f"{round(within(60))}s", sibling).ok()
    vm = server.cli.inspect(sibling)
    assert vm["last_exit"]["reason"] == "powered-off" and vm["last_exit"]["by"] == "guest", vm
    assert not server.vmm_pids(vm["id"])
    asked.communicate(timeout=within(60))
    assert asked.returncode == 125
    server.cli("start", sibling).ok()
    assert server.cli.sh(sibling, "echo back").ok().text == "back\n"


def _heeds(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal."""
    (caught,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigCgt:")]
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)


def test_interrupted_while_it_boots(server: Server) -> None:
    before = server.steady()
    process = server.cli.start("run", "--rm", "--name", "early", "debian", "--", "sleep", "1000")
    until(lambda: [vm for vm in server.cli.ls() if vm["name"] == "early"], what="the VM")
    until(lambda: _heeds(process.pid, signal.SIGINT), what="the client to have heard of it")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=within(60))
    assert process.returncode == 130
    assert not server.settle(before)
