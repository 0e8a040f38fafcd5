"""What ends a VM, what is told of it, and whether it comes back."""

import os
import signal
from collections.abc import Callable
from typing import Any

import grpc
import pytest

from harness.api import Api
from harness.server import Server
from harness.tools import until, within


def _exits(server: Server, name: str) -> list[tuple[str, str]]:
    events = server.cli("events", "-o", "json", name).ok().lines
    return [(event["message"].split(":")[0], event["actor"]) for event in events if event["kind"] == "vm.exit"]


def _back(server: Server, name: str, incarnation: int) -> dict[str, Any]:
    """The VM in a later incarnation than that, without anybody's word."""

    def runs() -> bool:
        vm = server.cli.inspect(name)
        return vm["phase"] == "running" and vm["incarnation"] == incarnation + 1

    until(runs, seconds=60, every=0.2, what=f"{name} in incarnation {incarnation + 1}")
    return server.cli.inspect(name)


def _sysrq(server: Server, name: str, key: str) -> None:
    # The answer may not make it out of the machine.
    server.cli("exec", name, "--", "sh", "-c", f"sync; echo {key} > /proc/sysrq-trigger; sleep 30")


def test_each_end_has_its_reason_and_its_consequence(server: Server) -> None:
    name = "ends"
    server.cli("create", "--wait", "--name", name, "--restart", "on-failure", "debian").ok()
    server.cli.sh(name, "echo kept > /root/kept").ok()

    # The guest goes down by itself: no failure, and on-failure lets it rest.
    _sysrq(server, name, "o")
    server.cli("wait", "--for", "stopped", "--timeout", f"{round(within(60))}s", name).ok()
    vm = server.cli.inspect(name)
    assert vm["last_exit"]["reason"] == "powered-off" and vm["last_exit"]["by"] == "guest", vm
    assert vm["failure"] is None and vm["desired"] == "stopped"
    server.cli("exec", name, "--", "true").fails(125, "stopped")
    server.cli("start", name).ok()

    # Its kernel gives up: started again.
    _sysrq(server, name, "c")
    vm = _back(server, name, 2)
    assert vm["last_exit"]["reason"] == "guest-panicked", vm
    assert "sysrq triggered crash" in vm["last_exit"]["message"]

    # Its VMM is killed: started again, after a longer pause.
    for pid in server.vmm_pids(vm["id"]):
        os.kill(pid, signal.SIGKILL)
    until(lambda: server.cli.inspect(name)["last_exit"]["reason"] == "vmm-died", seconds=60, what="its death told")
    # Whoever wants to run something waits with it.
    assert server.cli.sh(name, "cat /root/kept").ok().text == "kept\n"
    vm = _back(server, name, 3)
    assert vm["last_exit"]["reason"] == "vmm-died" and "signal 9" in vm["last_exit"]["message"], vm
    assert vm["restart"]["attempts"] == 2

    # Its time is over: stopped, and it stays so.
    server.cli("ttl", name, "1s").ok()
    server.cli("wait", "--for", "stopped", "--timeout", f"{round(within(60))}s", name).ok()
    assert server.cli.inspect(name)["last_exit"]["reason"] == "ttl-over"
    told = [("powered-off", "guest"), ("guest-panicked", "guest"), ("vmm-died", "host"), ("ttl-over", "server")]
    assert _exits(server, name) == told
    vm_id = vm["id"]
    server.cli("rm", name).ok()
    assert _exits(server, vm_id) == told, "events outlive their VM"


def test_what_does_not_fit_is_refused_by_name(make_server: Callable[..., Server]) -> None:
    server = make_server("small", "--memory-percent", "4", "--warm-slots", "0").start()
    budgets = server.cli("host", "-o", "json").ok().json["budgets"]
    limit = budgets["memory_mib"]["limit"]
    assert budgets["memory_mib"] == {"limit": limit, "used": 0, "free": limit}
    # What its VMM takes is asked for with it.
    vmm = budgets["vmm_memory_each_mib"]
    assert vmm > 0 and budgets["vmm_memory_mib"] == 0
    refused = server.cli("create", "--memory", str(limit + 1), "debian")
    asked = f"{limit + 1 + vmm} MiB asked ({limit + 1} for the guest, {vmm} for its VMM)"
    refused.fails(1, f"create: memory: {asked}, {limit} MiB free of {limit} MiB for VMs", "memory_percent")
    assert server.cli.ls() == []
    server.stop()
    # There is no disk of which this much is free.
    server.options = ["--low-disk-percent", "99", "--warm-slots", "0"]
    server.start()
    server.cli("create", "debian").fails(1, "are free on the state directory's filesystem", "low_disk_percent")
    with Api(server.socket) as api, pytest.raises(grpc.RpcError) as error:
        api.call("VmService", "CreateVm", spec={"image": "debian"})
    assert error.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
