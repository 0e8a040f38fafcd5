"""Bad input gets a clear error, and nothing is lost or left."""

import re
from collections.abc import Iterator

import grpc
import pytest

from harness.api import Api
from harness.server import Server

LONG = "a" * 300


@pytest.fixture(autouse=True)
def nothing_changes(server: Server, vm: str) -> Iterator[None]:
    assert vm == "web"
    before = [(vm["id"], vm["generation"]) for vm in server.cli.ls()]
    yield
    assert [(vm["id"], vm["generation"]) for vm in server.cli.ls()] == before


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--cpus", "0"], 2, ["0 vCPUs", "1 to 32"]),
        (["--cpus", "33"], 2, ["33 vCPUs", "1 to 32"]),
        (["--cpus", "257"], 2, ["257 vCPUs", "1 to 32"]),
        (["--cpus", "4294967297"], 2, ["4294967297"]),
        (["--memory", "0"], 2, ["0 MiB", "64 to"]),
        (["--memory", "1"], 2, ["1 MiB", "64 to"]),
        (["--memory", "4294967296"], 2, ["4294967296 MiB", "64 to 1048576"]),
        (["--memory", "many"], 2, ["many"]),
        (["--disk", "1"], 2, ["1 MiB", "64 to"]),
        (["--disk", "4194305"], 2, ["4194305 MiB"]),
        (["--name", ""], 2, ["1 to 63"]),
        (["--name", "a/b"], 2, ["a/b", "[a-z0-9-]"]),
        (["--name", "../up"], 2, ["[a-z0-9-]"]),
        (["--name", LONG], 2, ["300 characters", "1 to 63"]),
        (["--name", "Web"], 2, ["Web"]),
        (["--label", "alone"], 2, ["KEY=VALUE"]),
        (["--label", "a=1", "--label", "a=2"], 2, ["twice"]),
        (["--env", "=x"], 2, ["no name"]),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else None,
)
def test_on_the_command_line(server: Server, words: list[str], code: int, said: list[str]) -> None:
    server.cli("create", *words, "debian").fails(code, *said)


@pytest.mark.parametrize("image", ["nosuch", "../debian", "", "sha256:12", "sha256:" + "0" * 64])
def test_unknown_images(server: Server, image: str) -> None:
    done = server.cli("create", image)
    assert done.code in (1, 2), done
    assert "image" in done.stderr or "digest" in done.stderr, done
    if image == "nosuch":
        assert re.search(r"there is .*debian", done.stderr), done


def test_a_name_twice(server: Server, vm: str) -> None:
    done = server.cli("create", "--name", vm, "debian")
    done.fails(1, vm, "taken", server.cli.inspect(vm)["id"])


# The server refuses what other clients send, too.
@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"spec": {"image": "debian", "vcpus": 33}}, "spec.vcpus"),
        ({"spec": {"image": "debian", "vcpus": 257}}, "spec.vcpus"),
        ({"spec": {"image": "debian", "vcpus": 4294967295}}, "spec.vcpus"),
        ({"spec": {"image": "debian", "memory_mib": 1}}, "spec.memory_mib"),
        ({"spec": {"image": "debian", "memory_mib": 1 << 32}}, "spec.memory_mib"),
        ({"spec": {"image": "debian", "memory_mib": (1 << 64) - 1}}, "spec.memory_mib"),
        ({"spec": {"image": "debian", "disk_mib": 1}}, "spec.disk_mib"),
        ({"spec": {"image": "debian", "disk_mib": 1 << 40}}, "spec.disk_mib"),
        ({"spec": {"image": ""}}, "spec.image"),
        ({"spec": {"image": "../debian"}}, "spec.image"),
        ({}, "spec"),
        ({"name": "a/b", "spec": {"image": "debian"}}, "name"),
        ({"name": LONG, "spec": {"image": "debian"}}, "name"),
        ({"labels": {"a": "b\n"}, "spec": {"image": "debian"}}, "labels"),
        ({"labels": {str(n): "" for n in range(65)}, "spec": {"image": "debian"}}, "labels"),
        ({"request_id": "a/b", "spec": {"image": "debian"}}, "request_id"),
        ({"spec": {"image": "debian", "env": [{"name": b"A=B", "value": b""}]}}, "spec.env"),
        ({"spec": {"image": "debian", "cwd": "/" * 5000}}, "spec.cwd"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_through_the_api(server: Server, fields: dict[str, object], said: str) -> None:
    with Api(server.socket) as api, pytest.raises(grpc.RpcError) as refused:
        api.call("VmService", "CreateVm", **fields)
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT, refused.value
    assert said in refused.value.details(), refused.value.details()


@pytest.mark.parametrize(
    ("frames", "said"),
    [
        ([], "start"),
        ([{"stdin": {"data": b"x"}}], "start"),
        ([{"start": {"vm": "web", "exec_id": "short", "argv": [b"true"]}}], "exec id"),
        ([{"start": {"vm": "web", "exec_id": "a" * 16, "argv": []}}], "argv"),
        ([{"start": {"vm": "nosuch", "exec_id": "a" * 16, "argv": [b"true"]}}], "nosuch"),
    ],
    ids=["nothing", "no start", "exec id", "no argv", "no vm"],
)
def test_frames_of_an_exec(server: Server, vm: str, frames: list[dict[str, object]], said: str) -> None:
    assert vm == "web"
    with Api(server.socket) as api, pytest.raises(grpc.RpcError) as refused:
        list(api.stream("VmService", "Exec", iter(frames)))
    assert said in refused.value.details(), refused.value.details()


@pytest.mark.parametrize("verb", ["inspect", "stop", "start", "rm", "logs"])
def test_a_vm_that_is_not_there(server: Server, verb: str) -> None:
    server.cli(verb, "nosuch").fails(1, "nosuch")


def test_no_server(server: Server) -> None:
    done = server.cli("ls", "--socket", "/run/no-such-directory/api.sock")
    done.fails(1, "/run/no-such-directory/api.sock", "hint")
    server.cli("exec", "--socket", "/run/no-such-directory/api.sock", "web", "--", "true").fails(125)
