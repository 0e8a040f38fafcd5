"""A builder VM, spoken to through its own socket, line by line, as the protocol says (docs/builder.md)."""

import gzip
import io
import json
import os
import socket
import tarfile
import time
from pathlib import Path
from typing import Any, Self

from .cli import binaries
from .server import Server
from .tools import REPO, within

PORT = 21470
INPUT = "/build-in"
#: The image has no mount(8), but nix's perl. The numbers are those of mount and umount2 on x86-64.
MOUNT = """perl -e 'my ($f, $at, $o) = ("tmpfs", @ENV{qw(AT OPTIONS)}); syscall(165, $f, $at, $f, 0, $o) == 0 or die $!'"""
UNMOUNT = """perl -e 'my $at = $ENV{AT}; syscall(166, $at, 0) == 0 or die $!'"""
FLAKE = Path(__file__).resolve().parents[1] / "fixtures/flake"


def client() -> Path | None:
    """The client made of the published crate, where it was built."""
    named = binaries() / "clawpot-mvm-client"
    target = Path(os.environ.get("CARGO_TARGET_DIR", REPO / "target"))
    for path in (named, target / "mvm-client/debug/clawpot-mvm-client"):
        if path.exists():
            return path
    return None


def staged(kernel: Path, directory: str = "build-in") -> bytes:
    """The flake with a kernel beside it, as an archive to be unpacked in a guest's root."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for path in sorted(FLAKE.iterdir()):
            archive.add(path, f"{directory}/{path.name}")
        data = gzip.compress(kernel.read_bytes(), compresslevel=1, mtime=0)
        entry = tarfile.TarInfo(f"{directory}/kernel.gz")
        entry.size = len(data)
        archive.addfile(entry, io.BytesIO(data))
    return packed.getvalue()


def directory(server: Server, vm: str) -> Path:
    """Of the machine that the VM is now; its socket is in it."""
    found = server.cli.inspect(vm)
    (path,) = server.state_dir.glob(f"jail/*/{found['id']}-{found['incarnation']}")
    return path


class Talk:
    """One connection."""

    def __init__(self, server: Server, vm: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(within(300))
        self.socket.connect(str(directory(server, vm) / "v.sock"))
        self.socket.sendall(f"CONNECT {PORT}\n".encode())
        self.lines = self.socket.makefile("rb")
        said = self.lines.readline()
        assert said.startswith(b"OK "), said

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.lines.close()
        self.socket.close()

    def raw(self, line: bytes) -> None:
        self.socket.sendall(line + b"\n")

    def say(self, request: Any) -> None:
        self.raw(json.dumps(request).encode())

    def hear(self) -> Any:
        line = self.lines.readline()
        assert line, "hung up"
        return json.loads(line)

    def ping(self) -> None:
        self.say("Ping")
        assert self.hear() == "Pong"

    def start(self, attr: str, timeout_secs: int | None = None, flake_ref: str = INPUT) -> None:
        self.say({"Build": {"flake_ref": flake_ref, "attr": attr, "timeout_secs": timeout_secs}})

    def until_answer(self) -> tuple[list[str], dict[str, Any]]:
        """The lines of the log, and what came of it."""
        lines = []
        while "Log" in (said := self.hear()):
            lines.append(said["Log"]["line"])
        return lines, said

    def build(self, attr: str, timeout_secs: int | None = None, flake_ref: str = INPUT) -> tuple[list[str], dict[str, Any]]:
        begun = time.monotonic()
        self.start(attr, timeout_secs, flake_ref)
        lines, said = self.until_answer()
        print(f"{flake_ref}#{attr}: {time.monotonic() - begun:.1f} s, {len(lines)} lines, {said}")
        return lines, said

    def fails(self, attr: str, timeout_secs: int | None = None, flake_ref: str = INPUT) -> str:
        _, said = self.build(attr, timeout_secs, flake_ref)
        return said["Err"]["message"]
